"""Let a run end otherwise, from one of its checkpoints on: ``python -m frugal.common.branch``.

What a run learns at a constant rate does not depend on how long it is to be, so that one run serves
many budgets: each is a branch of it that cools down from a step of its own ("Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations", arXiv:2405.18392). A branch is a run
directory like that of an interrupted run, and goes on like one.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from shutil import Error as ShutilError
from shutil import copyfile, copytree, ignore_patterns, rmtree
from typing import Any

import tyro

from frugal.common.checkpoint.commit import (
    aside_of,
    checkpoint_name,
    make_anew,
    make_whole,
    point_at,
    whole_checkpoints,
)
from frugal.common.checkpoint.manifest import digest_file, read_manifest
from frugal.common.checkpoint.store import (
    Checkpoint,
    find_checkpoint,
    first_whole,
    open_checkpoint,
    recipe_of_run,
)
from frugal.common.cli import read_options, run_politely
from frugal.common.engine.step import learning_rate_of
from frugal.common.errors import InputError
from frugal.common.files import cannot_write, write_json
from frugal.common.history import note
from frugal.common.ranges import Count, check_ranges
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import to_json
from frugal.common.run import make_logger
from frugal.common.weights.runs import refuse_taken

_LOG = logging.getLogger("frugal")
_LEFT = ("checkpoints", "evaluation", "tensorboard", "report.*", ".lock")
"""What lies in a run directory and is of its end, or of its process."""


@dataclass(frozen=True)
class Ending:
    """What a branch changes of the schedule of its run; the rest stays."""

    cooldown_from: Count | None = None
    """Step after which the learning rate leaves its peak; it sets the samples."""
    cooldown_samples: Count | None = None
    """Samples of the way down."""
    samples: Count | None = None
    """Samples of the whole branch, with those that its run has seen before it."""

    def __post_init__(self) -> None:
        check_ranges(self, "schedule")
        if self.cooldown_from is not None and self.samples is not None:
            raise InputError(
                "--schedule.cooldown-from and --schedule.samples both say when a branch ends; give "
                "one of them"
            )
        if not self.given():
            raise InputError(
                "a branch ends otherwise than its run; give --schedule.cooldown-from, "
                "--schedule.cooldown-samples or --schedule.samples"
            )

    def given(self) -> dict[str, int]:
        """The fields that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Begin a run where another was, with all that it had, to end by another schedule.

    Train it with the script of that run and the recipe that is written, as in
    ``python -m frugal.flip.train OUT/recipe.json``.
    """

    run: tyro.conf.Positional[Path]
    """The run, which may still be training; or one of its checkpoints, to begin at no other."""
    out: Path
    """Run directory to write; new or empty."""
    schedule: Ending


def branch(options: Options) -> Checkpoint:
    """Write the run directory of a branch.

    The branch begins at the newest checkpoint up to which its run had the learning rates that the
    branch has; its tensors are the same files, where the disk can name a file twice.

    Returns:
        The checkpoint that it begins with.

    Raises:
        InputError: if the run cannot end like that, has no checkpoint that is early enough, or if
            the directory cannot be written; nothing is left then.
    """
    refuse_taken(options.out)
    newest = find_checkpoint(options.run)
    if newest.state.get("weights_only"):
        raise InputError(
            f"{newest.folder} holds no optimizer state, without which nothing can branch; "
            "give it with --run.start-from"
        )
    run_dir = newest.folder.resolve().parents[1]
    before = recipe_of_run(run_dir) if newest.folder.parent.name == "checkpoints" else None
    if before is None:
        raise InputError(f"{newest.folder} is in no run directory; give the whole run")
    if options.out.resolve().is_relative_to(run_dir):
        raise InputError(f"{options.out} lies in {run_dir}, which is copied; choose another --out")
    recipe = _ending_otherwise(before, options)
    is_named = options.run.resolve() == newest.folder.resolve()
    begin = newest if is_named else _last_before(newest, _equal_steps(before, recipe, newest.step))
    which = str(begin.folder) if is_named else f"every checkpoint of {options.run}"
    _check_equal(before, recipe, begin, which=which)
    begin.refuse_to_continue()
    _write(run_dir, begin, recipe, options.out)
    return open_checkpoint(options.out / "checkpoints" / begin.folder.name)


def _ending_otherwise(before: Recipe, options: Options) -> Recipe:
    """The recipe of a run with what a branch changes of it."""
    schedule: Any = before.schedule
    given: dict[str, Any] = {**options.schedule.given()}
    if unknown := sorted(given.keys() - {field.name for field in fields(schedule)}):
        raise InputError(
            f"{options.run} was trained by {type(schedule).__name__}, which has no "
            f"{unknown[0]}; runs by frugal.common.optim.schedules.WarmupConstantCooldown have it"
        )
    if before.reduction.image.depends_on_progress:
        raise InputError(
            f"{options.run} leaves out patches by the share of the run that is done, so that a run "
            "of another length is another one from its first step on; nothing can branch from it"
        )
    if "samples" in given and "cooldown_from" in {field.name for field in fields(schedule)}:
        given |= {"cooldown_from": None}  # which would set the samples
    return replace(
        before, schedule=replace(schedule, **given), run=replace(before.run, dir=options.out)
    )


def _equal_steps(before: Recipe, recipe: Recipe, steps: int) -> int:
    """The first of a run's steps, ``steps`` at most, that a branch would have taken like it."""
    steps = min(steps, before.data.steps_alike(before.steps, recipe.steps))
    others = (
        step
        for step in range(steps)
        if learning_rate_of(before, step) != learning_rate_of(recipe, step)
    )
    return next(others, steps)


