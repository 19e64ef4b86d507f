"""Recompute steps of a run, and say whether they come out bit for bit as they did.

``torchrun --nproc_per_node 2 -m frugal.common.replay RUN --step 1234`` restores the newest
checkpoint before a step, takes the steps up to it once more, and compares the digests of samples,
gradients and weights with those that ``--run.digests`` has noted. Where they differ it says from
which step on, in which samples or parameters, and what that can come from. Nothing is written into
the run directory. Exit code 0: they agree; 1: they do not.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from shutil import copytree, ignore_patterns
from string import hexdigits
from typing import Any

import numpy as np
import tyro

from frugal.common.checkpoint.commit import step_of, whole_checkpoints
from frugal.common.checkpoint.init_from import init_from
from frugal.common.checkpoint.manifest import data_of
from frugal.common.checkpoint.store import Checkpoint, first_whole
from frugal.common.cli import command_words, run_politely, without_local_rank
from frugal.common.data.config import StoredData
from frugal.common.data.contents import also_noted, changed_besides, differences_since
from frugal.common.distributed import gather_objects, launcher_ranks
from frugal.common.engine.calibration import calibrate_reduction
from frugal.common.engine.deterministic import deterministic_kernels
from frugal.common.engine.digests import (
    GROUPS,
    StepDigests,
    current_weight_digests,
    digest_all,
    fetch_digests,
    from_hex,
)
from frugal.common.engine.divergence import REWIND, left_out_before
from frugal.common.engine.logger import DETAILED_DIGESTS, DIGESTS
from frugal.common.engine.metrics import fetch
from frugal.common.engine.saving import restore
from frugal.common.engine.step import train_step
from frugal.common.engine.watchdog import Watchdog
from frugal.common.errors import InputError, RunStopped
from frugal.common.files import LARGEST_FILE, read_json_lines, read_json_object
from frugal.common.history import FILE as HISTORY
from frugal.common.history import read_history
from frugal.common.randomness import seed_step
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import difference, from_json, load_recipe, recipe_if_whole
from frugal.common.run import Run, make_logger, open_run
from frugal.common.train import environment_of, make_engine, stream_state

_SHOWN = 8
"""Names of parameters or samples that are listed."""
_NOT_READ = ("checkpoints", "tensorboard", "evaluation", "*.jsonl", ".lock", "report.*")
"""What lies in a run directory and no step is computed from."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Recompute steps of a run and compare them with what its digests say."""

    run: tyro.conf.Positional[Path]
    """A run directory, of a run with --run.digests."""
    step: int
    """The last step to recompute, counted as in the log. The checkpoint before it is restored."""
    train: tuple[str, ...] = ()
    """Where the data of the run lie now; without it where they lay when the step was taken."""


@dataclass(frozen=True)
class Noted:
    """What a run noted of its steps, by the number of the step."""

    steps: dict[int, dict[str, Any]]
    """Digests of all samples and of the gradient, number of processes, engine."""
    parts: dict[int, dict[str, np.ndarray]]
    """(P,) ``parameters``, (P,) ``weights`` and (G,) ``samples`` uint64, where they are kept."""

    @classmethod
    def read(cls, folder: Path, log: logging.Logger) -> Noted:
        """What is in a run directory; lines that are none are left out, and counted in the log."""
        steps = {line["step"]: line for line in _lines(folder / DIGESTS, _is_step, log)}
        parts: dict[int, dict[str, np.ndarray]] = {}
        for line in _lines(folder / DETAILED_DIGESTS, _is_of_parts, log):
            digits = {name: from_hex(line[name]) for name in _PARTS if name in line}
            parts.setdefault(line["step"], {}).update(digits)
        return cls(steps, parts)

    def contradiction(self, found: Difference) -> str:
        """What the two files say of a step and cannot both be so, in words; or nothing.

        The digest of a gradient follows from those of its parameters, which were written with it.
        """
        line, parts = self.steps.get(found.step, {}), self.parts.get(found.step, {})
        gradient, batch = parts.get("parameters"), parts.get("samples")
        if found.what not in ("gradient", "samples") or not parts:
            return ""
        agree = gradient is None or digest_all(gradient) == line["gradient"]
        # of larger batches there are digests of groups, of which that of all does not follow
        if batch is not None and len(batch) < GROUPS:
            agree &= digest_all(batch) == line["samples"]
        if found.places != [] and agree:
            return ""
        return (
            f"{DIGESTS} and {DETAILED_DIGESTS} contradict each other about step {found.step}: one "
            "of them was altered after the run had written it"
        )


