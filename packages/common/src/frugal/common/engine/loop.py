"""The training loop: read, step, log, save, evaluate. It knows no method.

The host runs ahead of the device. What a step computes, its loss, its norm, whether it was taken,
stays on the device until a log line, a checkpoint or an evaluation needs it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.contracts import Batch, Stream
from frugal.common.data.damage import DamageCounter, warning
from frugal.common.distributed import Vote, gather_objects
from frugal.common.engine.engine import Engine
from frugal.common.engine.logger import MetricsLogger
from frugal.common.engine.metrics import Step, Values, read
from frugal.common.engine.saving import WeightAverage, collect
from frugal.common.engine.signals import StopSignal, WaitInterrupted
from frugal.common.engine.throughput import Meter, matmul_peak
from frugal.common.errors import InputError, RunStopped
from frugal.common.files import write_json
from frugal.common.objectives.gradient_cache import cached_backward
from frugal.common.randomness import seed_step
from frugal.common.recipe import Recipe, to_json
from frugal.common.run import Run

_GRACE = 10.0
"""Seconds that data may still come in after one of several processes was asked to stop."""


@dataclass(kw_only=True)
class Training:
    """Everything one process needs to train; built once by ``frugal.common.train``."""

    recipe: Recipe
    run: Run
    engine: Engine
    stream: Stream
    store: CheckpointStore
    watch: MetricsLogger
    average: WeightAverage | None
    evaluate: Callable[[int], dict[str, Any]]
    """Run the recipe's evaluations after a step; their numbers, alike on every process."""
    evaluated: float
    """The last step after which this run was evaluated."""
    draw: Callable[[Batch, int], None]
    """Put pictures of a batch into tensorboard after a step."""
    first_step: int
    seconds: float = 0.0
    """Spent on steps before this process started."""
    skipped_steps: int = 0
    skipped_in_row: int = 0
    damage: DamageCounter
    """Samples read and damaged in the whole run, over all processes."""
    unshared: DamageCounter
    """What this process has counted since it last told the others."""
    remarked: bool = False
    """Whether the image reduction had something to say at the last log step."""
    unread: list[Step] = field(default_factory=list)
    """Steps whose numbers are still on the device."""
    meter: Meter = field(init=False)
    _told: tuple[int, int] = field(init=False)
    """Samples lost and repaired when the log last told of them."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.run.device)
        self._told = self._odd_samples()

    def _odd_samples(self) -> tuple[int, int]:
        return self.damage.damaged + self.damage.lost, self.damage.repaired

    def tell_damage(self, step: int) -> None:
        """Log how much is damaged, wherever that has grown, and what is repaired by powers of ten.

        ``damage`` must be up to date.
        """
        (lost_before, before), (lost, repaired) = self._told, self._odd_samples()
        if lost > lost_before:
            self.run.log.warning("step %d: %s", step, self.damage.describe(self.source_names))
        elif repaired and (not before or len(str(repaired)) > len(str(before))):
            self.run.log.warning("step %d: %s samples repaired so far", step, f"{repaired:,}")
        else:
            return
        self._told = lost, repaired

    def share_damage(self) -> None:
        """Bring ``damage`` up to date on every process, and tell of what is new in kind."""
        mine = replace(self.unshared)
        self.unshared.clear()
        for part in gather_objects(mine):
            for note in self.damage.add_counter(part):
                self.run.log.warning("%s", warning(note, self.source_names))

    @property
    def source_names(self) -> tuple[str, ...]:
        """The entries of ``data.train``."""
        return self.recipe.data.source_names

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "step": step,
            "samples": step * self.recipe.batch_size,
            "updates": self.engine.updates,
            "skipped_steps": self.skipped_steps,
            "skipped_in_row": self.skipped_in_row,
            "damage": self.damage.state(),
            "stream": gather_objects(self.stream.state()),
            "loss_scale": self.engine.scale_state(),
            "seconds": self.seconds + self.meter.seconds,
            "engine": self.engine.name,
            "world_size": self.run.world_size,
            "recipe": to_json(self.recipe),
        }

    def save(self, step: int) -> None:
        """Write a checkpoint; every process calls this."""
        with self.meter.paused("checkpoint"):
            self.share_damage()
            state = self.state(step)
            tensors = collect(self.engine, self.average)
            self.store.save(tensors, state)


def train(training: Training) -> None:
    """Run every step that is left.

    Raises:
        RunStopped: after SIGTERM or SIGINT, with a checkpoint written; or when the loss was not
            finite for ``run.max_skipped`` steps in a row.
    """
    recipe, run, meter = training.recipe, training.run, training.meter
    keeps_best = recipe.run.best is not None
    measure_what_was_missed(training)
    with meter.paused("peak"):
        peak = matmul_peak(run.device, training.engine.dtype)
    batches = iter(training.stream)
    vote = Vote(run.device)
    # alone there is nobody to stop together with
    with StopSignal(grace=0.0 if run.world_size == 1 else _GRACE) as termination:
        for step in range(training.first_step, recipe.steps):
            seed_step(recipe.run.seed, step, run.rank)
            micro_batches: list[Batch] = []
            try:
                with termination.interrupts():
                    _read(micro_batches, batches, recipe, meter)
            except (InputError, WaitInterrupted) as reason:
                _give_up(training, step, termination, reason, read=len(micro_batches))
            micro_batches = [batch.to(run.device) for batch in micro_batches]
            stop = vote.any(yes=termination.asked)
            training.unread.append(_step(training, step, micro_batches))
            training.watch.advance()
            done = step + 1
            ends = done == recipe.steps or stop
            logs = done % recipe.run.log_every == 0 or ends
            measured = _is_measured(recipe, done)
            saves = done % recipe.run.save_every == 0 or ends or (measured and keeps_best)
            if logs or saves or measured:
                _settle(training)
            if logs:
                _log(training, done, peak)
            damage = training.damage
            too_much = logs and (
                damage.is_too_much or (done == recipe.steps and damage.was_too_much)
            )
            saves = saves or too_much
            if done % recipe.run.picture_every == 0 or step == 0:
                with meter.paused("pictures"):
                    training.draw(micro_batches[0], done)
            if saves:
                training.save(done)
            if too_much:
                remedy = f": the same command then continues from step {done}"
                raise InputError(damage.sentence(remedy))
            if stop and done < recipe.steps:
                raise RunStopped(
                    f"stopped by {termination.name} after step {done}, with a checkpoint in "
                    f"{training.store.folder}; the same command continues from there",
                    exit_code=termination.exit_code,
                )
            if measured:
                measure(training, done)
    _tell_pauses(training)


def _is_measured(recipe: Recipe, step: int) -> bool:
    """Whether a run is evaluated after a step."""
    every = recipe.run.evaluate_every
    return step == recipe.steps or (every is not None and step % every == 0)


def measure(training: Training, step: int) -> None:
    """Evaluate after a step, and remember the checkpoint if it is the best one so far.

    Raises:
        InputError: if no evaluation knows the number that decides about that.
    """
    with training.meter.paused("evaluation"):
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


def _read(
    micro_batches: list[Batch], batches: Iterator[Batch], recipe: Recipe, meter: Meter
) -> None:
    """Put the micro-batches of a step into a list, which holds those that came if one does not."""
    with meter.waiting():
        for batch in itertools.islice(batches, recipe.engine.accumulate):
            micro_batches.append(batch)
    if len(micro_batches) < recipe.engine.accumulate:
        raise InputError("the training data ended before the run; look at what data.train names")


def _give_up(
    training: Training,
    step: int,
    termination: StopSignal,
    reason: InputError | WaitInterrupted,
    *,
    read: int,
) -> NoReturn:
    """End a run for which there is no data, with a checkpoint of the steps taken where it can be.

    Other processes may wait for this one in the middle of the step, and cannot help to write one;
    neither can a stream be continued of whose step a part was read.

    Raises:
        InputError: why there is no data.
        RunStopped: if this process was asked to stop.
    """
    saved = training.run.world_size == 1 and step > training.first_step
    saved = saved and not (read and training.stream.state())
    if saved:
        _settle(training)
        training.save(step)
    newest = training.store.newest()
    left = f"the newest checkpoint is {newest.folder}" if newest else "there is no checkpoint yet"
    if isinstance(reason, InputError):
        raise InputError(f"{reason} (the run stopped after step {step}; {left})") from None
    goes_on = "continues from there" if newest else "begins again"
    raise RunStopped(
        f"stopped by {termination.name} after step {step} while waiting for data; {left}; the same "
        f"command {goes_on}",
        exit_code=termination.exit_code,
    ) from None


def _step(training: Training, step: int, micro_batches: list[Batch]) -> Step:
    """One optimizer step; what is known of it before the device has taken it."""
    recipe, engine = training.recipe, training.engine
    rate = recipe.schedule.learning_rate(
        step * recipe.batch_size, peak=recipe.optimizer.peak(recipe.batch_size)
    )
    for batch in micro_batches:
        notes, sources = batch.damage_notes, batch.sources
        training.unshared.add(batch.damage, len(batch), notes=notes, sources=sources)
    parts, shares = accumulate(engine, recipe, micro_batches)
    norm = engine.step(rate)
    stepped = norm.isfinite()
    engine.clamp(engine.objective.bounds(), stepped=stepped)
    if training.average is not None:
        training.average.update(stepped)
    keys = [batch.keys for batch in micro_batches]
    return Step.of(parts, shares, number=step + 1, learning_rate=rate, norm=norm, keys=keys)


def accumulate(
    engine: Engine, recipe: Recipe, micro_batches: list[Batch]
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Forward and backward of every micro-batch of a step.

    Returns:
        The detached numbers that each reports, and (M,) float64: its share in the loss of the step.
    """
    shares = _shares(engine, micro_batches)
    last = len(micro_batches) - 1
    parts = [
        _accumulate(engine, recipe, batch, shares[number], last=number == last)
        for number, batch in enumerate(micro_batches)
    ]
    return parts, shares


