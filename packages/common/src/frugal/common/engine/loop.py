"""The training loop: read, step, log, save, evaluate. It knows no method.

The host runs ahead of the device. What a step computes, its loss, its norm, whether it was taken,
stays on the device until a log line, a checkpoint or an evaluation needs it.
"""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from frugal.common.checkpoint.background import BackgroundSaves
from frugal.common.checkpoint.store import Checkpoint, CheckpointStore
from frugal.common.contracts import Batch, Stream
from frugal.common.data.damage import DamageCounter, warning
from frugal.common.distributed import Vote, gather_objects
from frugal.common.engine.digests import digest_step, fetch_digests, weight_digests
from frugal.common.engine.divergence import (
    REWIND,
    Diverged,
    last_good,
    left_out_steps,
    steps_in_row,
    steps_to_leave_out,
)
from frugal.common.engine.engine import Engine
from frugal.common.engine.evaluator import Evaluator
from frugal.common.engine.logger import DigestLog, MetricsLogger
from frugal.common.engine.metrics import StepMetrics, Values, fetch, weighted_means
from frugal.common.engine.saving import WeightAverage, collect, layout, restore
from frugal.common.engine.signals import StopSignal, WaitInterrupted
from frugal.common.engine.throughput import Meter, matmul_peak
from frugal.common.engine.virtual import VirtualTrainer, step_of_virtual_processes
from frugal.common.engine.watchdog import Watchdog
from frugal.common.errors import InputError, RunStopped
from frugal.common.files import write_json
from frugal.common.history import note, read_history
from frugal.common.objectives.gradient_cache import Wrapper, cached_backward
from frugal.common.randomness import seed_step
from frugal.common.recipe import Recipe, to_json
from frugal.common.run import Run, process_began

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
    logger: MetricsLogger
    average: WeightAverage | None
    evaluator: Evaluator
    first_step: int
    watchdog: Watchdog
    reopen: Callable[[Checkpoint], Stream] | None = None
    """The stream from a checkpoint on, for a run that goes back to one."""
    left_out: set[int] = field(init=False)
    """Steps, counted from 1, whose samples are read and not trained on."""
    seconds: float = 0.0
    """Spent on steps before this process started."""
    skipped_steps: int = 0
    skipped_in_row: int = 0
    damage: DamageCounter = field(init=False)
    """Samples read and damaged in the whole run, over all processes."""
    local_damage: DamageCounter = field(init=False)
    """What this process has counted since it last told the others."""
    is_off_target: bool = False
    """Whether the image reduction had something to say at the last log step."""
    pending: list[StepMetrics] = field(default_factory=list)
    """Steps whose numbers are still on the device."""
    meter: Meter = field(init=False)
    saves: BackgroundSaves = field(init=False)
    done: int = field(init=False)
    """Steps of the run."""
    starting: float = field(init=False)
    """Seconds from the start of this process to its first step."""
    digest_log: DigestLog | None = field(init=False)
    _logged_damage: tuple[int, int] = field(init=False)
    """Samples lost and repaired when the log last told of them."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.run.device)
        self.saves = BackgroundSaves(self.store, max_failures=self.recipe.run.max_failed_saves)
        self.done = self.first_step
        self.starting = max(time.time() - process_began(), 0.0)
        self.left_out = left_out_steps(gather_objects(read_history(self.run.dir))[0])
        limit = self.recipe.data.max_damaged
        # a small data set is judged after one epoch
        patience = min(DamageCounter.patience, self.stream.epoch_samples)
        self.damage = DamageCounter(limit, patience=patience)
        self.local_damage = DamageCounter(limit)
        self._logged_damage = self._lost_and_repaired()
        self.digest_log = None
        if self.recipe.run.digests:
            self.digest_log = DigestLog(
                self.run, engine=self.engine.name, first_step=self.first_step
            )

    def _lost_and_repaired(self) -> tuple[int, int]:
        return self.damage.damaged + self.damage.lost, self.damage.repaired

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of what steps report, over the processes."""
        # virtual processes have told each other, and rounded once, in the order of their ranks
        return self.engine.mean(values) if self.recipe.engine.virtual_processes is None else values

    @property
    def source_names(self) -> tuple[str, ...]:
        """The entries of ``data.train``."""
        return self.recipe.data.source_names

    def count_damage(self, micro_batches: list[Batch]) -> None:
        """Count the samples of a step, and those of them that are damaged, on this process."""
        for batch in micro_batches:
            notes, sources = batch.damage_notes, batch.sources
            self.local_damage.add(batch.damage, len(batch), notes=notes, sources=sources)

    def share_damage(self) -> None:
        """Bring ``damage`` up to date on every process, and tell of what is new in kind."""
        counted = replace(self.local_damage)
        self.local_damage.clear()
        for part in gather_objects(counted):
            for new in self.damage.add_counter(part):
                self.run.log.warning("%s", warning(new, self.source_names))

    def log_damage(self, step: int) -> None:
        """Log how much is damaged, wherever that has grown, and what is repaired by powers of ten.

        ``damage`` must be up to date.
        """
        (lost_before, before), (lost, repaired) = self._logged_damage, self._lost_and_repaired()
        if lost > lost_before:
            self.run.log.warning("step %d: %s", step, self.damage.describe(self.source_names))
        elif repaired and (not before or len(str(repaired)) > len(str(before))):
            self.run.log.warning("step %d: %s samples repaired so far", step, f"{repaired:,}")
        else:
            return
        self._logged_damage = lost, repaired

    def spent(self) -> dict[str, float]:
        """What this process has spent its seconds on so far."""
        return {
            name: round(seconds, 3)
            for name, seconds in {"starting": self.starting, **self.meter.spent()}.items()
        }

    def note_end(self) -> None:
        """Note that this process ends, and what it spent its time on."""
        if not self.run.is_main:
            return
        try:
            note(self.run.dir, "ended", step=self.done, session_seconds=self.spent())
        except InputError as error:
            self.run.log.warning("%s", error)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting where :meth:`state` was taken; an empty one leaves everything at zero."""
        self.seconds = state.get("seconds", 0.0)
        self.skipped_steps = state.get("skipped_steps", 0)
        self.skipped_in_row = state.get("skipped_in_row", 0)
        self.damage.load_state(state.get("damage", {}))
        self._logged_damage = self._lost_and_repaired()

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

    def is_unsure_after(self, step: int) -> bool:
        """Whether a run that may go back has not seen a finite gradient in its last step."""
        may_go_back = self.recipe.run.on_divergence == "rewind"
        return may_go_back and (self.skipped_in_row > 0 or step in self.left_out)

    def save(self, step: int, *, is_last: bool) -> None:
        """Have a checkpoint written; every process calls this, and trains on.

        ``is_last``: no other follows, and this waits until it is written.
        """
        with self.meter.paused("checkpoint"):
            self.share_damage()
            state = self.state(step)
            copy = partial(self._copy, step)
            self.saves.save(layout(self.engine, self.average), copy, state, is_last=is_last)
            kept = self.store.whole()[-self.recipe.run.keep :]
            if self.digest_log is not None and len(kept) == self.recipe.run.keep:
                self.digest_log.forget_parts_before(int(kept[0].name.removeprefix("step_")))

    def _copy(self, step: int, into: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint, and note the digests of its weights before anybody writes them."""
        collect(self.engine, self.average, into)
        if self.digest_log is None:
            return
        names = [f"weight/{name}" for name, _ in self.engine.trainable()]
        digests = sum(gather_objects(weight_digests(into, names)))
        assert isinstance(digests, np.ndarray)
        self.digest_log.write_weights(step, digests)


