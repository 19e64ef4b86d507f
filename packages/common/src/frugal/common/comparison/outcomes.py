"""What the files of finished runs say of a training: its cost, its course and its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from frugal.common.engine.evaluator import HISTORY
from frugal.common.errors import InputError
from frugal.common.files import read_json_lines, read_json_object


@dataclass(frozen=True)
class Cost:
    """What the steps of a run took, without start, evaluations and checkpoints."""

    points: tuple[tuple[float, float, float], ...]
    """Samples, seconds and FLOPs since the first step; the first point is 0, 0, 0."""
    memory_bytes: int
    """The most that a process held."""

    @property
    def samples(self) -> float:
        """Of the whole run."""
        return self.points[-1][0]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.points[-1][1]

    @property
    def flops(self) -> float:
        """Of the whole run, by the models' own arithmetic."""
        return self.points[-1][2]

    def at(self, samples: float) -> tuple[float, float]:
        """Seconds and FLOPs until some samples; between two log lines all steps are alike."""
        for before, after in pairwise(self.points):
            if samples <= after[0]:
                part = (samples - before[0]) / (after[0] - before[0])
                return (
                    before[1] + part * (after[1] - before[1]),
                    before[2] + part * (after[2] - before[2]),
                )
        return self.seconds, self.flops


def cost_of(run: Path) -> Cost:
    """What a run took.

    Raises:
        InputError: if it logged nothing.
    """
    points = [(0.0, 0.0, 0.0)]
    memory = 0
    for line in read_json_lines(run / "metrics.jsonl")[0]:
        before, seconds, flops = points[-1]
        took = (line["samples"] - before) / line["samples_per_second"]
        points.append((line["samples"], seconds + took, flops + took * line["flops_per_second"]))
        memory = max(memory, line["memory_bytes"])
    if len(points) == 1:
        raise InputError(f"{run} has logged no step; remove it, and start the command again")
    return Cost(tuple(points), memory)


def speed_of(cost: Cost) -> tuple[float, float]:
    """Samples per second and FLOPs per sample, the first log line left out: it warms up."""
    (first, start, flops), (last, end, all_flops) = cost.points[1], cost.points[-1]
    return (last - first) / (end - start), (all_flops - flops) / (last - first)


def numbers_of(run: Path) -> dict[str, float]:
    """Everything that the last evaluations of a run found, by name."""
    numbers: dict[str, float] = {}
    for file in sorted((run / "evaluation").glob("*.json")):
        content = read_json_object(file)
        numbers |= {
            name: value
            for name, value in content.items()
            if isinstance(value, int | float) and name not in ("step", "samples")
        }
    return numbers


def measured_on_the_way(run: Path, number: str) -> list[tuple[float, float]]:
    """Samples, and what a number was then, at every evaluation of a run that found it.

    Evaluations that a crash had done again count once.
    """
    found: dict[float, float] = {}
    for line in read_json_lines(run / "evaluation" / HISTORY)[0]:
        if isinstance(line.get(number), int | float):
            found[line["samples"]] = line[number]
    return sorted(found.items())


@dataclass(frozen=True)
class Point:
    """What an entry had reached at an evaluation, and what it had taken until then."""

    samples: float
    seconds: float
    flops: float
    value: float


def course_of(
    runs: Sequence[Path], costs: Sequence[Cost], number: str, *, measured: float | None = None
) -> tuple[Point, ...]:
    """What the stages of an entry reached on the way, one after the other.

    Args:
        runs: of its stages.
        costs: of these runs.
        number: of the evaluations.
        measured: what a probe found behind the last stage, in the place of evaluations.
    """
    points: list[Point] = []
    before = (0.0, 0.0, 0.0)
    for run, cost in zip(runs, costs, strict=True):
        if measured is None:
            for samples, value in measured_on_the_way(run, number):
                seconds, flops = cost.at(samples)
                points.append(
                    Point(before[0] + samples, before[1] + seconds, before[2] + flops, value)
                )
        before = (before[0] + cost.samples, before[1] + cost.seconds, before[2] + cost.flops)
    if measured is not None:
        points.append(Point(*before, measured))
    return tuple(points)


def seconds_to(target: float, course: Sequence[Point]) -> float | None:
    """Seconds of training until the first evaluation at or above a target; None if there is none.

    Between two evaluations nothing is known: no line is drawn from one to the other.
    """
    return next((point.seconds for point in course if point.value >= target), None)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation over seeds (0 for one seed)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows with aligned columns, for a terminal."""
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            word.rjust(width) if place else word.ljust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)
