"""A trained dual encoder on its way into another library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from frugal.common.checkpoint.store import Checkpoint
from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder
from frugal.common.models.config import DualEncoderConfig
from frugal.common.models.dual_encoder import DualEncoder
from frugal.common.recipe import Recipe

_CAPTIONS = [
    "a photo of a cat",
    "Two red circles, left of 3 blue squares!",
    "it's the dog's ball; isn't it GREAT? (naïve café, 7½)",
    "a very long caption " * 30,
]


class Embedded(NamedTuple):
    """What a model makes of some pictures and captions."""

    images: Tensor
    """(B, E) unit vectors."""
    texts: Tensor
    """(C, E) unit vectors."""
    logit: Tensor
    """(1,) the logarithm of the scale on the cosines; (2,) with the bias of a sigmoid loss."""


Embed = Callable[[Path, Tensor, list[str]], Embedded]
"""What a library makes of (B, 3, H, W) uint8 pictures and of captions with a written folder."""


class Misfit(NamedTuple):
    """An option of a model that another library has no place for."""

    option: str
    reason: str


@dataclass(frozen=True)
class TrainedModel:
    """Two trained towers and everything that is needed to use them."""

    model: DualEncoder
    """On the CPU in float32, in evaluation mode."""
    recipe: Recipe
    checkpoint: Checkpoint
    folder: Path
    """The run directory."""
    numbers: dict[str, dict[str, Any]]
    """What this checkpoint was measured at, by task."""

    @property
    def config(self) -> DualEncoderConfig:
        """The towers."""
        return self.model.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that the run keeps, or else the one that its recipe names.

        Raises:
            InputError: if it cannot be loaded, or has ids that the model has no row for.
        """
        data: Any = self.recipe.data
        tokenizer, rows = data.tokenizer.load(), self.config.text.vocabulary
        if tokenizer.vocab_size > rows:
            raise InputError(
                f"the tokenizer of {self.folder} has {tokenizer.vocab_size:,} entries for the "
                f"{rows:,} rows of the model's token table; export the run with the tokenizer it "
                "was trained with"
            )
        return tokenizer

    @property
    def captions_end(self) -> bool:
        """Whether a caption ends with a token that does not begin it too."""
        end = self.tokenizer.end_id
        return end is not None and end not in self.tokenizer.prefix

    @property
    def crop(self) -> CenterCrop:
        """Which part of an image the first evaluation of the recipe shows the model."""
        crops = (getattr(task, "crop", None) for task in self.recipe.evaluation)
        return next((crop for crop in crops if isinstance(crop, CenterCrop)), CenterCrop())

    @property
    def interpolation(self) -> Literal["bicubic", "bilinear"]:
        """That of :attr:`crop`, as libraries that shrink with anti-aliasing have it."""
        return "bilinear" if self.crop.interpolation == "bilinear" else "bicubic"

    def difference(self, embed: Embed, folder: Path) -> float:
        """How far another library's embeddings are from ours, for noise and a few captions.

        Returns:
            The largest difference of a number; infinite if one is not finite.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (4, 3, *self.config.image.height_width)
        pictures = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        with torch.no_grad():
            ours, theirs = self._embed(pictures), embed(folder, pictures, _CAPTIONS)
        worst = 0.0
        for mine, other in zip(ours, theirs, strict=True):
            if mine.shape != other.shape or not (mine - other).isfinite().all():
                return float("inf")
            worst = max(worst, (mine - other).abs().max().item())
        return worst

    def _embed(self, pictures: Tensor) -> Embedded:
        embedder = Embedder(
            self.model,
            self.tokenizer,
            context_length=self.config.text.length,
            device=torch.device("cpu"),
        )
        logit: list[Tensor] = [self.model.logit_scale]
        if self.model.logit_bias is not None:
            logit.append(self.model.logit_bias)
        return Embedded(embedder.images(pictures), embedder.texts(_CAPTIONS), torch.cat(logit))