def train(training: Training) -> None:
    """Run every step that is not done yet.

    Raises:
        RunStopped: after SIGTERM or SIGINT, with a checkpoint written; or when the loss was not
            finite for ``run.max_skipped`` steps in a row.
    """
    try:
        _train(training)
    finally:
        training.note_end()
    _log_seconds(training)


def _train(training: Training) -> None:
    recipe, run, meter, engine = training.recipe, training.run, training.meter, training.engine
    evaluate_if_missed(training)
    with meter.paused("peak"):
        peak = matmul_peak(run.device, engine.dtype)
    vote = Vote(run.device)
    # alone there is nobody to stop together with
    with StopSignal(grace=0.0 if run.world_size == 1 else _GRACE) as stop_signal:
        first_step = training.first_step
        while first_step < recipe.steps:
            try:
                _take_steps(training, first_step, vote, stop_signal, peak)
                break
            except Diverged as found:
                diverged = found.step
            # behind the handler, which would keep the old stream open
            first_step = _rewind(training, diverged)


def _take_steps(
    training: Training, first_step: int, vote: Vote, stop_signal: StopSignal, peak: float
) -> None:
    """Take every step from one on, as :func:`train`; ``peak`` is the FLOP/s of a process at best.

    Raises:
        Diverged: where the run is to go back.
    """
    recipe, run, meter = training.recipe, training.run, training.meter
    engine, damage = training.engine, training.damage
    batches = iter(training.stream)
    for step in range(first_step, recipe.steps):
        # anew for every step: a resumed run drops out what it would have dropped out
        seed_step(recipe.run.seed, step, run.rank)
        training.watchdog.wait_for_data(step + 1)
        micro_batches = _read_step(training, step, batches, stop_signal)
        training.watchdog.compute(step + 1)
        # every process hears the same answer, so that all of them stop after the same step
        stops = vote.any(yes=stop_signal.asked)
        training.count_damage(micro_batches)
        if step + 1 not in training.left_out:
            # on the device the step has only begun when this returns
            training.pending.append(
                train_step(engine, recipe, step, micro_batches, training.average)
            )
        training.logger.advance()
        done = training.done = step + 1
        is_last = done == recipe.steps or stops
        logs = done % recipe.run.log_every == 0 or is_last
        evaluates = _is_evaluated(recipe, done)
        saves = done % recipe.run.save_every == 0 or is_last
        # whichever of them turns out to be the best has to be there
        saves = saves or (evaluates and recipe.run.best is not None)
        # also before saving: a checkpoint tells how many steps were skipped
        if logs or saves or evaluates:
            sync_metrics(training)
        # amid steps that are not finite, or are left out, it would displace one to go back to
        saves = saves and (is_last or not training.is_unsure_after(done))
        if logs:
            _log_line(training, done, peak)
            training.saves.poll()
        # a small run is judged at its end, though it may not have read enough before
        is_too_damaged = logs and (
            damage.is_too_much or (done == recipe.steps and damage.was_too_much)
        )
        if done % recipe.run.picture_every == 0 or step == 0:
            with meter.paused("pictures"):
                training.logger.draw_batch(engine.objective, micro_batches[0], done)
        if saves or is_too_damaged:
            training.watchdog.note(f"saving step {done}")
            training.save(done, is_last=is_last or is_too_damaged)
        if is_too_damaged:
            remedy = f": the same command then continues from step {done}"
            raise InputError(damage.sentence(remedy))
        if stops and done < recipe.steps:
            raise RunStopped(
                f"stopped by {stop_signal.name} after step {done}, with a checkpoint in "
                f"{training.store.folder}; the same command continues from there",
                exit_code=stop_signal.exit_code,
            )
        # behind the checkpoint, so that nothing is lost where an evaluation fails or is killed
        if evaluates:
            training.watchdog.note(f"evaluating step {done}")
            evaluate(training, done)


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
    learning_rate = _learning_rate(recipe, step)
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
    # a skipped step must leave bounded and averaged weights too as they were, to the bit; whether
    # it was skipped is decided on the device, as reading the norm here would end the run-ahead
    stepped = norm.isfinite()
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