def _last_before(newest: Checkpoint, steps: int) -> Checkpoint:
    """The last whole checkpoint of a run after so many steps at most; else the newest of all."""
    if newest.step <= steps:
        return newest
    folders = whole_checkpoints(newest.folder.parent)
    early = [folder for folder in folders if folder.name <= checkpoint_name(steps)]
    return first_whole(reversed(early), otherwise=f"taking {newest.folder}") or newest


def _check_equal(before: Recipe, recipe: Recipe, begin: Checkpoint, *, which: str) -> None:
    """Refuse a checkpoint behind steps that a branch would have taken otherwise."""
    equal = _equal_steps(before, recipe, begin.step)
    if equal == begin.step:
        return
    was, would = (learning_rate_of(each, equal) for each in (before, recipe))
    if equal == recipe.steps:
        reason = f"the branch ends after step {equal}"
    elif was != would:
        reason = f"step {equal + 1} had a learning rate of {was:g}, in the branch it has {would:g}"
    else:
        reason = (
            f"from step {equal + 1} on its data may be others, as they depend on where a run ends"
        )
    raise InputError(
        f"{which} is too late to branch from: {reason}. End later, or take an earlier "
        "checkpoint (runs with a higher --run.keep leave more of them)"
    )


def _write(run_dir: Path, begin: Checkpoint, recipe: Recipe, out: Path) -> None:
    """Write a run directory aside, and give it its name when it is whole."""
    aside = aside_of(out)
    try:
        make_anew(aside)
        ignored = ignore_patterns(*_LEFT)
        copytree(run_dir, aside, ignore=ignored, dirs_exist_ok=True)
        _copy_checkpoint(begin, aside / "checkpoints", recipe)
        write_json(aside / "recipe.json", to_json(recipe))
        note(aside, "branched", step=begin.step, source=str(begin.folder))
        if out.is_dir():
            out.rmdir()
        aside.rename(out)
    except (FileNotFoundError, ShutilError):
        raise InputError(
            f"{run_dir} changed while it was copied, as its run goes on; give the same command "
            "again"
        ) from None
    except OSError as error:
        raise cannot_write(out, error) from None
    finally:
        rmtree(aside, ignore_errors=True)


def _copy_checkpoint(begin: Checkpoint, folder: Path, recipe: Recipe) -> None:
    """The same checkpoint, of another recipe."""
    final = folder / begin.folder.name
    aside = aside_of(final)
    make_anew(aside)
    files = []
    for file in begin.state["files"]:
        source, target = begin.folder / file["name"], aside / file["name"]
        try:
            os.link(source, target)
        except OSError:
            copyfile(source, target)
        files.append({**file, **digest_file(target)})
    about = read_manifest(begin.folder)
    kept = {name: about[name] for name in about.keys() - {"files", "format", "recipe", "manifest"}}
    make_whole(aside, final, {**begin.state, "recipe": to_json(recipe)}, files, kept)
    point_at(final)


def main() -> None:
    """The body of ``python -m frugal.common.branch``."""

    def command() -> None:
        make_logger(0)
        options = read_options(Options, "python -m frugal.common.branch")
        begin = branch(options)
        recipe = begin.recipe()
        _LOG.info(
            "%s goes on behind step %d of %s and ends with step %d; train it with the script of "
            "that run and %s",
            options.out, begin.step, options.run, recipe.steps, options.out / "recipe.json",
        )  # fmt: skip

    run_politely(command)


if __name__ == "__main__":
    main()
