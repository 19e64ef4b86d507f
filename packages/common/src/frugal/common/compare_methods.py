"""Compare methods under equal budgets: ``python -m frugal.common.compare_methods compare.json``.

What is compared stands in a file (:mod:`frugal.common.comparison.entries`). Every stage is tried
shortly, by turns with the first entry; then each entry is trained on as many samples as it trains
in the time in which the first one trains ``--samples``, and on as many as take the same FLOPs.
Every run has a folder of its own below ``--out``: the same command goes on where it was stopped,
and reads what is complete. ``results.json``, ``compare.html``, ``compare.md`` and ``compare.svg``
say what was found.
"""

from __future__ import annotations

import sys

from frugal.common.cli import read_options, run_politely
from frugal.common.comparison.budgets import Price, samples_of
from frugal.common.comparison.entries import check_recipes, read_entries, recipe_of
from frugal.common.comparison.jobs import FIRST, Comparison, Place, in_words
from frugal.common.comparison.options import Options
from frugal.common.comparison.pages import write_pages
from frugal.common.comparison.results import Result, result_of, write_results
from frugal.common.comparison.running import finish
from frugal.common.comparison.trials import measure
from frugal.common.errors import InputError
from frugal.common.files import read_json_object, write_json

PROGRAM = "python -m frugal.common.compare_methods"


def lengths(comparison: Comparison, prices: dict[str, list[Price]], place: Place) -> list[int]:
    """Samples of each stage of an entry under a budget."""
    entry = place.entry
    return samples_of(
        entry,
        prices[entry.name],
        first=prices[comparison.first.name][0],
        samples=comparison.options.samples,
        kind="time" if place.kind == FIRST else place.kind,
        batch_sizes=[recipe_of(stage).batch_size for stage in entry.stages],
    )


def expected_minutes(comparison: Comparison, prices: dict[str, list[Price]]) -> float:
    """How long all runs take from their beginning, by the trials, without what costs no budget."""
    seconds = 0.0
    for place in comparison.places():
        own = prices[place.entry.name]
        for count, price in zip(lengths(comparison, prices, place), own, strict=True):
            seconds += count / price.samples_per_second + price.other_seconds
        seconds += comparison.options.evaluations * own[-1].evaluation_seconds
    return seconds / 60


def train_all(comparison: Comparison, prices: dict[str, list[Price]]) -> list[Result]:
    """Run what is missing; what everything has become.

    Raises:
        InputError: if a run was not measured by the number of its entry.
        RunStopped: if a run fails.
    """
    places = list(comparison.places())
    minutes = expected_minutes(comparison, prices)
    say(f"{len(places)} trainings, about {minutes:.0f} minutes by the trials, probes left out")
    results = []
    for number, place in enumerate(places, start=1):
        jobs = list(comparison.jobs(place, lengths(comparison, prices, place)))
        seconds = {job.folder.name: finish(job) for job in jobs}
        result = result_of(place, seconds)
        results.append(result)
        say(
            f"[{number}/{len(places)}] {place.entry.name} ({in_words(place.kind)}, seed "
            f"{place.seed}): {result.samples:,.0f} samples, {result.value:.1%} "
            f"{place.entry.measured_by}, {sum(seconds.values()):.0f} s"
        )
    return results


def say(words: str) -> None:
    """A line on the terminal, at once."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def compare_methods(options: Options) -> None:
    """Read, try, train, write.

    Raises:
        InputError: if the file, or what is in ``out``, does not go with this.
        RunStopped: if a run fails.
    """
    comparison = Comparison(options, read_entries(options.file))
    check_recipes(comparison.entries)
    _keep_plan(comparison)
    prices = measure(comparison, say)
    results = train_all(comparison, prices)
    write_results(options, results, prices)
    say("\n" + write_pages(options, results))


def _keep_plan(comparison: Comparison) -> None:
    """Note what is compared, and refuse to go on with what is compared otherwise."""
    options = comparison.options
    path = options.out / "plan.json"
    named = ("samples", "evaluations", "trial_steps")
    plan = {name: getattr(options, name) for name in named}
    plan["file"] = read_json_object(options.file)
    if not path.is_file():
        write_json(path, plan)
    elif read_json_object(path) != plan:
        raise InputError(
            f"{options.out} holds a comparison of other entries, samples, evaluations or trial "
            "steps; choose another --out, or remove it"
        )


def main() -> None:
    """The body of ``python -m frugal.common.compare_methods``."""

    def command() -> None:
        compare_methods(read_options(Options, PROGRAM))

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