def _learning_rate(recipe: Recipe, step: int) -> float:
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


def _read_step(
    training: Training, step: int, batches: Iterator[Batch], stop_signal: StopSignal
) -> list[Batch]:
    """The micro-batches of a step, on the device.

    Of every micro-batch there are as many in a row as this process stands for virtual processes.

    Raises:
        InputError: if there is no data, or not in batches for virtual processes.
        RunStopped: if this process was asked to stop while it waited for data.
    """
    recipe, world_size = training.recipe, training.run.world_size
    needed = recipe.engine.accumulate * recipe.virtual_per_process(world_size)
    micro_batches: list[Batch] = []
    try:
        with stop_signal.interrupts(), training.meter.waiting():
            for batch in itertools.islice(batches, needed):
                micro_batches.append(batch)
        if len(micro_batches) < needed:
            raise InputError(
                "the training data ended before the run; look at what data.train names"
            )
    except (InputError, WaitInterrupted) as reason:
        _give_up(training, step, stop_signal, reason, num_read=len(micro_batches))
    samples = recipe.local_batch(world_size) // recipe.virtual_per_process(world_size)
    if recipe.engine.virtual_processes and len(micro_batches[0]) != samples:
        raise InputError(
            f"{type(recipe.data).__name__} gives a process {len(micro_batches[0])} samples at a "
            f"time, where each of engine.virtual_processes = {recipe.engine.virtual_processes} has "
            f"{samples}: this data knows of no virtual processes; leave them out"
        )
    return [batch.to(training.run.device) for batch in micro_batches]