def _shares(engine: Engine, micro_batches: list[Batch]) -> torch.Tensor:
    """(M,) float64: the part that each micro-batch has in all that counts, over all processes.

    So what counts weighs the same in a micro-batch with damaged samples as in one without.
    """
    if len(micro_batches) == 1:
        return micro_batches[0].valid.new_ones(1, dtype=torch.float64)
    counted = torch.stack([engine.objective.counted(batch) for batch in micro_batches])
    counted = engine.mean(counted.double())
    return counted / counted.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _accumulate(
    engine: Engine, recipe: Recipe, batch: Batch, share: torch.Tensor, *, last: bool
) -> dict[str, torch.Tensor]:
    """Forward and backward of one micro-batch; the detached numbers it reports."""
    if recipe.engine.cache_chunk is not None:
        return cached_backward(engine, batch, recipe.engine.cache_chunk, share, last=last)
    with engine.accumulating(last=last):
        loss, metrics = engine.forward(batch)
        engine.backward(loss * share)
    return metrics | {"loss": loss.detach()}


def _settle(training: Training) -> None:
    """Bring what is still on the device to the host, and draw the conclusions step by step.

    Raises:
        RunStopped: if the gradient was not finite for ``run.max_skipped`` steps in a row.
    """
    steps, training.unread = training.unread, []
    for step, values in zip(steps, read(steps, training.engine.mean), strict=True):
        if not math.isfinite(values["gradient_norm"]):
            _skipped(training, step, values["loss"])
            # what is not finite is no part of any mean
            del values["gradient_norm"]
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        else:
            training.skipped_in_row = 0
        training.meter.add(values | {"learning_rate": step.learning_rate})


