"""The sections of the report: from numbers and examples to HTML.

Everything that comes from data (captions, class names) is escaped; pictures are data URIs.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from frugal.common.evaluation.curves import Curve, line_chart, short_number
from frugal.common.evaluation.pictures import as_array, to_pil
from frugal.common.evaluation.sugarcrepe import KINDS, PARTS

if TYPE_CHECKING:
    from frugal.common.evaluation.examples import (
        ClassRecall,
        Confusion,
        Drawing,
        Example,
        MaskedExample,
    )

_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Command:
    """Something to type next."""

    purpose: str
    line: str


def section(title: str, content: str) -> str:
    """A titled part of the page; nothing where there is no content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


# The headline: what a reader wants to know first.


def _percent(fraction: float | None) -> str:
    return _NONE if fraction is None else f"{100 * fraction:.1f}&thinsp;%"


def _card(name: str, value: str, note: str, *, share: float | None = None) -> str:
    meter = ""
    if share is not None:
        meter = f'<div class="meter"><i style="width:{100 * min(max(share, 0), 1):.1f}%"></i></div>'
    return (
        f'<div class="card"><div class="name">{name}</div><div class="value">{value}</div>'
        f'{meter}<div class="note">{note}</div></div>'
    )


def _against_chance(options: Any, what: str) -> str:
    if not options:
        return ""
    return f"chance {_percent(1 / options)} among {options:,} {what}"