def _give_up(
    training: Training,
    step: int,
    stop_signal: StopSignal,
    reason: InputError | WaitInterrupted,
    *,
    num_read: int,
) -> NoReturn:
    """End a run for which there is no data, with a checkpoint of the steps taken where it can be.

    Other processes may wait for this one in the middle of the step, and cannot help to write one;
    neither can a stream be continued of whose step a part was read.

    Raises:
        InputError: why there is no data.
        RunStopped: if this process was asked to stop.
    """
    can_save = training.run.world_size == 1 and step > training.first_step
    if can_save and not (num_read and training.stream.state()):
        sync_metrics(training)
        training.save(step, is_last=True)
    newest = training.store.newest()
    where = f"the newest checkpoint is {newest.folder}" if newest else "there is no checkpoint yet"
    if isinstance(reason, InputError):
        raise InputError(f"{reason} (the run stopped after step {step}; {where})") from None
    goes_on = "continues from there" if newest else "begins again"
    raise RunStopped(
        f"stopped by {stop_signal.name} after step {step} while waiting for data; {where}; the "
        f"same command {goes_on}",
        exit_code=stop_signal.exit_code,
    ) from None


def _is_evaluated(recipe: Recipe, step: int) -> bool:
    """Whether a run is evaluated after a step."""
    every = recipe.run.evaluate_every
    return step == recipe.steps or (every is not None and step % every == 0)


def evaluate(training: Training, step: int) -> None:
    """Evaluate after a step, and remember the checkpoint if it is the best one so far.

    Raises:
        InputError: if no evaluation knows the number that decides about that.
    """
    with training.meter.paused("evaluation"):
        numbers = training.evaluator.evaluate(step)
    best = training.recipe.run.best
    if best is None or not numbers:  # none of the evaluations was given data
        return
    if best not in numbers:
        raise InputError(
            f"run.best is {best!r}, which no evaluation of this run measures; choose from "
            f"{', '.join(numbers)}"
        )
    # only what is there can be the best one
    is_there = training.run.is_main and training.saves.settle() and training.store.holds(step)
    if is_there and training.store.note_best(step, best, numbers[best]):
        training.run.log.info("step %d is the best so far: %s %.4g", step, best, numbers[best])


def evaluate_if_missed(training: Training) -> None:
    """Evaluate where a run was interrupted between a checkpoint and the evaluation behind it."""
    step = training.first_step
    if step > max(training.evaluator.last_step, 0) and _is_evaluated(training.recipe, step):
        evaluate(training, step)


def sync_metrics(training: Training) -> None:
    """Bring what is still on the device to the host, and count the steps that were skipped.

    Raises:
        RunStopped: if the gradient was not finite for ``run.max_skipped`` steps in a row.
        Diverged: the same, where the run is to go back.
    """
    pending, training.pending = training.pending, []
    rows = fetch(pending, training.mean)
    if training.digest_log is not None:
        digests = [metrics.digests for metrics in pending if metrics.digests is not None]
        training.digest_log.write(fetch_digests(digests))
    for metrics, values in zip(pending, rows, strict=True):
        if not math.isfinite(values["gradient_norm"]):
            _count_skipped(training, metrics, values["loss"])
            # what is not finite is no part of any mean
            del values["gradient_norm"]
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        else:
            training.skipped_in_row = 0
        training.meter.add(values)


def _count_skipped(training: Training, metrics: StepMetrics, loss: float) -> None:
    """Count a step whose gradient was not finite; stop after too many in a row."""
    step = metrics.step
    training.skipped_steps += 1
    training.skipped_in_row += 1
    training.run.log.warning("step %d skipped: loss %s, the gradient is not finite", step, loss)
    options = training.recipe.run
    if training.skipped_in_row < options.max_skipped or options.on_divergence == "skip":
        return
    rate = metrics.learning_rate
    keys = [key for keys_of_rank in gather_objects(metrics.keys) for key in keys_of_rank]
    listing = training.run.dir / "not_finite.json"
    if training.run.is_main:
        try:
            write_json(listing, {"step": step, "learning_rate": rate, "keys": keys})
        except InputError as error:
            training.run.log.warning("%s", error)
    if options.digests:
        training.run.log.warning(
            "python -m frugal.common.replay %s --step %d computes that step again",
            training.run.dir,
            step,
        )
    if options.on_divergence == "rewind":
        raise Diverged(step)
    raise RunStopped(
        f"the loss was not finite for {training.skipped_in_row} steps in a row up to step "
        f"{step}, at a learning rate of {rate:.3g}, on the samples {', '.join(keys[:4])} "
        f"and others (all in {listing}); lower the learning rate, or look at these samples",
        exit_code=1,
    )


