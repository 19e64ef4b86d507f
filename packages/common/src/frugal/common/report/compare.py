"""Compare models on a page: ``python -m frugal.common.compare runs/a runs/b --out compared``.

What was measured by ``python -m frugal.common.evaluate`` is read; no model is loaded. Intervals
come from drawing the images anew with replacement (bootstrap), the same draws for every model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from markupsafe import Markup

from frugal.common.cli import read_options, run_politely
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import (
    SampleResults,
    bootstrap,
    interval,
    load_sample_results,
)
from frugal.common.evaluation.results import OUTCOMES, read_facts
from frugal.common.files import write_file, write_json
from frugal.common.report.page import percent, render
from frugal.common.report.plots import interval_chart


@dataclass(frozen=True)
class Measured:
    """What one model left behind."""

    name: str
    tasks: dict[str, SampleResults]
    """By the name of the task."""
    facts: dict[str, dict[str, Any]]
    """What each task says of the model it measured."""

    @property
    def identity(self) -> list[str]:
        """Checkpoint, weights, library and the first digits of the weights' SHA-256."""
        facts = next(iter(self.facts.values()), {})
        words = [str(facts.get(name, "")) for name in ("checkpoint", "pretrained", "library")]
        return [*words, str(facts.get("weights_sha256", ""))[:16]]


def read_measured(name: str, folder: Path) -> Measured:
    """What was found image by image, in an evaluation folder or in a run directory.

    Raises:
        InputError: if there is nothing, or a file is damaged.
    """
    inside = folder / "evaluation"
    folder = inside if inside.is_dir() else folder
    files = sorted(folder.glob(f"*{OUTCOMES}")) if folder.is_dir() else []
    if not files:
        raise InputError(
            f"{folder} holds nothing to compare (files that end with {OUTCOMES}); give an "
            "evaluation folder that python -m frugal.common.evaluate wrote"
        )
    tasks, facts = {}, {}
    for file in files:
        task = file.name.removesuffix(OUTCOMES)
        tasks[task] = load_sample_results(file)
        facts[task] = read_facts(folder, task)
    return Measured(name, tasks, facts)


@dataclass(frozen=True)
class Entry:
    """One number of one model."""

    model: str
    value: float
    low: float
    high: float
    difference: tuple[float, float, float] | None = None
    """From the first model, on the same drawn images: the number, and its interval. None for the
    first model, and for one that was measured on other images."""
    other_images: bool = False
    """Whether it was measured on other images than the first model."""
    earlier: bool = False
    """Whether that cannot be known: one of the two was measured by an earlier version, which told
    data by names and sizes and not by bytes."""

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        return self.difference is not None and not self.difference[1] <= 0 <= self.difference[2]


@dataclass(frozen=True)
class Row:
    """One number of one task, of every model that has it."""

    task: str
    number: str
    num_images: int
    entries: list[Entry]


def compare_models(
    models: Sequence[Measured], *, times: int, confidence: float, seed: int
) -> list[Row]:
    """Every number that a model has, with bootstrap intervals over the images.

    Args:
        models: the first is what the others are compared with.
        times: samples of images that are drawn; the same for all models.
        confidence: share of the drawn numbers that an interval holds.
        seed: of the draws.
    """
    rows = []
    for task in dict.fromkeys(task for model in models for task in model.tasks):
        having = [model for model in models if task in model.tasks]
        numbers = dict.fromkeys(n for model in having for n in model.tasks[task].measures)
        for number in numbers:
            own = [model for model in having if number in model.tasks[task].measures]
            rows.append(_row(task, number, own, times, confidence, seed))
    return rows


def _row(
    task: str, number: str, models: list[Measured], times: int, confidence: float, seed: int
) -> Row:
    outcomes = [model.tasks[task] for model in models]
    first = outcomes[0]
    drawn, values = [], []
    for each in outcomes:  # anew each time: the same draws for the same images
        generator = torch.Generator().manual_seed(seed)
        drawn.append(bootstrap([each], number, times=times, generator=generator)[0])
        values.append(float(each.number(number)))
    entries = []
    for model, each, sample, value in zip(models, outcomes, drawn, values, strict=True):
        low, high = interval(sample, confidence)
        difference, same = None, each is first or _same_images(each, first)
        earlier = (
            each is not first and same and any(_is_earlier(m, task) for m in (models[0], model))
        )
        if each is not first and same and not earlier:
            difference = (value - values[0], *interval(sample - drawn[0], confidence))
        entries.append(
            Entry(model.name, value, low, high, difference, other_images=not same, earlier=earlier)
        )
    return Row(task, number, first.num_images, entries)


def _is_earlier(model: Measured, task: str) -> bool:
    """Whether a version measured it that told data by names and sizes; it kept no config digest."""
    facts = model.facts.get(task, {})
    return bool(facts) and facts.keys().isdisjoint(("config_digest", "config_sha256"))


def _same_images(one: SampleResults, other: SampleResults) -> bool:
    return (
        one.facts.get("data_sha256") == other.facts.get("data_sha256")
        and one.num_images == other.num_images
    )


