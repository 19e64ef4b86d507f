"""Which tokens stay: the left part of every image, every other word of a caption."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import Count
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.text import CaptionTokenizer, TextReduction


@dataclass(frozen=True, kw_only=True)
class LeftPart(ImageReduction):
    """The leftmost columns of patches stay."""

    columns: Count = 2

    @override
    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse more columns than images have, before anything is written."""
        if self.columns > grid[1]:
            raise InputError(
                f"reduction.image.columns is {self.columns}, but images have {grid[1]} columns of "
                "patches; choose fewer"
            )

    @override
    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches:
        """Dense indices (B, rows * columns), row by row."""
        del noise  # nothing is drawn
        rows, columns = view.grid
        numbers = torch.arange(rows * columns, device=view.device).view(rows, columns)
        kept = numbers[:, : self.columns].flatten()
        return KeptPatches.dense(kept.expand(len(view.images), -1))

    @override
    def draw(self, view: PatchView, images: Tensor, *, noise: NoiseSource) -> np.ndarray:
        """(3, H, B W) uint8: the images, dark where nothing is seen."""
        seen = self.keep(view, noise=noise).mask(view.num_patches).view(-1, 1, *view.grid)
        for side in (2, 3):
            seen = seen.repeat_interleave(view.patch_size, dim=side)
        return images.where(seen, images // 4).permute(1, 2, 0, 3).flatten(2).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class EveryOtherWord(TextReduction):
    """Every other token of a caption stays, from a first or second one on that is drawn."""

    @override
    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int]:
        """At most ``length`` token ids, special tokens included, without padding."""
        content = tokenizer.encode(caption)
        first = int(generator.integers(0, 2)) if len(content) > 1 else 0
        return tokenizer.assemble(content[first::2], length)
