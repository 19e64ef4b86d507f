"""A model as a thing: what evaluations, exports, reports and later stages take."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from frugal.common.data.tokenizers import Tokenizer, padded
from frugal.common.data.transforms import CenterCrop, normalize
from frugal.common.errors import InputError
from frugal.common.files import read_bytes
from frugal.common.reduction.text import TextReduction


class ImageSpec(Protocol):
    """What an image tower takes; our towers are such a thing, and wrapped ones too."""

    @property
    def height_width(self) -> tuple[int, int]:
        """In pixels."""
        ...

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """The same of their standard deviation."""
        ...


class TextSpec(Protocol):
    """What a text tower takes."""

    @property
    def length(self) -> int:
        """Tokens of a caption, special tokens and padding included."""
        ...


class TokenizerSource(Protocol):
    """What a tokenizer is loaded from: a configuration, or another library's own tokenizer."""

    def load(self) -> Tokenizer:
        """Read the vocabulary."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is from: for results, model cards and reports."""

    path: Path
    """The run directory, checkpoint, folder or file."""
    library: str
    """Which wrote it, as its users call it."""
    name: str
    """Which checkpoint of the path it is, or which name its weights go by."""
    step: int | None = None
    """Of its training; None where that is not known."""
    samples: int | None = None
    """That it was trained on."""
    left_behind: tuple[str, ...] = ()
    """Parts of what was read that have no place in the model."""
    training: Mapping[str, str] = field(default_factory=dict)
    """How it was trained, in words; empty where that is not known."""
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What it was measured at, by task."""


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """A model with everything that is needed to use it."""

    model: nn.Module
    """In evaluation mode: one of our towers, two of them, or a model of another library with the
    calls of ours."""
    config: object
    """A frozen dataclass: what of the model is no weight."""
    image: ImageSpec
    text: TextSpec | None
    """None of a model that reads no captions."""
    tokenizer_source: TokenizerSource | None
    transform: CenterCrop
    """How an image is prepared."""
    source: Source
    text_reduction: TextReduction | None = None
    """How captions were shortened in training; None where nothing is known of it."""
    class_names: tuple[str, ...] | None = None
    """Folders of the classes of a classifier in their order, where they are known."""
    precision: str = "float32"
    """Of the matrix products on CUDA: float32, bfloat16, float16, or auto for the best there is."""
    seed: int = 0
    """Of what evaluations draw: masked views, shortened prompts."""
    told_by: str = ""
    """The file that says how images are prepared, or whose defaults that is."""

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None of a model that reads no captions.

        Raises:
            InputError: if it cannot be loaded.
        """
        return None if self.tokenizer_source is None else self.tokenizer_source.load()

    def prepare(self, images: Sequence[bytes | str | Path | Image]) -> Tensor:
        """Images as the model was trained to see them: what ``model.encode_image`` takes.

        Args:
            images: pictures: the bytes of a file, its path, or a PIL image.

        Returns:
            (B, 3, H, W) uint8; or float32 and normalized, where the library of the model resizes
            with a kernel that leaves fractions of a gray level.

        Raises:
            Damaged: if a picture cannot be decoded.
        """
        size = self.image.height_width
        levels = [self.transform.gray_levels(_encoded(image), size=size) for image in images]
        pixels = torch.stack([torch.tensor(level) for level in levels])
        if pixels.dtype == torch.uint8:
            return pixels
        return normalize(pixels, mean=self.image.mean, std=self.image.std)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, T) token ids and (B,) their lengths: what ``model.encode_text`` takes.

        Captions of more tokens than the model reads are cut.

        Raises:
            InputError: if the model reads no captions, or its tokenizer cannot be loaded.
        """
        tokenizer, text = self.tokenizer, self.text
        if tokenizer is None or text is None:
            raise InputError(f"{self.source.path} holds a model that reads no captions")
        ids = [tokenizer.assemble(tokenizer.encode(one), text.length) for one in captions]
        return padded(ids, tokenizer, length=text.length)


def _encoded(image: bytes | str | Path | Image) -> bytes:
    """The bytes of a picture file; of a PIL image, of one that keeps every pixel."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return read_bytes(Path(image))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
