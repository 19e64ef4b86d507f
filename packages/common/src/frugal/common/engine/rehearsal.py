"""One forward pass of made-up samples: what does not fit together is found before a run begins."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn

from frugal.common.contracts import Batch
from frugal.common.data.config import StoredData, make_transform
from frugal.common.data.sample_transform import Collator
from frugal.common.data.samples import RawSample
from frugal.common.engine.engine import Engine
from frugal.common.recipe import Recipe
from frugal.common.run import Run

_CAPTION = "a photograph of two small dogs beside a red house"
_SIDE = 64
"""Of a made-up picture, in pixels."""


def rehearse(engine: Engine, recipe: Recipe, run: Run) -> None:
    """Have samples that are not of the data reduced, encoded and compared once.

    Every process calls this. Nothing is trained or counted: weights, statistics and random states
    stay as they are.

    Raises:
        InputError: if reductions, objective, model and batch do not go with each other.
    """
    local = recipe.local_batch(run.world_size) // recipe.virtual_per_process(run.world_size)
    count = min(local, 2 + local % 2)  # few, but odd where a batch is: some objectives need pairs
    batch = _made_up(recipe, first=run.rank * count, count=count)
    if batch is None:
        return
    # towers that are compiled would be compiled for these shapes too
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.no_grad(), _as_it_was(engine.objective, run.device):
        engine.forward(batch.to(run.device))


def _made_up(recipe: Recipe, *, first: int, count: int) -> Batch | None:
    """Noise with a caption and a class, prepared as the data is; None for data of another kind."""
    if not isinstance(recipe.data, StoredData):
        return None
    numbers = np.arange(first, first + count, dtype=np.int64)
    collator = Collator(make_transform(recipe.data, recipe), numbers)
    draws = np.random.default_rng(0)
    for number in numbers:
        file = io.BytesIO()
        pixels = draws.integers(256, size=(_SIDE, _SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, format="png")
        collator.add(str(number), RawSample(image=file.getvalue(), captions=[_CAPTION], label=0))
    return Batch(**collator.fields())


@contextlib.contextmanager
def _as_it_was(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Give buffers and random states back as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for buffer, before in buffers:
        buffer.copy_(before)
