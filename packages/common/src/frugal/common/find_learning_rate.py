"""Find a learning rate: ``python -m frugal.common.find_learning_rate flip:demo --data.train ...``.

A few hundred steps of a recipe at a rate that rises by the same factor in every step, from far too
low to far too high. Where the loss falls fastest the rate teaches most per step; a tenth of the
rate at which the loss was lowest is what training for long usually stands (Smith, arXiv:1506.01186,
section 3.3). What comes out holds for the batch, the model and the start that were tried.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from frugal.common.checkpoint.store import recipe_of_run
from frugal.common.cli import command_words, overridden, run_politely, without_local_rank
from frugal.common.distributed import launcher_ranks
from frugal.common.errors import InputError, LossNotFinite
from frugal.common.files import read_json_lines, write_json
from frugal.common.optim.schedules import RisingRate
from frugal.common.programs import recipe_named
from frugal.common.ranges import Count, Positive, check_ranges
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import difference
from frugal.common.train import train_recipe

PROGRAM = "python -m frugal.common.find_learning_rate"
RESULT = "learning_rate.json"
_SMOOTHED = 0.9
"""Share of the mean so far in the mean of losses."""
_SETTLED = 10
"""Losses in that mean before it tells anything; a quarter of them where there are few."""
_DIVERGED = 1.5
"""Times the lowest loss: beyond it, what follows tells nothing."""
_AWAY = 10
"""By how much a rate is to stay below the one of the lowest loss."""

_DECIDED = (
    "--run.dir", "--schedule", "--evaluation", "--optimizer.learning-rate", "--run.best",
    "--run.patience", "--run.evaluate-every", "--run.log-every", "--run.save-every",
    "--run.max-skipped", "--run.on-divergence",
)  # fmt: skip
"""Beginnings of flags of a recipe that :func:`rising` decides."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a few hundred steps at a rising rate, and say between which rates to choose.

    Flags of the recipe change it as they do in its entry script, such as --batch-size 512 or
    --run.start-from.
    """

    recipe: tyro.conf.Positional[str]
    """PROGRAM:NAME, such as flip:demo or clipa.train:vit-b16-i50-t16; or a run directory or
    recipe.json."""
    steps: Count = 200
    lowest: Positive = 1e-6
    """Learning rate of the first step."""
    highest: Positive = 0.1
    """Of the last one."""
    out: Path = Path("runs/learning-rate")
    """Run directory of the steps; learning_rate.json in it holds what was found."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.lowest >= self.highest:
            raise InputError(
                f"--lowest is {self.lowest:g} and --highest {self.highest:g}; the rate is to rise"
            )


@dataclass(frozen=True)
class Found:
    """Between which rates to choose."""

    steepest: float
    """Where the smoothed loss fell fastest."""
    lowest: float
    """Where it was lowest."""
    is_bounded: bool
    """Whether the loss rose again behind it, or was not finite."""
    rates: list[float]
    smoothed: list[float]
    """Losses, as far as they tell something."""

    @property
    def suggested(self) -> float:
        """A tenth of the rate of the lowest loss, two digits."""
        return float(f"{self.lowest / _AWAY:.1e}")


def rising(recipe: Recipe, options: Options) -> Recipe:
    """A recipe whose rate rises, with nothing beside its steps."""
    optimizer = replace(recipe.optimizer, learning_rate=options.highest, learning_rate_per_256=None)
    samples = options.steps * recipe.batch_size
    return replace(
        recipe,
        optimizer=optimizer,
        schedule=RisingRate(samples=samples, least=options.lowest / options.highest),
        evaluation=(),
        run=replace(
            recipe.run, dir=options.out, best=None, evaluate_every=None, log_every=1,
            save_every=options.steps, patience=None, max_skipped=3, on_divergence="stop",
        ),
    )  # fmt: skip