def content(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, for JSON, which holds no number that is not finite."""
    return [
        {
            "task": row.task,
            "number": row.number,
            "images": row.num_images,
            "models": [
                {
                    "model": entry.model,
                    "value": entry.value,
                    "interval": [entry.low, entry.high],
                    "difference": entry.difference,
                    "other_images": entry.other_images,
                    "earlier_version": entry.earlier,
                }
                for entry in row.entries
            ],
        }
        for row in rows
    ]


def refusals(rows: Sequence[Row]) -> list[str]:
    """Why there is no difference between models that may have been measured on the same images."""
    tasks = {(row.task, entry.model): row for row in rows for entry in row.entries if entry.earlier}
    return [
        f"{task}: it cannot be told whether {name} and {row.entries[0].model} were measured on the "
        "same images, because one of them was measured by an earlier version, which did not look "
        "at the bytes; measure it again"
        for (task, name), row in tasks.items()
    ]


def _chart(row: Row) -> Markup:
    """The numbers of a row with their intervals, as a picture."""
    return interval_chart(
        f"{row.number} of {len(row.entries)} models with intervals",
        [(_short(entry.model), entry.low, entry.value, entry.high) for entry in row.entries],
        as_words=lambda share: percent(share).unescape(),
    )


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


# The command.


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write compare.html and compare.json about what several models were measured at."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Evaluation folders, or run directories; differences are from the first."""
    out: Path = Path("compared")
    """Folder of the page."""
    names: tuple[str, ...] = ()
    """What to call the models; by default the ends of their paths."""
    resamples: int = 1_000
    """Samples of images that are drawn."""
    confidence: float = 0.95
    """Share of the drawn numbers that an interval holds."""
    seed: int = 0
    """Of the draws."""


def compare(options: Options) -> Path:
    """Read, draw, write; the path of the page.

    Raises:
        InputError: if there is nothing to compare.
    """
    _check(options)
    names = options.names or _names(options.folders)
    models = [
        read_measured(name, folder) for name, folder in zip(names, options.folders, strict=True)
    ]
    rows = compare_models(
        models, times=options.resamples, confidence=options.confidence, seed=options.seed
    )
    summary = (
        f"Intervals hold {options.confidence:.0%} of the numbers of {options.resamples:,} samples "
        f"of the images, drawn with replacement (seed {options.seed}). Differences are from "
        f"{names[0]} on the same samples; those whose interval leaves out zero are bold."
    )
    page = render(
        "compare.html.j2",
        title=f"{', '.join(names[:-1])} and {names[-1]}",
        summary=summary,
        models=models,
        chart=_chart,
        tasks={
            task: [row for row in rows if row.task == task]
            for task in dict.fromkeys(row.task for row in rows)
        },
    )
    numbers = {
        "confidence": options.confidence,
        "resamples": options.resamples,
        "seed": options.seed,
        "numbers": content(rows),
    }
    path = options.out / "compare.html"
    write_json(options.out / "compare.json", numbers)
    write_file(path, page)
    _print(rows)
    for line in refusals(rows):
        sys.stdout.write(f"\n{line}\n")
    sys.stdout.write(f"\nThe comparison is {path}; open it in a browser.\n")
    return path


def _check(options: Options) -> None:
    count = len(options.folders)
    if count < 2:
        raise InputError(
            f"there {'is only one folder' if count else 'are no folders'} to compare; give two or "
            "more"
        )
    if options.names and len(options.names) != count:
        raise InputError(
            f"--names has {len(options.names)} names for {count} folders; give one for each"
        )
    if len(set(options.names)) < len(options.names):
        raise InputError("--names has a name twice; give every model its own")
    if options.resamples < 1:
        raise InputError(f"--resamples is {options.resamples}, must be at least 1")
    if not 0 < options.confidence < 1:
        raise InputError(f"--confidence is {options.confidence}, must lie between 0 and 1")


def _names(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """The shortest ends of the paths that tell them apart."""
    parts = [[p for p in folder.resolve().parts if p != "evaluation"] for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(own[-length:]) for own in parts)
        if len(set(names)) == len(names):
            return names
    raise InputError("a folder is given twice; give every model once, or --names")


def _print(rows: list[Row]) -> None:
    for row in rows:
        sys.stdout.write(f"{row.number} ({row.num_images:,} images)\n")
        for entry in row.entries:
            more = "   (other images: no difference is given)" if entry.other_images else ""
            if entry.difference is not None:
                value, low, high = entry.difference
                more = f"   {value:+8.2%} ({low:+.2%} to {high:+.2%})"
            span = f"({entry.low:.2%} to {entry.high:.2%})"
            sys.stdout.write(f"{entry.model:>32}  {entry.value:8.2%} {span}{more}\n")


def main() -> None:
    """The body of ``python -m frugal.common.compare``."""

    def command() -> None:
        compare(read_options(Options, "python -m frugal.common.compare"))

    run_politely(command, alone=True)