_PARTS = ("parameters", "weights", "samples")


_DIGITS = 16
"""Of a digest."""
_MOST_PROCESSES = 1 << 20


def _is_step(line: dict[str, Any]) -> bool:
    digests = (line.get("gradient"), line.get("samples"))
    processes, engine = line.get("processes"), line.get("engine")
    return (
        all(_num_digests(each) == 1 for each in digests)
        and type(processes) is int
        and 0 < processes < _MOST_PROCESSES
        and isinstance(engine, str)
        and engine.isprintable()
        and bool(engine)
    )


def _is_of_parts(line: dict[str, Any]) -> bool:
    there = [line[name] for name in _PARTS if name in line]
    return bool(there) and all(_num_digests(each) for each in there)


def _num_digests(digits: Any) -> int:
    """How many digests there are in the place of some; 0 where there is something else."""
    if not isinstance(digits, str) or len(digits) % _DIGITS or set(digits) - set(hexdigits):
        return 0
    return len(digits) // _DIGITS


def _lines(
    path: Path, is_whole: Callable[[dict[str, Any]], bool], log: logging.Logger
) -> list[dict[str, Any]]:
    found, unreadable = read_json_lines(path)
    lines = [line for line in found if type(line.get("step")) is int and is_whole(line)]
    if damaged := unreadable + len(found) - len(lines):
        log.warning("%s: %d lines are damaged; the others are compared", path, damaged)
    return lines


@dataclass(frozen=True)
class Recomputed:
    """One step, taken once more."""

    digests: StepDigests
    weights: np.ndarray | None
    """(P,) uint64 of the weights after it, where the run noted those."""
    keys: list[str]
    """Of the samples, in the order of the batch."""
    loss: float
    gradient_norm: float


