"""The training loop: read, step, log, save, evaluate. It knows no method.

The host runs ahead of the device. What a step computes, its loss, its norm, whether it was taken,
stays on the device until a log line, a checkpoint or an evaluation needs it.
"""

from __future__ import annotations

import itertools
import math
import resource
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from frugal.common.checkpoint.commit import BEST, read_best, step_of
from frugal.common.contracts import Batch
from frugal.common.distributed import Vote, barrier, gather_objects
from frugal.common.engine.digests import fetch_digests
from frugal.common.engine.divergence import (
    REWIND,
    Diverged,
    last_good,
    steps_in_row,
    steps_to_leave_out,
)
from frugal.common.engine.metrics import StepMetrics, Values, fetch
from frugal.common.engine.saving import restore
from frugal.common.engine.signals import StopSignal, WaitInterrupted
from frugal.common.engine.step import learning_rate_of, train_step
from frugal.common.engine.throughput import matmul_peak
from frugal.common.engine.training import Training
from frugal.common.errors import InputError, LossNotFinite, NotFiniteError, RunStopped
from frugal.common.files import write_json
from frugal.common.history import note, read_history
from frugal.common.randomness import seed_step
from frugal.common.recipe import Recipe
from frugal.common.run import Run

_GRACE = 10.0
"""Seconds that data may still come in after one of several processes was asked to stop."""


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
    with meter.paused("peak"):
        peak = matmul_peak(run.device, engine.dtype)
    vote = Vote(run.device)
    # alone there is nobody to stop together with
    with StopSignal(grace=0.0 if run.world_size == 1 else _GRACE) as stop_signal:
        first_step = training.first_step
        while first_step < recipe.steps:
            try:
                if first_step == training.first_step:
                    evaluate_if_missed(training)
                    _stop_if_nothing_gets_better(training, first_step)
                _take_steps(training, first_step, vote, stop_signal, peak)
                break
            except Diverged as found:
                diverged = found.step
            except NotFiniteError as error:
                diverged = _diverged_at(training, error)
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
    batches, ending = iter(training.stream), ""
    for step in range(first_step, recipe.steps):
        # anew for every step: a resumed run drops out what it would have dropped out
        seed_step(recipe.run.seed, step, run.rank)
        training.watchdog.wait_for_data(step + 1)
        micro_batches = _read_step(training, step, batches, stop_signal)
        training.watchdog.compute(step + 1)
        # every process hears the same answer, so that all of them stop after the same step
        ending = ending or next((batch.ends for batch in micro_batches if batch.ends), "")
        stops = vote.any(yes=stop_signal.asked or bool(ending))
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
            training.watchdog.note(f"saving step {done}", may_stand=True)
            training.save(done, is_last=is_last or is_too_damaged)
        if is_too_damaged:
            remedy = f": the same command then continues from step {done}"
            raise InputError(damage.sentence(remedy))
        if stops and done < recipe.steps:
            _stop(training, done, stop_signal, ending)
        # behind the checkpoint, so that nothing is lost where an evaluation fails or is killed
        if evaluates:
            evaluate(training, done)
            _stop_if_nothing_gets_better(training, done)


def _read_step(
    training: Training, step: int, batches: Iterator[Batch], stop_signal: StopSignal
) -> list[Batch]:
    """The micro-batches of a step, on the device.

    Of every micro-batch there are as many in a row as this process stands for virtual processes.

    Raises:
        InputError: if there is no data, or not in batches for virtual processes.
        NotFiniteError: if the model is to choose data and computes nothing.
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
    except NotFiniteError:  # of data that ask the model, on all processes alike: none is lacking
        raise
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
    is_readable = not (num_read and training.stream.state())
    # written once more, the newest checkpoint would be gone for a moment
    if can_save and is_readable and not training.has_saved(step):
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


def _stop(training: Training, step: int, stop_signal: StopSignal, ending: str) -> NoReturn:
    """End a run that was saved; every process calls this, after the same step.

    Args:
        training: what ends.
        step: that was taken last.
        stop_signal: what was asked of this process.
        ending: why the data of this process ends; usually nothing.

    Raises:
        InputError: where the data of a process ends.
        RunStopped: otherwise.
    """
    words = (
        f"after step {step}, with a checkpoint in {training.store.folder}; the same command "
        "continues from there"
    )
    for rank, reason in enumerate(gather_objects(ending)):
        if reason:
            raise InputError(f"process {rank}: {reason} (the run stopped {words})")
    raise RunStopped(f"stopped by {stop_signal.name} {words}", exit_code=stop_signal.exit_code)


def _is_evaluated(recipe: Recipe, step: int) -> bool:
    """Whether a run is evaluated after a step."""
    every = recipe.run.evaluate_every
    return step == recipe.steps or (every is not None and step % every == 0)


def evaluate(training: Training, step: int) -> None:
    """Evaluate after a step, and remember the checkpoint if it is the best one so far.

    Raises:
        InputError: if no evaluation knows the number that decides about that.
    """
    training.watchdog.note(f"evaluating step {step}")
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


def _stop_if_nothing_gets_better(training: Training, step: int) -> None:
    """End a run whose evaluations have brought no new best one for ``run.patience`` times.

    Every process calls this, after the same step; the checkpoints are there.

    Raises:
        RunStopped: with exit code 0.
    """
    recipe, run = training.recipe, training.run
    patience, every = recipe.run.patience, recipe.run.evaluate_every
    if patience is None or every is None or step >= recipe.steps:
        return
    best = read_best(training.store.folder) if run.is_main else {}
    best = gather_objects(best)[0]
    if not best or step // every - step_of(best["checkpoint"]) // every < patience:
        return
    training.watchdog.note("writing the last checkpoint", may_stand=True)
    training.saves.close()
    barrier()
    raise RunStopped(
        f"{patience} evaluations behind step {step_of(best['checkpoint'])} brought no higher "
        f"{best['number']} than its {best['value']:.4g}: the run ends after step {step} of "
        f"{recipe.steps} (run.patience); {training.store.folder / BEST} names the best checkpoint",
        exit_code=0,
    )


def evaluate_if_missed(training: Training) -> None:
    """Evaluate where a run was interrupted between a checkpoint and the evaluation behind it."""
    step = training.first_step
    if step > max(training.evaluator.last_step, 0) and _is_evaluated(training.recipe, step):
        evaluate(training, step)


def sync_metrics(training: Training) -> None:
    """Bring what is still on the device to the host, and count the steps that were skipped.

    Raises:
        LossNotFinite: if the gradient was not finite for ``run.max_skipped`` steps in a row.
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
    raise LossNotFinite(
        f"the loss was not finite for {training.skipped_in_row} steps in a row up to step "
        f"{step}, at a learning rate of {rate:.3g}, on the samples {', '.join(keys[:4])} "
        f"and others (all in {listing}); lower the learning rate, or look at these samples",
    )


