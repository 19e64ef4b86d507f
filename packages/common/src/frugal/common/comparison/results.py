"""What a comparison found: one result per entry, budget and seed, and ``results.json`` of all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from frugal.common.comparison.budgets import Price
from frugal.common.comparison.jobs import FIRST, Place
from frugal.common.comparison.options import Options
from frugal.common.comparison.outcomes import (
    Point,
    cost_of,
    course_of,
    numbers_of,
    seconds_to,
)
from frugal.common.errors import InputError
from frugal.common.files import read_json_object, read_lines, write_json

_OF_ENVIRONMENT = ("python", "packages", "code", "device", "threads_per_process", "world_size")


@dataclass(frozen=True)
class Result:
    """What an entry reached under a budget with one seed."""

    place: Place
    samples: float
    seconds: float
    """In the training loop of the stages, without start, evaluations and checkpoints."""
    flops: float
    memory_bytes: int
    value: float
    """The number that its entry is measured by."""
    numbers: dict[str, float]
    """All that its evaluations found."""
    course: tuple[Point, ...]
    clock_seconds: dict[str, float]
    """Of every process, its start and evaluations included, by the folder that it wrote to."""

    @property
    def name(self) -> str:
        """Of its entry."""
        return self.place.entry.name

    def minutes_to(self, target: float) -> float | None:
        """Of training, until the first evaluation at or above a target; None if there is none."""
        seconds = seconds_to(target, self.course)
        return None if seconds is None else seconds / 60


def result_of(place: Place, clock_seconds: dict[str, float]) -> Result:
    """What the run directories of an entry say.

    Raises:
        InputError: if they were not measured by the number of the entry.
    """
    entry = place.entry
    numbers = numbers_of(place.measured)
    if entry.measured_by not in numbers:
        raise InputError(
            f"{place.measured} was not measured by {entry.measured_by}, as the group "
            f"{entry.group!r} is to be; give the evaluation its data in the flags of the group, or "
            "another number in measured_by"
        )
    value = numbers[entry.measured_by]
    probed = value if entry.probe is not None else None
    costs = [cost_of(run) for run in place.stages]
    return Result(
        place=place,
        samples=sum(cost.samples for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
        flops=sum(cost.flops for cost in costs),
        memory_bytes=max(cost.memory_bytes for cost in costs),
        value=value,
        numbers=numbers,
        course=course_of(place.stages, costs, entry.measured_by, measured=probed),
        clock_seconds=clock_seconds,
    )


def under(results: Sequence[Result], kind: str) -> dict[str, list[Result]]:
    """The results under a budget by the names of their entries, seed by seed."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.place.kind in (FIRST, kind):
            found.setdefault(result.name, []).append(result)
    return found


def write_results(
    options: Options, results: Sequence[Result], prices: Mapping[str, Sequence[Price]]
) -> None:
    """Write ``results.json``: where and how it was measured, the trials, and every number."""
    content = {
        "machine": machine(results[0].place.last),
        "command": sys.argv[1:],
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
        },
        "trials": {name: [vars(price) for price in own] for name, own in prices.items()},
        "results": [_as_json(result, options.target) for result in results],
    }
    write_json(options.out / "results.json", content)


def _as_json(result: Result, targets: Sequence[float]) -> dict[str, Any]:
    place = result.place
    return {
        "entry": result.name,
        "group": place.entry.group,
        "equal": place.kind,
        "seed": place.seed,
        "runs": [str(run) for run in place.runs],
        "samples": result.samples,
        "seconds": result.seconds,
        "flops": result.flops,
        "memory_bytes": result.memory_bytes,
        "measured_by": place.entry.measured_by,
        "value": result.value,
        "numbers": result.numbers,
        "course": [vars(point) for point in result.course],
        "minutes_to": {f"{target:g}": result.minutes_to(target) for target in targets},
        "clock_seconds": result.clock_seconds,
    }


def machine(run: Path) -> dict[str, Any]:
    """What a run was computed by, and when and at which commit this is said."""
    environment = read_json_object(run / "environment.json")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        **{name: environment[name] for name in _OF_ENVIRONMENT if name in environment},
    }


def _processor() -> str | None:
    """The name of the processor, where the system tells it."""
    try:
        lines = read_lines(Path("/proc/cpuinfo"))
    except InputError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _commit() -> str | None:
    """The commit of the sources that this is a part of; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