class Replay:
    """A part of a run that can be computed again and again."""

    def __init__(
        self,
        folder: Path,
        last: int,
        run: Run,
        *,
        history: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
        recipe: Recipe,
    ) -> None:
        """Build the parts of a run.

        Args:
            folder: the run directory.
            last: the step to end with.
            run: this process, in a directory of its own.
            history: of the run.
            checkpoint: to begin with; None for the run's beginning.
            recipe: of the steps behind it.

        Raises:
            InputError: if there is nothing to compare with, or the run was computed otherwise.
        """
        self.noted = Noted.read(folder, run.log)
        self.run, self.last = run, last
        self.history, self.checkpoint, self.recipe = history, checkpoint, recipe
        rewinds = _without_half_a_rewind(history, self.noted)
        if len(rewinds) < len(history):
            run.log.warning(
                "%s was killed while it went back to an earlier checkpoint, or %s was altered: "
                "steps are computed as %s has them", folder, HISTORY, DIGESTS,
            )  # fmt: skip
        self.left_out, self.went_back = left_out_before(rewinds, last)
        """The steps that were left out when the last one was taken, and whether that one is now."""
        self.end: Recomputed | None = None
        """The last step, once it was computed."""
        self.first = self.checkpoint.step if self.checkpoint else 0
        if not 1 <= last <= self.recipe.steps:
            raise InputError(f"--step is {last}, and {folder} has steps 1 to {self.recipe.steps}")
        self._check_noted(folder)
        objective = self.recipe.objective.build(self.recipe)
        if self.checkpoint is None:
            source, interpolate = self.recipe.run.start_from, self.recipe.run.interpolate
            init_from(objective, source, interpolate=interpolate, log=run.log)
        self.engine = make_engine(objective, self.recipe, run)
        minutes = self.recipe.run.stall_minutes
        self.watchdog = Watchdog(run, minutes=minutes, remedy="run.stall_minutes of the run")
        self._check_engine()
        self.names = [name for name, _ in self.engine.trainable()]
        self.told = data_of(checkpoint.folder) if checkpoint else _told_by_any(folder)
        """What a checkpoint says of the data, where the run does not."""
        self.contents: Any = ()
        """Of the data, once a step was computed."""
        self._is_used = False

    def _check_noted(self, folder: Path) -> None:
        first, last = self.first + 1, self.last
        if self.compared and last not in self.compared and not self.went_back:
            raise InputError(
                f"step {last} of {folder} has no digest in {DIGESTS}, so that there is nothing to "
                f"compare with; choose another, such as {max(self.compared)}"
            )
        if not self.compared and not self.went_back:
            raise InputError(
                f"{folder} has no digests of steps {first} to {last} to compare with ({DIGESTS}); "
                "they are noted with --run.digests"
            )
        if untaken := sorted(self.left_out & self.compared.keys()):
            raise InputError(
                f"{HISTORY} and {DIGESTS} in {folder} contradict each other about step "
                f"{untaken[0]}, which one of them leaves out and the other has: one was altered"
            )
        if self.recipe.engine.virtual_processes is not None:
            return  # the same bits on any number of processes
        processes = {line["processes"] for line in self.compared.values()}
        if processes - {self.run.world_size}:
            known = min(processes - {self.run.world_size})
            raise InputError(
                f"steps {self.first + 1} to {self.last} were taken by {known} processes, and here "
                f"{self.run.world_size} would add up in another order; start this command with a "
                f"launcher of as many, as torchrun --nproc_per_node {known} -m frugal.common.replay"
            )

    def _check_engine(self) -> None:
        engines = {line["engine"] for line in self.compared.values()}
        rounding, here = engines, self.engine.name
        if self.recipe.engine.virtual_processes is not None:  # any engine with the same kernels
            rounding, here = {_kernels_of(engine) for engine in engines}, _kernels_of(here)
        if rounding - {here}:
            raise InputError(
                f"steps {self.first + 1} to {self.last} were taken by {' and '.join(engines)}, "
                f"and the recipe of the newest checkpoint makes it {self.engine.name}; choose a "
                "step after the last change of the engine"
            )

    @property
    def compared(self) -> dict[int, dict[str, Any]]:
        """What the run noted of the steps that are recomputed."""
        steps = range(self.first + 1, self.last + 1)
        return {step: self.noted.steps[step] for step in steps if step in self.noted.steps}

    def holes_before(self, step: int) -> list[int]:
        """Steps that are recomputed before one, of which the run noted nothing."""
        taken = set(range(self.first + 1, step)) - self.left_out
        return sorted(taken - self.noted.steps.keys())

    def begin(self) -> None:
        """Put the weights of the checkpoint back; those of an initialization come once."""
        if self.checkpoint is not None:
            restore(self.engine, self.checkpoint, None)
            self.recipe = calibrate_reduction(self.recipe, self.run, self.engine, self.checkpoint)
        elif self._is_used:
            raise AssertionError("an initialization is not there twice")
        else:
            self.recipe = calibrate_reduction(self.recipe, self.run, self.engine, None)
        self._is_used = True

    @property
    def can_begin_again(self) -> bool:
        """Whether the steps can be computed a second time."""
        return self.checkpoint is not None

    def weights(self) -> np.ndarray:
        """(P,) uint64 of the weights as they are; every process calls this."""
        return current_weight_digests(self.engine)

    def steps(self) -> Iterator[Recomputed]:
        """Take the steps from the checkpoint on; every process goes through all of them."""
        recipe, run, engine = self.recipe, self.run, self.engine
        saved = self.checkpoint.state.get("stream", []) if self.checkpoint else []
        stream = recipe.data.build(
            recipe,
            run,
            first_sample=self.first * recipe.batch_size,
            state=stream_state(recipe, run, saved),
            engine=engine,
        )
        self.contents = stream.contents
        batches, count = iter(stream), recipe.virtual_per_process(run.world_size)
        for step in range(self.first, self.last):
            seed_step(recipe.run.seed, step, run.rank)
            self.watchdog.wait_for_data(step + 1)
            micro_batches = [
                batch.to(run.device) for batch in islice(batches, recipe.engine.accumulate * count)
            ]
            self.watchdog.compute(step + 1)
            if step + 1 in self.left_out:
                continue
            metrics = train_step(engine, recipe, step, micro_batches)
            values = fetch([metrics], engine.mean)[0]
            assert metrics.digests is not None
            has_weights = "weights" in self.noted.parts.get(step + 1, {})
            self.end = Recomputed(
                digests=fetch_digests([metrics.digests])[0],
                weights=self.weights() if has_weights else None,
                keys=_in_order([batch.keys for batch in micro_batches], count),
                loss=values["loss"],
                gradient_norm=values["gradient_norm"],
            )
            yield self.end


