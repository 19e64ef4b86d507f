"""One optimizer step: forward and backward of every micro-batch; the host reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from frugal.common.contracts import Batch
from frugal.common.engine.digests import digest_step
from frugal.common.engine.engine import Engine
from frugal.common.engine.metrics import StepMetrics, weighted_means
from frugal.common.engine.saving import WeightAverage
from frugal.common.engine.virtual import VirtualTrainer, step_of_virtual_processes
from frugal.common.objectives.gradient_cache import Wrapper, cached_backward
from frugal.common.recipe import Recipe


def train_step(
    engine: Engine,
    recipe: Recipe,
    step: int,
    micro_batches: list[Batch],
    average: WeightAverage | None = None,
) -> StepMetrics:
    """Forward and backward of every micro-batch, then one optimizer step; the host reads nothing.

    Args:
        engine: around the objective.
        recipe: of the run.
        step: steps that were done before.
        micro_batches: the samples of this process, on its device.
        average: of the weights, to be moved along.

    Returns:
        What the step reports, which may not be computed yet.
    """
    learning_rate = learning_rate_of(recipe, step)
    buffers = {name: buffer.clone() for name, buffer in engine.objective.named_buffers()}
    engine.objective.begin_step(micro_batches)
    if recipe.engine.virtual_processes is None:
        names, means = _backward(engine, recipe, micro_batches)
    else:

        def compute(
            trainer: VirtualTrainer, micro_batches: Sequence[Batch]
        ) -> tuple[list[str], torch.Tensor]:
            names, means = _backward(trainer, recipe, micro_batches)
            return names, trainer.mean(means)

        names, means = step_of_virtual_processes(engine, recipe, step, micro_batches, compute)
    digests = None
    if recipe.run.digests:
        digests = digest_step(engine, step + 1, micro_batches, recipe.engine.accumulate)
    norm = engine.step(learning_rate)  # (), not finite where nothing was changed
    # a skipped step must leave bounded and averaged weights too as they were, to the bit, and what
    # batch norm has seen; whether it was skipped is decided on the device, as reading the norm here
    # would end the run-ahead
    stepped = norm.isfinite()
    for name, buffer in engine.objective.named_buffers():
        buffer.copy_(torch.where(stepped, buffer, buffers[name]))
    engine.clamp(engine.objective.bounds(), stepped=stepped)
    if average is not None:
        average.update(stepped)
    return StepMetrics(
        step=step + 1,
        learning_rate=learning_rate,
        names=names,
        means=means,
        norm=norm.float(),
        keys=[key for batch in micro_batches for key in batch.keys],
        digests=digests,
    )


class _Trainer(Wrapper, Protocol):
    """What forward and backward passes go through: an engine, or a virtual process of one."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes of a small float tensor."""
        ...


def _backward(
    engine: _Trainer, recipe: Recipe, micro_batches: Sequence[Batch]
) -> tuple[list[str], torch.Tensor]:
    """Forward and backward of every micro-batch; names and means of what the objective reported."""
    weights = _micro_batch_weights(engine, micro_batches)  # (M,)
    reported = []
    for number, batch in enumerate(micro_batches):
        # gradients of the others stay on their process: one exchange per step, not per micro-batch
        is_last = number == len(micro_batches) - 1
        if (chunk := recipe.engine.cache_chunk) is not None:
            metrics = cached_backward(engine, batch, chunk, weights[number], last=is_last)
        else:
            with engine.accumulating(last=is_last):
                loss, metrics = engine.forward(batch)
                engine.backward(loss * weights[number])
            metrics = metrics | {"loss": loss.detach()}
        reported.append(metrics)
    return weighted_means(reported, weights)


def learning_rate_of(recipe: Recipe, step: int) -> float:
    """That of the step that begins after ``step`` steps."""
    return recipe.schedule.learning_rate(
        step * recipe.batch_size, peak=recipe.optimizer.peak(recipe.batch_size)
    )


def _micro_batch_weights(engine: _Trainer, micro_batches: Sequence[Batch]) -> torch.Tensor:
    """(M,) float64: the share of each micro-batch in all that counts, over all processes.

    So what counts weighs the same in a micro-batch with damaged samples as in one without.
    """
    if len(micro_batches) == 1:
        return micro_batches[0].valid.new_ones(1, dtype=torch.float64)
    # float64, because pixels with a class are more than float32 counts
    counted = torch.stack([engine.objective.counted(batch) for batch in micro_batches])
    counted = engine.mean(counted.double())
    # with nothing to count every share is 0, not NaN
    return counted / counted.sum().clamp(min=torch.finfo(torch.float64).tiny)