def _diverged_at(training: Training, error: NotFiniteError) -> int:
    """The step after which a run has diverged whose model computes nothing outside of a step.

    Every process calls this, after the same step.

    Raises:
        NotFiniteError: as it is, where the run is not to go back.
    """
    if training.recipe.run.on_divergence != "rewind" or not training.done:
        raise error
    training.run.log.warning("%s", error)
    try:
        sync_metrics(training)
    except Diverged as found:
        return found.step
    return training.done


def _rewind(training: Training, diverged: int) -> int:
    """Go back to the last good checkpoint and leave out what led the run astray.

    Every process calls this, after the same step.

    Returns:
        The step of the checkpoint.

    Raises:
        LossNotFinite: if there is no such checkpoint.
    """
    run = training.run
    training.watchdog.note(f"going back from step {diverged}", may_stand=True)
    with training.meter.paused("checkpoint"):
        training.saves.finish()  # what is being written may be what there is to go back to
    history = gather_objects(read_history(run.dir))[0]
    # where the last step was finite, and what was computed behind it not, it is the one to doubt
    count = max(training.skipped_in_row, 1)
    not_finite = steps_in_row(diverged, count, training.left_out) or [diverged]
    checkpoint = last_good(
        training.store, before=not_finite[0], left_out=training.left_out, history=history
    )
    words = f"the loss was not finite for {count} steps in a row up to step {diverged}"
    if not training.skipped_in_row:
        words = f"the weights after step {diverged} are of no use"
    if checkpoint is None:
        raise LossNotFinite(
            f"{words}, and there is no checkpoint to go back to that a finite step "
            "followed; lower the learning rate or run.save-every, raise run.keep, or look at the "
            "samples (not_finite.json)",
        )
    step = checkpoint.step
    left_out = steps_to_leave_out(history, to=step, not_finite=not_finite)
    with training.meter.paused("rewind"):
        # what was lost since then is told already
        lost_before, seconds = training.lost_seconds, training.seconds
        lost = seconds + training.meter.seconds - checkpoint.state["seconds"]
        lost -= lost_before - checkpoint.state.get("lost_seconds", 0.0)
        if run.is_main:
            # first: whoever is killed in between goes back once more, to the same place
            training.store.drop_after(step)
            facts = {"to": step, "left_out": left_out, "lost_seconds": round(lost, 3)}
            note(run.dir, REWIND, step=diverged, **facts)
        restore(training.engine, checkpoint, training.average)
        training.load_state(checkpoint.state)
        # they were spent
        training.seconds, training.lost_seconds = seconds, lost_before + lost
        training.local_damage.clear()
        training.pending.clear()
        training.left_out |= set(left_out)
        assert training.reopen is not None
        training.stream = training.reopen(checkpoint)
        training.done = step
        training.logger.rewind(step)
        if training.digest_log is not None:
            training.digest_log.rewind(step)
    training.meter.take()  # the next line is of what comes from here on
    run.log.warning(
        "%s: going back to the checkpoint of step %d, without the samples of %d steps (%d to %d)",
        words, step, len(left_out), left_out[0], left_out[-1],
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
            "learning_rate": learning_rate_of(recipe, step - 1),
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
