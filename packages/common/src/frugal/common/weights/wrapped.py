"""Models whose towers this library does not have, called as its own are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.data.transforms import normalize
from frugal.common.models.preprocess import Pixels


@dataclass(frozen=True, kw_only=True)
class WrappedImage:
    """What evaluations ask of an image tower."""

    height_width: tuple[int, int]
    mean: tuple[float, float, float]
    """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class WrappedText:
    """What evaluations ask of a text tower."""

    length: int
    """Tokens of a caption, special tokens and padding included."""


@dataclass(frozen=True, kw_only=True)
class WrappedModel:
    """A dual encoder of another library, as a part of a recipe."""

    library: str
    image: WrappedImage
    text: WrappedText


class Rows:
    """A library's own tokenizer, which makes whole rows of ids; the face of a ``Tokenizer``."""

    pad_id = 0

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self._tokenize = tokenize

    def encode(self, text: str) -> list[int]:
        """The row of a text: special tokens and padding included."""
        return self._tokenize([text])[0].tolist()

    def assemble(self, ids: list[int], length: int) -> list[int]:
        """The row as it is: ``length`` is what the library made it for."""
        del length
        return list(ids)


@dataclass(frozen=True)
class RowTokenizer:
    """A tokenizer of another library, as a part of a recipe."""

    tokenize: Callable[[list[str]], Tensor]

    def load(self) -> Any:
        """What evaluations use."""
        return Rows(self.tokenize)


class Wrapped(nn.Module):
    """Another library's dual encoder with the two calls that evaluations make.

    Args:
        model: the library's.
        config: its images, which it wants normalized.
        image: from normalized (B, 3, H, W) float32 to (B, E).
        text: from (B, T) token ids and their (B,) lengths to (B, E).
    """

    def __init__(
        self,
        model: nn.Module,
        config: WrappedModel,
        *,
        image: Callable[[Any, Tensor], Any],
        text: Callable[[Any, Tensor, Tensor], Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self._image, self._text = image, text

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float32 that is normalized, to (B, E) unit float32."""
        if images.dtype == torch.uint8:
            images = normalize(images, mean=self.config.image.mean, std=self.config.image.std)
        return F.normalize(as_tensor(self._image(self.model, images)), dim=-1)

    def encode_text(self, token_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """(B, T) token ids and (B,) their lengths to (B, E) unit float32."""
        return F.normalize(as_tensor(self._text(self.model, token_ids, text_lengths)), dim=-1)


def wrap_clip(
    model: nn.Module, pixels: Pixels, *, size: tuple[int, int], length: int, library: str
) -> Wrapped:
    """A model of open_clip, in float32 and evaluation mode.

    Args:
        model: has ``encode_image`` and ``encode_text``.
        pixels: how its images are normalized.
        size: (height, width) of its images.
        length: tokens of its captions.
        library: as its users call it.
    """
    config = WrappedModel(
        library=library,
        image=WrappedImage(height_width=size, mean=pixels.mean, std=pixels.std),
        text=WrappedText(length=length),
    )
    return Wrapped(
        model.float(),
        config,
        image=lambda model, images: model.encode_image(images),
        text=lambda model, token_ids, lengths: model.encode_text(token_ids),
    ).eval()


def as_tensor(made: Any) -> Tensor:
    """Transformers 5 returns an object where version 4 returned the tensor in it."""
    return made if isinstance(made, Tensor) else made.pooler_output
