"""Short trials of every stage, by turns with the first entry: what each costs beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from frugal.common.comparison.budgets import Price, prices_from_json, relative
from frugal.common.comparison.jobs import TRIAL, Comparison, Place, stage_samples_of_trial
from frugal.common.comparison.outcomes import cost_of, speed_of
from frugal.common.comparison.running import finish
from frugal.common.files import read_json_object, write_json
from frugal.common.history import read_history

_UNEVEN = 1.25
"""Times as fast as its slowest trial that the first entry's fastest may be, before it is told."""


@dataclass(frozen=True)
class _Trial:
    """One that has ended."""

    name: str
    """Of its entry."""
    run: Path
    seconds: float
    """On the clock."""


def measure(comparison: Comparison, say: Callable[[str], None]) -> dict[str, list[Price]]:
    """What every stage costs, by the name of its entry; measured once, and kept in ``trial.json``.

    Args:
        comparison: all of whose stages are tried.
        say: tells people what is done.

    Raises:
        RunStopped: if a trial fails.
    """
    path = comparison.options.out / "trial.json"
    if path.is_file():
        return prices_from_json(read_json_object(path))
    count = sum(len(entry.stages) for entry in comparison.entries)
    say(f"{count} short trials, by turns with {comparison.first.name}, tell what each stage costs")
    first, trials = comparison.first.name, list[_Trial]()
    for entry in comparison.entries:
        place = comparison.place(entry, TRIAL, 0)
        samples = [stage_samples_of_trial(comparison.options, stage) for stage in entry.stages]
        for job in comparison.jobs(place, samples):
            is_first = entry is comparison.first
            if job.folder in place.stages and not is_first and trials[-1].name != first:
                trials.append(_again(comparison, len(trials)))
            seconds = finish(job)
            say(f"{job.name}: {seconds:.0f} s")
            if job.folder in place.stages:
                trials.append(_Trial(entry.name, job.folder, seconds))
    trials.append(_again(comparison, len(trials)))
    prices = _prices(trials, first=first)
    own = [speed_of(cost_of(trial.run))[0] for trial in trials if trial.name == first]
    if max(own) > _UNEVEN * min(own):
        say(
            f"this machine was not idle: trials of {first} ran at {min(own):,.0f} to "
            f"{max(own):,.0f} samples/s, so that equal time is not quite equal; remove {path} and "
            f"{path.with_suffix('')}, and begin again when nothing else runs"
        )
    told = {name: [vars(price) for price in found] for name, found in prices.items()}
    write_json(path, told)
    return prices


def _again(comparison: Comparison, number: int) -> _Trial:
    """One more trial of the first entry."""
    entry = comparison.first
    folder = comparison.options.out / "trial" / f"{entry.slug}-again-{number}"
    place = Place(entry, TRIAL, 0, folder)
    samples = [stage_samples_of_trial(comparison.options, entry.stages[0])]
    for job in comparison.jobs(place, samples):
        seconds = finish(job)
    return _Trial(entry.name, place.last, seconds)


def _prices(trials: list[_Trial], *, first: str) -> dict[str, list[Price]]:
    """What the trials, in their order, say; of those of the first entry the first one counts."""
    measured = [speed_of(cost_of(trial.run)) for trial in trials]
    speeds = [speed for speed, _ in measured]
    own = [number for number, trial in enumerate(trials) if trial.name == first]
    prices: dict[str, list[Price]] = {}
    for number, trial in enumerate(trials):
        if number in own[1:]:
            continue
        spent = _spent(trial.run)
        steps = spent.get("steps", 0.0) + spent.get("waiting", 0.0)
        evaluation = spent.get("evaluation", 0.0)
        price = Price(
            speed=1.0 if number in own else relative(speeds, number, first=own),
            flops_per_sample=measured[number][1],
            samples_per_second=speeds[number],
            evaluation_seconds=evaluation,
            other_seconds=max(trial.seconds - steps - evaluation, 0.0),
        )
        prices.setdefault(trial.name, []).append(price)
    return prices


def _spent(run: Path) -> dict[str, float]:
    """Seconds of a run by what they were spent on."""
    ended = [event for event in read_history(run) if event["event"] == "ended"]
    return ended[-1]["session_seconds"] if ended else {}
