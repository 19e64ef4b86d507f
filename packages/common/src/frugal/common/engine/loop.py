"""The training loop: read, step, log, save, evaluate. It knows no method."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.contracts import Batch, PreparedReduction, Stream
from frugal.common.data.damage import DamageCounter
from frugal.common.engine.backend import Engine
from frugal.common.engine.saving import WeightAverage, collect, gather_values
from frugal.common.engine.throughput import Meter, matmul_peak
from frugal.common.engine.watch import Watch
from frugal.common.errors import InputError, RunStopped
from frugal.common.objectives.gradient_cache import cached_backward
from frugal.common.randomness import seed_step
from frugal.common.recipe import Recipe, to_json
from frugal.common.run import LauncherChain, Run

Values = dict[str, float]


@dataclass(kw_only=True)
class Training:
    """Everything one process needs to train; built once by ``frugal.common.train``."""

    recipe: Recipe
    run: Run
    engine: Engine
    stream: Stream
    store: CheckpointStore
    watch: Watch
    average: WeightAverage | None
    evaluate: Callable[[int], dict[str, Any]]
    """Run the recipe's evaluations after a step; their numbers, alike on every process."""
    evaluated: float
    """The last step after which this run was evaluated."""
    draw: Callable[[Batch, int], None]
    """Put pictures of a batch into tensorboard after a step."""
    first_step: int
    seconds: float = 0.0
    """Time trained before this process started."""
    skipped_steps: int = 0
    skipped_in_row: int = 0
    damage: DamageCounter
    """Samples read and damaged in the whole run, over all processes."""
    unshared: DamageCounter
    """What this process has counted since it last told the others."""
    remarked: bool = False
    """Whether the image reduction had something to say at the last log step."""
    _started: float = field(default_factory=time.perf_counter)

    def share_damage(self) -> None:
        """Bring ``damage`` up to date on every process."""
        mine = self.unshared.state()
        self.unshared.load_state({})
        for part in gather_values(mine, self.run.world_size):
            self.damage.add(part["kinds"], part["read"])

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "step": step,
            "samples": step * self.recipe.batch_size,
            "updates": self.engine.updates,
            "skipped_steps": self.skipped_steps,
            "skipped_in_row": self.skipped_in_row,
            "damage": self.damage.state(),
            "stream": gather_values(self.stream.state(), self.run.world_size),
            "loss_scale": self.engine.scale_state(),
            "seconds": self.seconds + time.perf_counter() - self._started,
            "engine": self.engine.name,
            "world_size": self.run.world_size,
            "recipe": to_json(self.recipe),
        }

    def save(self, step: int) -> None:
        """Write a checkpoint; every process calls this."""
        self.share_damage()
        state = self.state(step)
        tensors = collect(self.engine, self.average)
        self.store.save(
            tensors, state, gather=lambda value: gather_values(value, self.run.world_size)
        )


def train(training: Training) -> None:
    """Run every step that is left.

    Raises:
        RunStopped: after SIGTERM or SIGINT, with a checkpoint written; or when the loss was not
            finite for ``run.max_skipped`` steps in a row.
    """
    recipe, run = training.recipe, training.run
    keeps_best = recipe.run.best is not None
    measure_what_was_missed(training)
    batches = iter(training.stream)
    meter = Meter()
    peak = matmul_peak(run.device, training.engine.dtype)
    with _Termination() as termination:
        for step in range(training.first_step, recipe.steps):
            seed_step(recipe.run.seed, step, run.rank)
            micro_batches = _read(batches, recipe, run, meter)
            values = _step(training, step, micro_batches, asked_to_stop=termination.asked)
            stop = values.pop("stop") > 0
            training.watch.advance()
            meter.add(values)
            done = step + 1
            is_last = done == recipe.steps
            if done % recipe.run.log_every == 0 or is_last or stop:
                _log(training, done, meter, peak)
            if done % recipe.run.picture_every == 0 or step == 0:
                training.draw(micro_batches[0], done)
            measured = _is_measured(recipe, done)
            if done % recipe.run.save_every == 0 or is_last or stop or (measured and keeps_best):
                training.save(done)
            if stop and not is_last:
                raise RunStopped(
                    f"stopped by {termination.name} after step {done}, with a checkpoint in "
                    f"{training.store.folder}; the same command continues from there",
                    exit_code=termination.exit_code,
                )
            if measured:
                measure(training, done)


def _is_measured(recipe: Recipe, step: int) -> bool:
    """Whether a run is evaluated after a step."""
    every = recipe.run.evaluate_every
    return step == recipe.steps or (every is not None and step % every == 0)


def measure(training: Training, step: int) -> None:
    """Evaluate after a step, and remember the checkpoint if it is the best one so far.

    Raises:
        InputError: if no evaluation knows the number that decides about that.
    """
    numbers = training.evaluate(step)
    best = training.recipe.run.best
    if best is None or not numbers:  # none of the evaluations was given data
        return
    if best not in numbers:
        raise InputError(
            f"run.best is {best!r}, which no evaluation of this run measures; choose from "
            f"{', '.join(numbers)}"
        )
    if training.run.is_main and training.store.note_best(step, best, numbers[best]):
        training.run.log.info("step %d is the best so far: %s %.4g", step, best, numbers[best])


def measure_what_was_missed(training: Training) -> None:
    """Evaluate where a run was interrupted between a checkpoint and the evaluation behind it."""
    step = training.first_step
    if step > max(training.evaluated, 0) and _is_measured(training.recipe, step):
        measure(training, step)