def _without_half_a_rewind(history: list[dict[str, Any]], noted: Noted) -> list[dict[str, Any]]:
    """A history up to a decision to go back behind which the run ended before it took effect."""
    turns = [
        n for n, event in enumerate(history) if event["event"] in ("began", "continued", REWIND)
    ]
    last = history[turns[-1]] if turns else {}
    if last.get("event") == REWIND and not noted.steps.keys().isdisjoint(last["left_out"]):
        return history[: turns[-1]]
    return history


def _kernels_of(engine: str) -> str:
    """What engines have in common that round alike where they train virtual processes."""
    return "shared moments" if engine in ("deepspeed zero1", "deepspeed zero2") else "whole moments"


def _in_order(keys: list[list[str]], count: int) -> list[str]:
    """The keys of a step in the order of the batch, from those of each micro-batch here.

    Of every micro-batch there are ``count`` in a row, of as many virtual processes.
    """
    rows = [keys[first : first + count] for first in range(0, len(keys), count)]
    of_ranks = gather_objects([[key for part in row for key in part] for row in rows])
    return [
        key for micro_batch in zip(*of_ranks, strict=True) for part in micro_batch for key in part
    ]


@dataclass(frozen=True)
class Difference:
    """The first place where a replay and its run differ."""

    step: int
    what: str
    """``start``, ``weights before``, ``samples``, ``gradient`` or ``weights``."""
    places: list[int] | None
    """Which parameters or groups of samples; None where the run did not keep them."""
    recomputed: Recomputed | None


def compare(replayed: Replay) -> Difference | None:
    """Take the steps of a replay until one differs from what the run noted."""
    noted = replayed.noted
    replayed.begin()
    before = noted.parts.get(replayed.first, {}).get("weights")
    if before is not None and (places := _places(before, replayed.weights())):
        return Difference(replayed.first, "weights before", places, None)
    began = str(_start_of(replayed.history, 1).get("weights", "")).lower()
    if replayed.checkpoint is None and began and began != digest_all(replayed.weights()):
        return Difference(0, "start", None, None)
    for found in replayed.steps():
        step = found.digests.step
        line, parts = noted.steps.get(step), noted.parts.get(step, {})
        if line is None:
            continue
        if line["samples"] != found.digests.batch:
            places = _places(parts.get("samples"), found.digests.samples)
            return Difference(step, "samples", places, found)
        if line["gradient"] != found.digests.gradient:
            places = _places(parts.get("parameters"), found.digests.parameters)
            return Difference(step, "gradient", places, found)
        if found.weights is not None and (places := _places(parts.get("weights"), found.weights)):
            return Difference(step, "weights", places, found)
    return None


