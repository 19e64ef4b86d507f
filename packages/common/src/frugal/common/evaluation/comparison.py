"""Several models on the same images: their numbers with intervals, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Outcomes, bootstrap, interval, load_outcomes
from frugal.common.evaluation.results import OUTCOMES, read_facts
from frugal.common.evaluation.sections import section


@dataclass(frozen=True)
class Measured:
    """What one model left behind."""

    name: str
    tasks: dict[str, Outcomes]
    """By the name of the task."""
    facts: dict[str, dict[str, Any]]
    """What each task says of the model it measured."""


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
        tasks[task] = load_outcomes(file)
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


def compare(models: Sequence[Measured], *, times: int, confidence: float, seed: int) -> list[Row]:
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
    return bool(facts) and "config_sha256" not in facts


def _same_images(one: Outcomes, other: Outcomes) -> bool:
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


# As a page.

_NAMES = 190
_WIDTH = 640
_LINE = 26


def body(models: Sequence[Measured], rows: Sequence[Row]) -> str:
    """A section for every task, and one that says which models these are."""
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        images = f"{own[0].num_images:,} images."
        parts.append(
            section(task.replace("_", " "), f"<p>{images}</p>{_figures(own)}{_table(own)}")
        )
    parts.append(section("Which models these are", _identities(models)))
    return "\n".join(parts)


def _figures(rows: Sequence[Row]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(row.number)}</figcaption>{_chart(row)}</figure>"
        for row in rows[:4]
    )
    return f'<div class="figures">{figures}</div>'


def _chart(row: Row) -> str:
    """A line from one end of the interval to the other, and a dot at the number."""
    ends = [end for entry in row.entries for end in (entry.low, entry.high, entry.value)]
    finite = [end for end in ends if math.isfinite(end)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low or max(abs(high), 1e-3))
    low, high = low - margin, high + margin

    def across(value: float) -> float:
        return _NAMES + (value - low) / (high - low) * (_WIDTH - _NAMES - 10)

    height = _LINE * len(row.entries) + 26
    lines = []
    for place, entry in enumerate(row.entries):
        if not math.isfinite(entry.low + entry.high + entry.value):
            continue
        y = _LINE * place + _LINE / 2
        lines.append(
            f'<text class="tick" x="0" y="{y + 4:.1f}">{escape(_short(entry.model))}</text>'
            f'<line x1="{across(entry.low):.1f}" x2="{across(entry.high):.1f}" y1="{y}" y2="{y}" '
            'style="stroke: var(--line-1); stroke-width: 3; opacity: 0.45"/>'
            f'<circle cx="{across(entry.value):.1f}" cy="{y}" r="5" style="fill: var(--line-1)"/>'
        )
    for value in (low + margin, high - margin):
        lines.append(
            f'<text class="tick" text-anchor="middle" x="{across(value):.1f}" y="{height - 6}">'
            f"{_percent(value)}</text>"
        )
    label = f"{row.number} of {len(row.entries)} models with intervals"
    return (
        f'<svg class="chart" viewBox="-4 0 {_WIDTH + 30} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(lines)}</svg>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def _table(rows: Sequence[Row]) -> str:
    head = "".join(
        f'<th scope="col">{escape(name)}</th>'
        for name in dict.fromkeys(entry.model for row in rows for entry in row.entries)
    )
    lines = []
    for row in rows:
        found = {entry.model: entry for entry in row.entries}
        names = dict.fromkeys(entry.model for other in rows for entry in other.entries)
        cells = "".join(_cell(found.get(name)) for name in names)
        lines.append(f'<tr><th scope="row">{escape(row.number)}</th>{cells}</tr>')
    return (
        '<div class="scroll"><table class="grid"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "<td>&ndash;</td>"
    span = f'<span class="quiet">{_percent(entry.low)} to {_percent(entry.high)}</span>'
    more = ""
    if entry.other_images:
        more = '<br><span class="quiet">other images</span>'
    if entry.earlier:
        more = '<br><span class="quiet">perhaps other images (of an earlier version)</span>'
    if entry.difference is not None:
        value, low, high = (_signed(part) for part in entry.difference)
        words = f"{value} ({low} to {high})"
        more = f"<br>{f'<b>{words}</b>' if entry.differs else words}"
    return f"<td>{_percent(entry.value)}<br>{span}{more}</td>"


def _percent(value: float) -> str:
    return "&ndash;" if math.isnan(value) else f"{100 * value:.1f}&thinsp;%"


def _signed(value: float) -> str:
    return "&ndash;" if math.isnan(value) else f"{100 * value:+.1f}".replace("-", "&minus;")


def _identities(models: Sequence[Measured]) -> str:
    lines = []
    for model in models:
        facts = next(iter(model.facts.values()), {})
        words = [str(facts.get(name, "")) for name in ("checkpoint", "pretrained", "library")]
        digest = str(facts.get("weights_sha256", ""))[:16]
        cells = "".join(f"<td>{escape(word)}</td>" for word in (*words, digest))
        lines.append(f'<tr><th scope="row">{escape(model.name)}</th>{cells}</tr>')
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("", "checkpoint", "weights", "from", "SHA-256")
    )
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
