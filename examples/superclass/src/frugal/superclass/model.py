"""The model: an image tower and a linear layer to the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.models.vit import ImageTower
from frugal.common.ranges import Count
from frugal.common.recipe import ModelConfig, ModelInputs
from frugal.common.reduction.image import KeptPatches


@dataclass(frozen=True, kw_only=True)
class Words:
    """What is predicted."""

    vocabulary: Count
    """Token ids that there may be."""
    length: Count = 32
    """Tokens of a caption that are read."""
    pad_id: int = 0


@dataclass(frozen=True, kw_only=True)
class WordModel(ModelConfig):
    """An image tower that says which words a caption has."""

    image: ImageTower
    words: Words

    @override
    def inputs(self) -> ModelInputs:
        """Images, and captions as what is predicted of them."""
        return ModelInputs(
            height_width=self.image.height_width,
            grid=self.image.grid,
            captions=self.words,
        )

    def build(self, generator: torch.Generator) -> WordNetwork:
        """The model on the CPU in float32, its weights drawn from ``generator``."""
        return WordNetwork(self, generator)


class WordNetwork(nn.Module):
    """``image`` and ``head``: under these names exports to other libraries find them."""

    def __init__(self, config: WordModel, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.image = config.image.module()
        self.image.initialize(generator)
        self.head = nn.Linear(config.image.pooled_width, config.words.vocabulary)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.head.bias)

    @override
    def forward(self, images: Tensor, kept: KeptPatches | None = None) -> Tensor:
        """(B, 3, H, W) images, of which ``kept`` patches are seen, to (B, V) scores of words."""
        return self.head(self.image.forward_pooled(images, kept))