def _skipped(training: Training, step: Step, loss: float) -> None:
    """Count a step whose gradient was not finite; stop after too many in a row."""
    training.skipped_steps += 1
    training.skipped_in_row += 1
    training.run.log.warning(
        "step %d skipped: loss %s, the gradient is not finite", step.number, loss
    )
    if training.skipped_in_row < training.recipe.run.max_skipped:
        return
    rate = step.learning_rate
    local = [key for keys in step.keys for key in keys]
    keys = [key for part in gather_objects(local) for key in part]
    listing = training.run.dir / "not_finite.json"
    if training.run.is_main:
        content = {"step": step.number, "learning_rate": rate, "keys": keys}
        try:
            write_json(listing, content)
        except InputError as error:
            training.run.log.warning("%s", error)
    raise RunStopped(
        f"the loss was not finite for {training.skipped_in_row} steps in a row up to step "
        f"{step.number}, at a learning rate of {rate:.3g}, on the samples {', '.join(keys[:4])} "
        f"and others (all in {listing}); lower the learning rate, or look at these samples",
        exit_code=1,
    )


def _log(training: Training, step: int, peak: float) -> None:
    recipe, run = training.recipe, training.run
    line = training.meter.take()
    means, step_seconds = line.means, line.step_seconds
    damage = training.damage
    training.share_damage()
    training.tell_damage(step)
    flops = training.engine.objective.step_flops(means) * recipe.batch_size
    tokens = means.get("image_tokens", 0.0) + means.get("text_tokens", 0.0)
    samples = step * recipe.batch_size
    training.watch.scalars(
        step,
        {
            "samples": samples,
            **means,
            "samples_per_second": recipe.batch_size / step_seconds,
            "tokens_per_second": tokens * recipe.batch_size / step_seconds,
            "data_wait": line.wait,
            "flops_per_second": flops / step_seconds,
            "share_of_peak": flops / step_seconds / (peak * run.world_size),
            "memory_bytes": _peak_memory(run),
            "eta_seconds": (recipe.steps - step) * step_seconds,
            "skipped_steps": training.skipped_steps,
            **{f"seconds/{name}": seconds for name, seconds in line.pauses.items()},
            **training.stream.scalars(),
            "read_samples": damage.read,
            "trained_samples": damage.read - damage.damaged,
            "damaged": dict(damage.kinds),
            **_of_sources(training),
        },
    )
    _remark(training, step, means)


def _of_sources(training: Training) -> dict[str, Any]:
    """What else is logged of the data, where there is anything to tell."""
    damage, names = training.damage, training.source_names
    odd = {"lost_samples": damage.lost, "repaired_samples": damage.repaired}
    found: dict[str, Any] = {name: count for name, count in odd.items() if count}
    if len(names) > 1:
        found["source_shares"] = {names[n]: share for n, share in damage.shares().items()}
    return found


def _tell_pauses(training: Training) -> None:
    """What a run spent its time on beside its steps."""
    training.run.log.info(
        "%.1f s of steps; beside them %s",
        training.meter.seconds,
        ", ".join(f"{name} {sec:.1f} s" for name, sec in training.meter.paused_seconds.items()),
    )


def _remark(training: Training, step: int, means: Values) -> None:
    """Pass on what the image reduction has to say, when it begins to."""
    words = training.recipe.reduction.image.off_target(means)
    if words and not training.remarked:
        training.run.log.warning("step %d: %s", step, words)
    training.remarked = bool(words)


def _peak_memory(run: Run) -> int:
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