def _places(before: np.ndarray | None, now: np.ndarray) -> list[int] | None:
    """Where two rows of digests differ; None where the first is not known."""
    if before is None or before.shape != now.shape:
        return None
    return np.flatnonzero(before != now).tolist()


def explain(replayed: Replay, found: Difference, folder: Path) -> list[str]:
    """What a difference is and what it can come from, line by line; every process calls this."""
    if contradiction := replayed.noted.contradiction(found):
        return [contradiction, "what was computed then cannot be told"]
    if holes := replayed.holes_before(found.step):
        return [
            f"{DIGESTS} has nothing of step {holes[0]}, which {HISTORY} does not leave out: one of "
            "them was altered or is damaged",
            f"why step {found.step} comes out otherwise cannot be told",
        ]
    changes = _changes(folder, replayed, max(found.step, 1))
    if found.what == "samples":
        return _explain_samples(replayed, found, folder, changes)
    if found.what == "start":
        return _explain_start(replayed, changes)
    if found.what == "weights before":
        return [
            f"the weights of the checkpoint of step {found.step} are not those that the run had "
            f"when it saved them: {_named(found.places, replayed.names)}",
            "its files are as they were written: it was the machine, whose memory was altered "
            f"before, or {DETAILED_DIGESTS} was altered since",
        ]
    where = f"the weights after step {found.step} differ"
    if found.what == "gradient":
        where = f"step {found.step} has another gradient from the same samples"
    lines = [f"{where}: {_named(found.places, replayed.names)}"]
    lines += [f"changed since the run: {change}" for change in changes]
    if changes:
        return [*lines, "it was the code, the recipe or another machine, as listed"]
    altered = f"or {DETAILED_DIGESTS if found.what == 'weights' else DIGESTS} was altered"
    if not replayed.can_begin_again:
        return [*lines, f"it was the machine: samples, code and recipe are the same; {altered}"]
    again = compare(replayed)
    first = found.recomputed.digests.parameters if found.recomputed else None
    second = again.recomputed.digests.parameters if again and again.recomputed else None
    if again is None or first is None or second is None or again.step != found.step:
        return [*lines, "computed a second time it came out otherwise: this machine is not exact"]
    if places := _places(first, second):
        return [
            *lines,
            "computed a second time it came out otherwise again: this machine does not repeat "
            f"itself ({_named(places, replayed.names)})",
        ]
    return [
        *lines,
        "computed a second time it came out as now, and samples, code and recipe are the same: it "
        f"was the machine of the run, or one that computes otherwise than this one; {altered}",
    ]


def _explain_start(replayed: Replay, changes: list[str]) -> list[str]:
    lines = [
        "the weights that the run began with are others than now",
        *(f"changed since the run: {change}" for change in changes),
    ]
    if changes:
        return [*lines, "it was the code, the recipe or another machine, as listed"]
    if (source := replayed.recipe.run.start_from) is not None:
        return [*lines, f"it was what run.start_from names ({source}): it holds other weights"]
    return [*lines, f"it was the machine: code and recipe are the same; or {HISTORY} was altered"]


def _explain_samples(
    replayed: Replay, found: Difference, folder: Path, others: list[str]
) -> list[str]:
    recomputed = found.recomputed
    assert recomputed is not None
    which = "which of them was not kept"
    if found.places is not None:
        groups = np.array_split(np.array(recomputed.keys), len(recomputed.digests.samples))
        keys = [str(key) for place in found.places for key in groups[place]]
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        which = f"{', '.join(keys[:_SHOWN])}{more}"
    changes = differences_since(folder, replayed.contents, replayed.run, replayed.told)
    cause = "it was the data"
    if not changes and others:
        cause = "it was the code, the recipe or another machine, as listed"
    elif changes is None:
        cause = (
            "code and recipe are the same: it was the data, of which the run noted nothing that "
            "could be compared, or the machine"
        )
    elif not changes:
        cause = (
            "no name, size or index of the data has changed, and neither have code and recipe: it "
            f"was the bytes that the storage gave, or the machine; or {DIGESTS} was altered"
        )
    return [
        f"step {found.step} has other samples: {which}",
        *(f"changed since the run: {change}" for change in [*(changes or ()), *others]),
        cause,
    ]


