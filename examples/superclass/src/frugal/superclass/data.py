"""Data that is drawn while training: squares of one color on another, and what is to be seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.contracts import Batch, Part, TrainedModel
from frugal.common.data.stream import RankSlice
from frugal.common.randomness import sample_generator
from frugal.common.ranges import Count, Share, check_ranges
from frugal.common.recipe import DataConfig, ModelInputs, Recipe
from frugal.common.reduction.text import TextReduction
from frugal.common.run import Run

COLORS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "red": (220, 30, 30), "green": (30, 160, 60),
    "blue": (40, 60, 220), "yellow": (240, 220, 40),
}  # fmt: skip
WORDS = ("[padding]", "square", "on", "left", "right", *COLORS)
"""The vocabulary; a token's id is its place."""


class SquareWords:
    """The tokenizer: one token for every word."""

    def encode(self, caption: str) -> list[int]:
        """Token ids of the words."""
        return [WORDS.index(word) for word in caption.split()]

    def assemble(self, content_ids: Sequence[int], length: int) -> list[int]:
        """The first ``length``; there are no special tokens."""
        return list(content_ids[:length])


def draw(generator: np.random.Generator, size: int) -> tuple[np.ndarray, str]:
    """A picture (3, size, size) uint8 and its caption."""
    inside, outside = generator.choice(list(COLORS), size=2, replace=False)
    side = "left" if generator.random() < 0.5 else "right"
    image = np.empty((3, size, size), np.uint8)
    image[:] = np.array(COLORS[outside], np.uint8)[:, None, None]
    edge = size // 3
    left = size // 12 + (size // 2 if side == "right" else 0)
    top = int(generator.integers(0, size - edge))
    image[:, top : top + edge, left : left + edge] = np.array(COLORS[inside], np.uint8)[
        :, None, None
    ]
    return image, f"{inside} square {side} on {outside}"


@dataclass(frozen=True, kw_only=True)
class Squares(DataConfig):
    """Pictures of squares; sample n is a function of seed and n, so any resume sees the same."""

    epoch_samples: Count = 10_000
    """Samples of what counts as an epoch; no picture ever comes twice."""
    max_damaged: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, "data")

    @override
    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: TrainedModel | None,
    ) -> SquareStream:
        """The micro-batches of this process from ``first_sample`` on."""
        del state, engine
        return SquareStream(self, recipe, run, first_sample)


class SquareStream:
    """An endless stream; each process draws its own rows of every micro-batch."""

    contents: Sequence[Sequence[Part]] = ()

    def __init__(self, config: Squares, recipe: Recipe, run: Run, first_sample: int) -> None:
        self.epoch_samples = config.epoch_samples
        self._seed = recipe.run.seed
        self._inputs = recipe.model.inputs()
        assert recipe.reduction.text is not None  # the objective has seen to it
        self._reduction = recipe.reduction.text
        self._slice = RankSlice.of(recipe, run, first_sample=first_sample)

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.count():
            numbers = self._slice.numbers(batch).tolist()
            yield draw_batch(
                numbers, seed=self._seed, inputs=self._inputs, reduction=self._reduction
            )

    def state(self) -> dict[str, Any]:
        """Nothing: the sample number says everything."""
        return {}

    def scalars(self) -> dict[str, float]:
        """Nothing to log."""
        return {}


def draw_batch(
    numbers: Sequence[int], *, seed: int, inputs: ModelInputs, reduction: TextReduction
) -> Batch:
    """The samples of these numbers.

    Args:
        numbers: of the samples since the start of the run.
        seed: of the run.
        inputs: what the model takes; pictures are square.
        reduction: which tokens of a caption stay.
    """
    images, ids = [], []
    assert inputs.captions is not None
    length = inputs.captions.length
    for number in numbers:
        image, caption = draw(sample_generator(seed, "square", number), inputs.height_width[0])
        images.append(image)
        words = sample_generator(seed, "words", number)
        kept = reduction.encode(caption, SquareWords(), length=length, generator=words)
        assert isinstance(kept, list)  # slots mean nothing to a bag of words
        ids.append(kept)
    lengths = torch.tensor([len(row) for row in ids])
    token_ids = torch.zeros(len(ids), length, dtype=torch.int64)
    for row, kept in zip(token_ids, ids, strict=True):
        row[: len(kept)] = torch.tensor(kept)
    sample_numbers: Tensor = torch.tensor(list(numbers))
    return Batch(
        images=torch.from_numpy(np.stack(images)),
        sample_numbers=sample_numbers,
        valid=torch.ones(len(ids), dtype=torch.bool),
        token_ids=token_ids,
        text_lengths=lengths,
        keys=[f"squares/{number}" for number in numbers],
    )