def _read(batches: Iterator[Batch], recipe: Recipe, run: Run, meter: Meter) -> list[Batch]:
    start = time.perf_counter()
    micro_batches = [next(batches) for _ in range(recipe.engine.accumulate)]
    meter.waited(time.perf_counter() - start)
    return [batch.to(run.device) for batch in micro_batches]


def _step(
    training: Training, step: int, micro_batches: list[Batch], *, asked_to_stop: bool
) -> Values:
    """One optimiser step; the means over processes of what the objective reports."""
    recipe, engine = training.recipe, training.engine
    rate = recipe.schedule.learning_rate(
        step * recipe.batch_size, peak=recipe.optimiser.peak(recipe.batch_size)
    )
    share = 1.0 / len(micro_batches)
    parts = []
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        parts.append(_accumulate(engine, recipe, batch, share, last=last))
        training.unshared.add(batch.damage, len(batch))
    norm = engine.step(rate)
    values = _mean_over_processes(engine, parts, asked_to_stop=asked_to_stop)
    if norm is None:
        _skipped(training, step, rate, micro_batches, values["loss"])
        # what is not finite is no part of any mean
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return finite | {"learning_rate": rate}
    training.skipped_in_row = 0
    engine.clamp(engine.objective.bounds())
    if training.average is not None:
        training.average.update()
    return values | {"learning_rate": rate, "gradient_norm": norm}


def _mean_over_processes(
    engine: Engine, parts: list[dict[str, torch.Tensor]], *, asked_to_stop: bool
) -> Values:
    """What the objective reported, averaged over micro-batches and processes; and the wish to stop.

    One small reduction and one wait for the device per step.
    """
    names = sorted(parts[0])
    rows = [torch.stack([part[name].float() for name in names]) for part in parts]
    local = torch.stack(rows).mean(dim=0)  # (metrics,)
    local = torch.cat([local, local.new_tensor([float(asked_to_stop)])])
    means = engine.mean(local).tolist()
    return dict(zip([*names, "stop"], means, strict=True))


def _accumulate(
    engine: Engine, recipe: Recipe, batch: Batch, share: float, *, last: bool
) -> dict[str, torch.Tensor]:
    """Forward and backward of one micro-batch; the detached numbers it reports."""
    if recipe.engine.cache_chunk is not None:
        return cached_backward(engine, batch, recipe.engine.cache_chunk, share, last=last)
    with engine.accumulating(last=last):
        loss, metrics = engine.forward(batch)
        engine.backward(loss * share)
    return metrics | {"loss": loss.detach()}


def _skipped(
    training: Training, step: int, rate: float, micro_batches: list[Batch], loss: float
) -> None:
    """Count a step whose gradient was not finite; stop after too many in a row."""
    training.skipped_steps += 1
    training.skipped_in_row += 1
    training.run.log.warning("step %d skipped: loss %s, the gradient is not finite", step + 1, loss)
    if training.skipped_in_row < training.recipe.run.max_skipped:
        return
    local = [key for batch in micro_batches for key in batch.keys]
    keys = [key for part in gather_values(local, training.run.world_size) for key in part]
    listing = training.run.dir / "not_finite.json"
    if training.run.is_main:
        listing.write_text(json.dumps({"step": step + 1, "learning_rate": rate, "keys": keys}))
    raise RunStopped(
        f"the loss was not finite for {training.skipped_in_row} steps in a row up to step "
        f"{step + 1}, at a learning rate of {rate:.3g}, on the samples {', '.join(keys[:4])} and "
        f"others (all in {listing}); lower the learning rate, or look at these samples",
        exit_code=1,
    )


def _log(training: Training, step: int, meter: Meter, peak: float) -> None:
    recipe, run = training.recipe, training.run
    means, step_seconds, wait = meter.take()
    training.share_damage()
    damage = training.damage
    flops = training.engine.objective.step_flops(means) * recipe.batch_size
    tokens = means.get("image_tokens", 0.0) + means.get("text_tokens", 0.0)
    samples = step * recipe.batch_size
    training.watch.scalars(
        step,
        {
            "samples": samples,
            **means,
            **training.stream.scalars(),
            "samples_per_second": recipe.batch_size / step_seconds,
            "tokens_per_second": tokens * recipe.batch_size / step_seconds,
            "data_wait": wait,
            "flops_per_second": flops / step_seconds,
            "share_of_peak": flops / step_seconds / (peak * run.world_size),
            "memory_bytes": _peak_memory(run),
            "eta_seconds": (recipe.steps - step) * step_seconds,
            "skipped_steps": training.skipped_steps,
            "read_samples": damage.read,
            "trained_samples": damage.read - damage.damaged,
            "damaged": dict(damage.kinds),
        },
    )
    damage.check()
    _remark(training, step, means)


def _remark(training: Training, step: int, means: Values) -> None:
    """Pass on what the image reduction has to say, when it begins to."""
    image = training.recipe.reduction.image
    words = image.remark(means) if isinstance(image, PreparedReduction) else None
    if words and not training.remarked:
        training.run.log.warning("step %d: %s", step, words)
    training.remarked = bool(words)


def _peak_memory(run: Run) -> int:
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Termination:
    """Turns SIGTERM, the first SIGINT and the loss of the launcher into a wish of the loop."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._launchers = LauncherChain()

    @property
    def asked(self) -> bool:
        return self._signal is not None or self._launchers.is_broken

    @property
    def name(self) -> str:
        """The signal seen here; another process may have seen it instead."""
        if self._signal is None and self._launchers.is_broken:
            return "the end of its launcher"
        return signal.Signals(self._signal or signal.SIGTERM).name

    @property
    def exit_code(self) -> int:
        return 128 + (self._signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        # a second Ctrl-C means it
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def __enter__(self) -> _Termination:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