def _named(places: list[int] | None, names: list[str]) -> str:
    if places is None:
        return "which parameters was not kept"
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    listed = ", ".join(names[place] for place in places[:_SHOWN])
    return f"{len(places)} of {len(names)} parameters from {listed}{more}"


def _start_of(history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """What the history says of the process that took a step for good; {} where it does not."""
    starts = [event for event in history if event["event"] in ("began", "continued")]
    # a line that was altered by hand may say no number
    whole = [event for event in starts if isinstance(event.get("step"), int)]
    return next((event for event in reversed(whole) if event["step"] < step), {})


def _environment_at(folder: Path, history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """By what a step was computed: the file of a run tells of the last process alone."""
    environment = read_json_object(folder / "environment.json")
    if _start_of(history, step) == _start_of(history, sys.maxsize):
        return environment
    start = _start_of(history, step)
    earlier = start.get("environment")
    if isinstance(earlier, dict):
        return earlier
    code = start.get("code")
    return environment | ({"code": code.get("sha256")} if isinstance(code, dict) else {})


def _changes(folder: Path, replayed: Replay, step: int) -> list[str]:
    """What of recipe, code and machine is another than at a step; empty where nothing is."""
    now = _flat(environment_of(replayed.run, replayed.engine))
    before = _flat(_environment_at(folder, replayed.history, step))
    free = {"command"}
    if replayed.recipe.engine.virtual_processes is not None:
        free |= {"world_size", "engine"}
    lines = [
        f"{name} was {before[name]} and is {now[name]}"
        for name in now
        if name in before and name not in free and before[name] != now[name]
    ]
    saved = recipe_if_whole(folder / "recipe.json")
    # where the data lie decides nothing: their digests are compared
    lines += difference(replayed.recipe, saved, compared=("data.train",)) if saved else []
    also = replayed.recipe.data.also_read() | replayed.engine.objective.also_read()
    try:
        return lines + changed_besides(also_noted(folder, replayed.told), also)
    except InputError:  # told where the data are compared
        return lines


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    packages = environment.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    return {name: value for name, value in environment.items() if name != "packages"} | packages


def _checkpoint_before(folder: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint from which a step is still to come; None for the beginning."""
    earlier = [f for f in whole_checkpoints(folder / "checkpoints") if step_of(f.name) < step]
    return first_whole(reversed(earlier), otherwise="taking the beginning of the run")


def _recipe_of(
    folder: Path, checkpoint: Checkpoint | None, start: Mapping[str, Any], run: Run
) -> Recipe:
    """The recipe of the steps behind a checkpoint, as a run in a directory of this process.

    ``start`` is what the history says of the process that took them: engine, precision and others
    may be those of the checkpoint no more. Earlier versions did not note them.
    """
    if isinstance(noted := start.get("recipe"), dict):
        found = from_json(noted, source=str(folder / HISTORY))
    elif checkpoint is not None:
        found = checkpoint.recipe()
    else:
        found = load_recipe(folder / "recipe.json")
    if not isinstance(found, Recipe):
        raise InputError(f"{folder / HISTORY} does not hold the recipe of its runs; remove it")
    return replace(found, run=replace(found.run, dir=run.dir, digests=True))


def _moved(recipe: Recipe, train: tuple[str, ...]) -> Recipe:
    """A recipe whose data lie elsewhere now.

    Raises:
        InputError: if its data have no such place.
    """
    if not train:
        return recipe
    if not isinstance(recipe.data, StoredData):
        raise InputError("--train says where data lie now, but those of this run lie in no shards")
    return replace(recipe, data=replace(recipe.data, train=train))


def replay(options: Options) -> None:
    """Compute, compare, and tell.

    Raises:
        RunStopped: with exit code 1 where something differs.
    """
    make_logger(launcher_ranks().rank)
    if not (options.run / "recipe.json").is_file():
        raise InputError(f"{options.run} holds no run (recipe.json); give a run directory")
    folder, history = options.run, read_history(options.run)
    environment = _environment_at(folder, history, options.step)
    with tempfile.TemporaryDirectory() as aside:
        _copy_small(folder, Path(aside))
        device = "cpu" if environment.get("device") == "cpu" else "auto"
        run = open_run(Path(aside), device, threads=_threads_of(environment))
        checkpoint = _checkpoint_before(folder, options.step)
        start = _start_of(history, checkpoint.step + 1 if checkpoint else 1)
        recipe = _moved(_recipe_of(folder, checkpoint, start, run), options.train)
        with deterministic_kernels(run.log, wanted=recipe.engine.deterministic):
            replayed = Replay(
                folder, options.step, run, history=history, checkpoint=checkpoint, recipe=recipe
            )
            found = compare(replayed)
            lines = [] if found is None else explain(replayed, found, folder)
            replayed.watchdog.close()
            replayed.engine.close()
    if found is not None:
        raise RunStopped("; ".join(lines), exit_code=1)
    if run.is_main:
        sys.stdout.write(_agreement(replayed) + _end_of(replayed))


def _agreement(replayed: Replay) -> str:
    """What was compared and is the same, in a line."""
    first, last, compared = replayed.first + 1, replayed.last, len(replayed.compared)
    if not compared:
        return (
            f"steps {first} to {last} were computed, and compared with nothing: the run went back "
            "and keeps no digests of them\n"
        )
    lacking = last + 1 - first - compared
    of_all = f" (of {lacking} between them the run has none)" if lacking else ""
    return (
        f"steps {first} to {last} agree: samples and gradients of {compared} steps are the same, "
        f"bit for bit{of_all}\n"
    )


def _copy_small(folder: Path, aside: Path) -> None:
    """Copy what steps are computed from beside checkpoints, whatever else somebody put there."""
    left = ignore_patterns(*_NOT_READ)

    def ignored(place: str, names: list[str]) -> set[str]:
        paths = {name: Path(place, name) for name in names}
        odd = {name for name, path in paths.items() if not _is_small_file(path) and (
            path.is_symlink() or not path.is_dir()
        )}  # fmt: skip
        return odd | (left(place, names) if Path(place) == folder else set())

    copytree(folder, aside, ignore=ignored, dirs_exist_ok=True)


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= LARGEST_FILE


def _threads_of(environment: Mapping[str, Any]) -> int | None:
    """Of a process of the run; None where that is not told."""
    threads = environment.get("threads_per_process")
    return threads if type(threads) is int and 0 < threads < _MOST_PROCESSES else None


def _told_by_any(folder: Path) -> Mapping[str, Any] | None:
    """What the manifest of some checkpoint of a run says of its data."""
    told = map(data_of, whole_checkpoints(folder / "checkpoints"))
    return next((each for each in told if each is not None), None)


def _end_of(replayed: Replay) -> str:
    """What there is to say of the last step, if it is what a run stopped or went back for."""
    end = replayed.end
    if end is None or (math.isfinite(end.gradient_norm) and not replayed.went_back):
        return ""
    shown = ", ".join(end.keys[:_SHOWN])
    went_back = ", and the run went back and left it out" if replayed.went_back else ""
    gradient = f"a gradient of norm {end.gradient_norm:.4g}"
    if not math.isfinite(end.gradient_norm):
        gradient = "no finite gradient"
    return f"step {replayed.last} has loss {end.loss} and {gradient}, on {shown}{went_back}\n"


def main() -> None:
    """The body of ``python -m frugal.common.replay``."""
    run_politely(
        lambda: replay(
            tyro.cli(
                Options,
                args=without_local_rank(command_words()),
                prog="python -m frugal.common.replay",
            )
        )
    )


if __name__ == "__main__":
    main()