def analyze(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """What a curve of losses over rising rates says.

    Raises:
        InputError: if the loss never fell.
    """
    smoothed: list[float] = []
    mean = weight = 0.0
    is_finite = True
    for loss in losses:
        is_finite = math.isfinite(loss)
        if not is_finite:
            break
        mean = _SMOOTHED * mean + (1 - _SMOOTHED) * loss
        weight = _SMOOTHED * weight + (1 - _SMOOTHED)
        smoothed.append(mean / weight)
        if smoothed[-1] > _DIVERGED * min(smoothed):
            break
    # means of a few losses jump by more than any later one falls
    first = min(_SETTLED, len(smoothed) // 4)
    lowest = min(range(first, len(smoothed)), key=smoothed.__getitem__, default=first)
    if len(smoothed) < 3 or lowest == first:
        raise InputError(
            "the loss never fell below that of the first steps; lower --lowest, or give more "
            "--steps"
        )
    # over a tenth of the curve: from step to step most of what falls is noise
    width = min(max(len(smoothed) // 10, 1), lowest - first)
    places = range(first, lowest - width + 1)
    falls = [smoothed[place] - smoothed[place + width] for place in places]
    steepest = first + max(range(len(falls)), key=falls.__getitem__) + width // 2
    is_bounded = not is_finite or smoothed[-1] > smoothed[lowest]
    return Found(rates[steepest], rates[lowest], is_bounded, list(rates[: len(smoothed)]), smoothed)


def find_learning_rate(recipe: Recipe, options: Options) -> Found | None:
    """Train, and say what was found; None on all processes but the first."""
    stopped, recipe = "", rising(recipe, options)
    before = recipe_of_run(options.out)
    if before is not None and difference(before, recipe):
        raise InputError(
            f"{options.out} holds the steps of another recipe, or other rates; choose another "
            "--out, or remove it"
        )
    try:
        train_recipe(recipe)
    except LossNotFinite as end:  # and nothing else: a signal asks for no answer
        lines, _ = read_json_lines(options.out / "metrics.jsonl")
        if len(lines) < options.steps // 10:
            raise
        stopped = str(end)  # the loss is not finite any more, as was to be expected
    if launcher_ranks().rank:
        return None
    lines, _ = read_json_lines(options.out / "metrics.jsonl")
    losses = [math.nan if line.get("loss") is None else line["loss"] for line in lines]
    found = analyze([line["learning_rate"] for line in lines], losses)
    told = vars(found) | {"suggested": found.suggested, "stopped": stopped}
    write_json(options.out / RESULT, told)
    return found


def _tell(found: Found, options: Options) -> None:
    rows = zip(found.rates, found.smoothed, strict=True)
    every = max(len(found.rates) // 12, 1)
    for number, (rate, loss) in enumerate(rows):
        if number % every == 0:
            sys.stdout.write(f"{rate:10.2e} {loss:10.4f}\n")
    sys.stdout.write(
        f"the loss fell fastest at {found.steepest:.1e} and was lowest at {found.lowest:.1e}; try "
        f"--optimizer.learning-rate {found.suggested:g} ({options.out / RESULT})\n"
    )
    if not found.is_bounded:
        sys.stdout.write(
            "it still fell at the end: there may be higher rates that train better; raise "
            "--highest\n"
        )


def _refuse_decided(words: Sequence[str]) -> None:
    """Refuse flags of the recipe that the steps here replace."""
    names = [word.partition("=")[0].replace("_", "-") for word in words]
    for name in names:
        if name.startswith(_DECIDED):
            raise InputError(
                f"{name} has no effect here; leave it out (--out says where the steps are kept, "
                "--steps how many there are, --lowest and --highest between which rates)"
            )


def main() -> None:
    """The body of ``python -m frugal.common.find_learning_rate``."""

    def command() -> None:
        words = without_local_rank(command_words())
        options, rest = tyro.cli(Options, args=words, prog=PROGRAM, return_unknown_args=True)
        _refuse_decided(rest)
        recipe, _ = recipe_named(options.recipe)
        recipe = overridden(recipe, rest, program=f"{PROGRAM} {options.recipe}")
        found = find_learning_rate(recipe, options)
        if found is not None:
            _tell(found, options)

    run_politely(command)


if __name__ == "__main__":
    main()