def headline(numbers: Mapping[str, Any]) -> str:
    """What a reader wants to know first, each against chance."""
    cards = []
    for name, share, note in _shares(numbers):
        cards.append(_card(name, _percent(share), note, share=share))
    seen, seconds, speed = (
        numbers[key] for key in ("samples_seen", "train_seconds", "samples_per_second")
    )
    processes = numbers["world_size"]
    word = "process" if processes == 1 else "processes"
    cards.append(
        _card(
            "Samples seen",
            _NONE if seen is None else f"{seen:,}",
            f"in {duration(seconds)} of training",
        )
    )
    cards.append(
        _card(
            "Samples per second",
            _NONE if speed is None else short_number(speed),
            f"{escape(str(numbers['engine']))}, {processes} {word}",
        )
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def missing(numbers: Mapping[str, Any]) -> str:
    """What the page has no numbers of, and why."""
    reasons = numbers.get("not_measured") or {}
    lines = [
        f"{escape(name.replace('_', ' '))}: {escape(reason)}" for name, reason in reasons.items()
    ]
    return f'<p class="quiet">Not on this page: {"; ".join(lines)}.</p>' if lines else ""


def damage(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many samples every stage read, and what of its data it could not use.

    Args:
        stages: the lines of ``metrics.jsonl`` of each stage, in order.

    Returns:
        A table, or nothing where nothing was damaged or passed over.
    """
    rows = []
    for name, lines in stages.items():
        last = lines[-1] if lines else {}
        read = last.get("read_samples")
        for kind in ("damaged", "passed_over"):
            counts = last.get(kind)
            for reason, count in counts.items() if isinstance(counts, dict) else ():
                share = f" of {read:,} read" if kind == "damaged" and read else ""
                words = (name, kind.replace("_", " "), reason, f"{count:,}{share}")
                cells = "".join(f"<td>{escape(word)}</td>" for word in words)
                rows.append(f"<tr>{cells}</tr>")
    if not rows:
        return ""
    return f'<div class="scroll"><table class="numbers">{"".join(rows)}</table></div>'


def _shares(numbers: Mapping[str, Any]) -> list[tuple[str, float | None, str]]:
    """(name, share, note) of what a model of images and captions, or else of images, is good at."""
    classes = numbers.get("zero_shot_classes")
    candidates = numbers["retrieval_candidates"]
    found = [
        ("Zero-shot, top 1", "zero_shot_top1", _against_chance(classes, "classes")),
        ("Never seen in training", "zero_shot_top1_held_out", _held_out_note(numbers)),
        ("Text finds image", "image_retrieval_recall_at_1", _against_chance(candidates, "images")),
        ("Image finds text", "text_retrieval_recall_at_1", _against_chance(candidates, "images")),
    ]
    shares = [(name, numbers[key], note) for name, key, note in found]
    others = [
        (escape(key.removesuffix(ending).replace("_", " ").capitalize() + name), value, "")
        for key, value in numbers.items()
        for ending, name in (("_top1", ", top 1"), ("_miou", ", mean intersection over union"))
        if key.endswith(ending) and value is not None
    ]
    return shares if any(share is not None for _, share, _ in shares) else others


def _held_out_note(numbers: Mapping[str, Any]) -> str:
    count = numbers.get("zero_shot_classes_held_out")
    if numbers["zero_shot_top1_held_out"] is None:
        return "the data holds no class out"
    held_out = f"{count} classes held out" if count else "classes held out"
    options = numbers.get("zero_shot_classes")
    return f"{held_out}; chance {_percent(1 / options)}" if options else held_out


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


# Learning curves.

_CHARTS = (
    ("loss", "Loss", True, False),
    ("accuracy", "Right within the batch", True, True),
    ("cosine_hidden", "Cosine of predicted and wanted features, hidden patches", True, True),
    ("importance_seen", "Share of the teacher's attention on seen patches", True, True),
    ("kept_ratio", "Share of the scanned captions that are kept", False, True),
    ("learning_rate", "Learning rate", False, True),
    ("samples_per_second", "Samples per second", False, True),
)
"""Key in ``metrics.jsonl``, title, whether smoothed, whether from zero."""


def curves(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Charts of what the stages logged, one after the other along the samples.

    Args:
        stages: the lines of ``metrics.jsonl`` of each stage, in order.
    """
    if not any(stages.values()):
        return ""
    legend = "".join(
        f'<span><i style="background:var(--line-{number % 3 + 1})"></i>{escape(name)}</span>'
        for number, name in enumerate(stages)
    )
    figures = []
    for key, title, smoothed, from_zero in _CHARTS:
        lines = _lines(stages, key)
        if not any(line.points for line in lines):
            continue
        chart = line_chart(
            title,
            lines,
            x_name="samples seen",
            description=_course(lines),
            from_zero=from_zero,
            smoothed=smoothed,
        )
        figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>")
    return f'<p class="legend">{legend}</p><div class="figures">{"".join(figures)}</div>'


def _lines(stages: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> list[Curve]:
    """One curve per stage; each begins at the samples where the one before it ended."""
    lines, start = [], 0.0
    for name, logged in stages.items():
        points = [
            (start + line["samples"], float(line[key]))
            for line in logged
            if isinstance(line.get(key), (int, float))
        ]
        lines.append(Curve(name, tuple(points)))
        start += max((line["samples"] for line in logged), default=0)
    return lines


def _course(curves: Sequence[Curve]) -> str:
    words = [
        f"{curve.name}: from {short_number(curve.points[0][1])} to "
        f"{short_number(curve.points[-1][1])}"
        for curve in curves
        if curve.points and all(math.isfinite(curve.points[end][1]) for end in (0, -1))
    ]
    return "; ".join(words)


# Pictures.


def _image(picture: Any, alt: str, *, exact: bool = False) -> str:
    """An ``<img>`` that carries its picture; small and drawn ones as PNG, photos as JPEG."""
    height, width = as_array(picture).shape[1:]
    exact = exact or max(height, width) <= 128
    file = io.BytesIO()
    to_pil(picture).save(
        file, **({"format": "PNG"} if exact else {"format": "JPEG", "quality": 88})
    )
    kind = "png" if exact else "jpeg"
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/{kind};base64,{encoded}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}">'
    )


def masked(examples: Sequence[MaskedExample]) -> str:
    """Images beside what a reduction leaves of them."""
    if not examples:
        return ""
    share = sum(example.kept for example in examples) / sum(e.patches for e in examples)
    cards = "".join(
        f'<figure class="pair">{_image(example.image, example.caption or "an example image")}'
        f"{_image(example.masked, f'the same, {example.kept} of {example.patches} patches kept')}"
        f"<figcaption>{escape(example.caption)}</figcaption></figure>"
        for example in examples
    )
    if share == 1:
        lead = "Every patch of an image is encoded."
    else:
        lead = (
            f"{_percent(share)} of the patches of an image are encoded; the hatched ones are "
            "never computed."
        )
    return f'<p>{lead}</p><div class="pictures">{cards}</div>'


def drawn(drawing: Drawing | None) -> str:
    """The picture that a reduction or an objective draws of what it does."""
    if drawing is None:
        return ""
    name = escape(drawing.artist)
    picture = _image(drawing.picture, f"what {drawing.artist} draws of some images", exact=True)
    return f'<p>Drawn by {name} itself.</p><div class="drawn">{picture}</div>'


def _guesses(example: Example, *, as_percent: bool) -> str:
    rows = []
    for guess in example.guesses:
        score = _percent(guess.score) if as_percent else f"{guess.score:.2f}"
        mark = "right" if guess.right else "wrong"
        sign = "✓" if guess.right else ""
        width = 100 * min(max(guess.score, 0.0), 1.0)
        rows.append(
            f'<li class="{mark}"><span class="bar" style="width:{width:.1f}%"></span>'
            f'<span class="words">{escape(guess.text)} {sign}</span>'
            f'<span class="score">{score}</span></li>'
        )
    return f'<ol class="guesses">{"".join(rows)}</ol>'


def classified(examples: Sequence[Example]) -> str:
    """Images, what they are, and the model's most probable classes."""
    if not examples:
        return ""
    cards = "".join(
        f'<figure class="answer">{_image(example.image, example.truth[0])}'
        f"<figcaption>{escape(example.truth[0])}</figcaption>"
        f"{_guesses(example, as_percent=True)}</figure>"
        for example in examples
    )
    lead = "Beside each image stands what it is, then what the model says and how sure it is."
    return f'<p>{lead}</p><div class="pictures answers">{cards}</div>'


def _compared(examples: Sequence[Example], notes: Sequence[str]) -> str:
    """Images beside captions with their cosines, and a note below."""
    cards = "".join(
        f'<figure class="answer wide">{_image(example.image, example.truth[0])}'
        f"{_guesses(example, as_percent=False)}"
        f'<figcaption class="quiet">{escape(note)}</figcaption></figure>'
        for example, note in zip(examples, notes, strict=True)
    )
    return f'<div class="pictures wide">{cards}</div>'


def retrieved(examples: Sequence[Example]) -> str:
    """Images and the captions that the model finds nearest."""
    if not examples:
        return ""
    lead = "The nearest of all candidate captions, by cosine; the image's own are marked."
    notes = [f"written for it: {example.truth[0]}" for example in examples]
    return f"<p>{lead}</p>{_compared(examples, notes)}"


# Composition.


def contrasted(numbers: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """How often a true caption is nearer than one made false, by category, and some of both."""
    table = _composition(numbers)
    cards = _compared(examples, [example.question for example in examples]) if examples else ""
    if not table and not cards:
        return ""
    lead = (
        "Each image has a caption that is true of it and one that was made false; the model is "
        "right where the true one, marked here, is nearer."
    )
    return f"<p>{lead}</p>{table}{cards}"


def _composition(numbers: Mapping[str, Any]) -> str:
    """Percent of the items that are right: how a caption is made false by what of it changes."""
    columns = [*PARTS, "mean"]
    rows = []
    for kind in KINDS:
        shares = [numbers.get(f"compositional_{kind}_{part}") for part in PARTS]
        shares.append(numbers.get(f"compositional_{kind}"))
        if any(share is not None for share in shares):
            cells = "".join(map(_share, shares))
            rows.append(f'<tr><th scope="row">{kind}</th>{cells}</tr>')
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{PARTS.get(name, name)}</th>' for name in columns)
    return (
        '<div class="card"><p>Percent of the items that are right; chance is 50.</p>'
        f'<div class="scroll"><table class="grid"><tr><td></td>{head}</tr>{"".join(rows)}</table>'
        "</div></div>"
    )


def _share(share: float | None) -> str:
    """A cell that is the darker the larger the share."""
    if share is None:
        return f"<td>{_NONE}</td>"
    return f'<td style="--share:{100 * share:.0f}%">{100 * share:.1f}</td>'


# Classes.


def _as_grid(classes: Sequence[ClassRecall]) -> tuple[list[str], list[str]] | None:
    """First and second words, where the class names are all pairs of them ("red circle")."""
    words = [item.name.split() for item in classes]
    if not words or any(len(pair) != 2 for pair in words):
        return None
    rows = list(dict.fromkeys(pair[0] for pair in words))
    columns = list(dict.fromkeys(pair[1] for pair in words))
    is_full = len(rows) * len(columns) == len(classes) == len({item.name for item in classes})
    return (rows, columns) if is_full and len(rows) > 1 and len(columns) > 1 else None


def _cell(item: ClassRecall) -> str:
    mark = ' class="held-out"' if item.held_out else ""
    if not item.images:
        return f"<td{mark}>{_NONE}</td>"
    percent = f"{100 * item.right / item.images:.0f}"
    words = escape(f"{item.name}: {item.right} of {item.images}")
    return f'<td{mark} style="--share:{percent}%" title="{words}">{percent}</td>'


def classes(classes: Sequence[ClassRecall], confused: Sequence[Confusion]) -> str:
    """How each class fared: a grid where their names are pairs, and the commonest mistakes."""
    grid = _as_grid(classes)
    parts = []
    if grid:
        rows, columns = grid
        by_name = {tuple(item.name.split()): item for item in classes}
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
        body = "".join(
            f'<tr><th scope="row">{escape(row)}</th>'
            + "".join(_cell(by_name[row, column]) for column in columns)
            + "</tr>"
            for row in rows
        )
        outlined = " Outlined: never seen in training." if any(c.held_out for c in classes) else ""
        parts.append(
            f"<div><p>Percent of the images of each class that are recognized.{outlined}</p>"
            f'<div class="scroll"><table class="grid"><tr><td></td>{head}</tr>{body}</table></div>'
            "</div>"
        )
    if confused:
        items = "".join(
            f"<li><b>{escape(item.truth)}</b> taken for <b>{escape(item.said)}</b>"
            f'&nbsp;<span class="quiet">&times;&nbsp;{item.images}</span></li>'
            for item in confused
        )
        parts.append(f'<div><p>Most often confused.</p><ul class="confused">{items}</ul></div>')
    return f'<div class="classes">{"".join(parts)}</div>' if parts else ""


# The end of the page.


def commands(commands: Sequence[Command]) -> str:
    """What to type next."""
    return "".join(
        f"<p>{escape(command.purpose)}</p><pre><code>{escape(command.line)}</code></pre>"
        for command in commands
    )


def all_numbers(numbers: Mapping[str, Any]) -> str:
    """Everything that report.json holds, folded away."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in sorted(numbers.items())
    )
    return (
        f"<details><summary>All numbers (report.json)</summary>"
        f'<div class="scroll"><table class="numbers">{rows}</table></div></details>'
    )


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:g}"
    return _NONE if value is None else str(value)
