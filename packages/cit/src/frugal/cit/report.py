"""What the report of a run tells about what it chose."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from frugal.cit.curation import Example, Facts
from frugal.cit.curation_files import curations_of, read_about

_SHOWN = 3
"""Curations: the first, the middle one and the last."""


def sections_of(run_dir: Path) -> list[tuple[str, str]]:
    """Titles and HTML: captions that were chosen and rejected, with their nearest classes."""
    files = curations_of(run_dir)
    if not files:
        return []
    last = len(files) - 1
    shown = sorted({place * last // (_SHOWN - 1) for place in range(_SHOWN)})
    parts = [_curation(*read_about(files[place])) for place in shown]
    lead = (
        "Captions of the first ones that a curation looked at, from the nearest to the farthest, "
        "with the class of the metadata that is nearest and the cosine with it."
    )
    return [("What it chose to learn from", f"<p>{lead}</p>{''.join(parts)}")]


def _curation(facts: Facts, examples: Sequence[Example]) -> str:
    words = (
        f"Curation {facts.period}: {facts.kept:,} of {facts.scanned:,} captions were kept "
        f"({100 * facts.kept_ratio:.1f}&thinsp;%) at a threshold of {facts.threshold:g}; the "
        f"nearest had a cosine of {facts.best:.3f}."
    )
    if facts.fallbacks:
        words += f" In {facts.fallbacks:,} units too few were above it, and the nearest were taken."
    tables = "".join(
        _table(name, [example for example in examples if example.chosen == chosen])
        for name, chosen in (("Chosen", True), ("Rejected", False))
    )
    return f'<p>{words}</p><div class="figures">{tables}</div>'


def _table(title: str, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in (title, "nearest class", "cosine"))
    rows = "".join(
        f"<tr><td>{escape(example.caption)}</td><td>{escape(example.nearest)}</td>"
        f"<td>{example.similarity:.3f}</td></tr>"
        for example in examples
    )
    return f'<figure class="scroll"><table class="numbers"><tr>{head}</tr>{rows}</table></figure>'
