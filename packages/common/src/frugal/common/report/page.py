"""From numbers, curves and examples to ``report.html`` and ``report.json``.

The templates escape everything; only what is marked as HTML (``Markup``) goes in as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from frugal.common.evaluation.sugarcrepe import KINDS, PARTS
from frugal.common.files import finite, write_file, write_json
from frugal.common.report.collect import REQUIRED, read_metrics
from frugal.common.report.examples import ClassRecall, Examples
from frugal.common.report.goodput import NAMES, time_spent
from frugal.common.report.plots import data_uri, learning_curves, short_number

_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Command:
    """Something to type next."""

    purpose: str
    line: str


def write_report(
    folder: Path,
    *,
    numbers: Mapping[str, Any],
    stages: Mapping[str, Path],
    examples: Examples | None = None,
    about_data: Sequence[tuple[str, str]] = (),
    commands: Sequence[Command] = (),
    title: str = "Training report",
    summary: str = "",
) -> Path:
    """Write ``report.html`` and ``report.json`` into a folder.

    Args:
        folder: made if missing.
        numbers: everything of ``REQUIRED`` and whatever else the evaluations gave; goes into
            ``report.json`` as it is, numbers that are not finite as null.
        stages: name and run directory (with ``metrics.jsonl``) of each stage of the training, in
            order; a stage's curve begins at the samples where the one before it ended.
        examples: images and what the model makes of them.
        about_data: titles and HTML of what is to be told of the training data.
        commands: what to type next.
        title: of the page.
        summary: a sentence below the title.

    Returns:
        The path of the page.

    Raises:
        ValueError: if a required number is missing.
    """
    missing = [name for name in REQUIRED if name not in numbers]
    if missing:
        raise ValueError(f"a report needs {', '.join(missing)}")
    numbers = finite(numbers)
    examples = examples or Examples()
    logged = {name: read_metrics(run_dir) for name, run_dir in stages.items()}
    page = render(
        "report.html.j2",
        title=title,
        summary=summary,
        numbers=numbers,
        scores=_scores(numbers),
        stages=stages,
        charts=learning_curves(logged) if any(logged.values()) else None,
        damage=_damage(logged),
        goodput=_goodput(stages),
        about_data=[(name, Markup(html)) for name, html in about_data],
        examples=examples,
        grid=_as_grid(examples.classes),
        parts=PARTS.values(),
        composition=_composition(numbers),
        commands=commands,
    )
    path = folder / "report.html"
    write_json(folder / "report.json", numbers)
    write_file(path, page)
    return path


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled in.

    ``page.html.j2`` takes ``title``, ``summary`` ("" for none) and ``sections``, each a title and
    its HTML as ``Markup``.
    """
    environment = Environment(
        loader=PackageLoader("frugal.common.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": data_uri,
        "duration": duration,
        "percent": percent,
        "plain": _plain,
        "short": lambda value: _NONE if value is None else short_number(value),
        "signed": signed,
        "width": lambda share: f"{100 * min(max(share, 0.0), 1.0):.1f}%",
    }
    return environment.get_template(template).render(values)


# How numbers are written.


def percent(share: float | None) -> Markup:
    """A share as percent; a dash for a number that is not there."""
    if share is None or math.isnan(share):
        return Markup(_NONE)
    return Markup(f"{100 * share:.1f}&thinsp;%")


def signed(difference: float) -> str:
    """A difference of shares as percent, with its sign."""
    if math.isnan(difference):
        return _NONE
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:g}"
    return _NONE if value is None else str(value)


# What the template is given.


@dataclass(frozen=True)
class _Score:
    name: str
    share: float | None
    note: str = ""


def _scores(numbers: Mapping[str, Any]) -> list[_Score]:
    """What a model of images and captions, or else of images, is good at, against chance."""
    classes = numbers.get("zero_shot_classes")
    candidates = numbers["retrieval_candidates"]
    notes = {
        "zero_shot_top1": ("Zero-shot, top 1", _chance(classes, "classes")),
        "zero_shot_top1_held_out": ("Never seen in training", _held_out_note(numbers)),
        "image_retrieval_recall_at_1": ("Text finds image", _chance(candidates, "images")),
        "text_retrieval_recall_at_1": ("Image finds text", _chance(candidates, "images")),
    }
    scores = [_Score(name, numbers[key], note) for key, (name, note) in notes.items()]
    if any(score.share is not None for score in scores):
        return scores
    return [
        _Score(key.removesuffix(ending).replace("_", " ").capitalize() + name, value)
        for key, value in numbers.items()
        for ending, name in (("_top1", ", top 1"), ("_miou", ", mean intersection over union"))
        if key.endswith(ending) and value is not None
    ]


def _chance(options: int | None, what: str) -> str:
    return (
        Markup("chance {} among {:,} {}").format(percent(1 / options), options, what)
        if options
        else ""
    )


def _held_out_note(numbers: Mapping[str, Any]) -> str:
    count = numbers.get("zero_shot_classes_held_out")
    if numbers["zero_shot_top1_held_out"] is None:
        return "the data holds no class out"
    held_out = f"{count} classes held out" if count else "classes held out"
    options = numbers.get("zero_shot_classes")
    return Markup("{}; chance {}").format(held_out, percent(1 / options)) if options else held_out


def _damage(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of what every stage could not use of its data, and why.

    Args:
        stages: the lines of ``metrics.jsonl`` of each stage, in order.
    """
    rows: list[tuple[str, ...]] = []
    for name, lines in stages.items():
        last = lines[-1] if lines else {}
        read = last.get("read_samples")
        for kind in ("damaged", "passed_over"):
            counts = last.get(kind)
            for reason, count in counts.items() if isinstance(counts, dict) else ():
                share = f" of {read:,} read" if kind == "damaged" and read else ""
                rows.append((name, kind.replace("_", " "), reason, f"{count:,}{share}"))
    return rows


def _goodput(stages: Mapping[str, Path]) -> list[tuple[str, ...]]:
    """Rows of what every stage spent its time on, with the share of its whole."""
    rows: list[tuple[str, ...]] = []
    for name, run_dir in stages.items():
        spent = time_spent(run_dir) or {}
        total = sum(spent.values())
        rows += [
            (name, NAMES[what], duration(seconds), percent(seconds / total))
            for what, seconds in spent.items()
            if round(seconds, 1) > 0
        ]
    return rows


def _composition(numbers: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Shares of the items that are right: how a caption is made false, by what of it changes."""
    table = {}
    for kind in KINDS:
        shares = [numbers.get(f"compositional_{kind}_{part}") for part in PARTS]
        shares.append(numbers.get(f"compositional_{kind}"))
        if any(share is not None for share in shares):
            table[kind] = shares
    return table


@dataclass(frozen=True)
class _Grid:
    """Classes by the first and the second word of their names."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, ...], ClassRecall]


def _as_grid(classes: Sequence[ClassRecall]) -> _Grid | None:
    """The classes in a grid, where their names are all pairs of words ("red circle")."""
    cells = {tuple(item.name.split()): item for item in classes}
    if not cells or any(len(pair) != 2 for pair in cells):
        return None
    rows, columns = (list(dict.fromkeys(words)) for words in zip(*cells, strict=True))
    is_full = len(rows) * len(columns) == len(cells) == len(classes)
    return _Grid(rows, columns, cells) if is_full and len(rows) > 1 and len(columns) > 1 else None
