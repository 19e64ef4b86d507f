"""Compare models on a page: ``python -m frugal.common.compare runs/a runs/b --out compared``.

What was measured by ``python -m frugal.common.evaluate`` is read; no model is loaded. Intervals
come from drawing the images anew with replacement (bootstrap), the same draws for every model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from frugal.common.cli import run_politely
from frugal.common.errors import InputError
from frugal.common.files import write_file, write_json
from frugal.common.words import command_words

if TYPE_CHECKING:
    from frugal.common.evaluation.comparison import Row


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
    from frugal.common.evaluation import comparison
    from frugal.common.evaluation.page import PAGE, STYLE

    names = options.names or _names(options.folders)
    models = [
        comparison.read_measured(name, folder)
        for name, folder in zip(names, options.folders, strict=True)
    ]
    rows = comparison.compare(
        models, times=options.resamples, confidence=options.confidence, seed=options.seed
    )
    summary = (
        f"Intervals hold {options.confidence:.0%} of the numbers of {options.resamples:,} samples "
        f"of the images, drawn with replacement (seed {options.seed}). Differences are from "
        f"{escape(names[0])} on the same samples; those whose interval leaves out zero are bold."
    )
    page = PAGE.format(
        title=escape(f"{', '.join(names[:-1])} and {names[-1]}"),
        style=STYLE,
        summary=f'<p class="summary">{summary}</p>',
        body=comparison.body(models, rows),
    )
    content = {
        "confidence": options.confidence,
        "resamples": options.resamples,
        "seed": options.seed,
        "numbers": comparison.content(rows),
    }
    path = options.out / "compare.html"
    write_json(options.out / "compare.json", content)
    write_file(path, page)
    _print(rows)
    for line in comparison.refusals(rows):
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
        compare(tyro.cli(Options, args=command_words(), prog="python -m frugal.common.compare"))

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