def _rewind(training: Training, diverged: int) -> int:
    """Go back to the last good checkpoint and leave out what led the run astray.

    Every process calls this, after the same step.

    Returns:
        The step of the checkpoint.

    Raises:
        RunStopped: if there is no such checkpoint.
    """
    run = training.run
    with training.meter.paused("checkpoint"):
        training.saves.finish()  # what is being written may be what there is to go back to
    history = gather_objects(read_history(run.dir))[0]
    not_finite = steps_in_row(diverged, training.skipped_in_row, training.left_out)
    checkpoint = last_good(training.store, before=not_finite[0], left_out=training.left_out)
    words = f"the loss was not finite for {training.skipped_in_row} steps in a row up to step"
    if checkpoint is None:
        raise RunStopped(
            f"{words} {diverged}, and there is no checkpoint to go back to that a finite step "
            "followed; lower the learning rate or run.save-every, raise run.keep, or look at the "
            "samples (not_finite.json)",
            exit_code=1,
        )
    step = checkpoint.step
    left_out = steps_to_leave_out(history, to=step, not_finite=not_finite)
    with training.meter.paused("rewind"):
        lost = training.seconds + training.meter.seconds - checkpoint.state["seconds"]
        if run.is_main:
            # first: whoever is killed in between goes back once more, to the same place
            training.store.drop_after(step)
            facts = {"to": step, "left_out": left_out, "lost_seconds": round(lost, 3)}
            note(run.dir, REWIND, step=diverged, **facts)
        restore(training.engine, checkpoint, training.average)
        seconds = training.seconds
        training.load_state(checkpoint.state)
        training.seconds = seconds  # they were spent
        training.local_damage.clear()
        training.pending.clear()
        training.left_out |= set(left_out)
        assert training.reopen is not None
        training.stream = training.reopen(checkpoint)
        training.logger.rewind(step)
        if training.digest_log is not None:
            training.digest_log.rewind(step)
    training.meter.take()  # the next line is of what comes from here on
    run.log.warning(
        "%s %d: going back to the checkpoint of step %d, without the samples of %d steps (%d to "
        "%d)",
        words, diverged, step, len(left_out), left_out[0], left_out[-1],
    )  # fmt: skip
    return step


def _log_line(training: Training, step: int, peak: float) -> None:
    """Log what happened since the last line; every process calls this after a sync.

    ``peak`` is the FLOP/s of one process at best.
    """
    recipe, run = training.recipe, training.run
    has_steps = training.meter.num_steps > 0
    interval = training.meter.take()
    if not has_steps:  # every step since the last line was left out
        return
    means, step_seconds = interval.means, interval.step_seconds
    training.share_damage()
    training.log_damage(step)
    flops = training.engine.objective.step_flops(means) * recipe.batch_size
    tokens = means.get("image_tokens", 0.0) + means.get("text_tokens", 0.0)
    damage = training.damage
    training.logger.scalars(
        step,
        {
            "samples": step * recipe.batch_size,
            **means,
            "learning_rate": _learning_rate(recipe, step - 1),
            "samples_per_second": recipe.batch_size / step_seconds,
            "tokens_per_second": tokens * recipe.batch_size / step_seconds,
            "data_wait": interval.wait,
            "flops_per_second": flops / step_seconds,
            "share_of_peak": flops / step_seconds / (peak * run.world_size),
            "memory_bytes": _peak_memory(run),
            "eta_seconds": (recipe.steps - step) * step_seconds,
            "skipped_steps": training.skipped_steps,
            "session_seconds": training.spent(),
            **{f"seconds/{name}": seconds for name, seconds in interval.pauses.items()},
            **training.stream.scalars(),
            "read_samples": damage.read,
            "trained_samples": damage.read - damage.damaged,
            "damaged": dict(damage.kinds),
            **_source_scalars(training),
        },
    )
    warn_if_off_target(training, step, means)


def _source_scalars(training: Training) -> dict[str, Any]:
    """What else is logged of the data, where there is anything to tell."""
    damage, names = training.damage, training.source_names
    counts = {"lost_samples": damage.lost, "repaired_samples": damage.repaired}
    scalars: dict[str, Any] = {name: count for name, count in counts.items() if count}
    if len(names) > 1:
        scalars["source_shares"] = {names[n]: share for n, share in damage.shares().items()}
    return scalars


def warn_if_off_target(training: Training, step: int, means: Values) -> None:
    """Pass on what the image reduction has to say of the means, when it begins to."""
    words = training.recipe.reduction.image.off_target(means)
    if words and not training.is_off_target:
        training.run.log.warning("step %d: %s", step, words)
    training.is_off_target = bool(words)


def _log_seconds(training: Training) -> None:
    """Log what a run spent its time on beside its steps."""
    training.run.log.info(
        "%.1f s of steps; beside them %s",
        training.meter.seconds,
        ", ".join(f"{name} {sec:.1f} s" for name, sec in training.meter.paused_seconds.items()),
    )


def _peak_memory(run: Run) -> int:
    """The most bytes that this process has held so far, on its device."""
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
