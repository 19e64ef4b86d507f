"""Whole small trainings on scenes, from the command line, for benchmarks that compare recipes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from measuring import write

from frugal.common.comparison.outcomes import cost_of, mean_and_spread, table
from frugal.common.comparison.running import lasting
from frugal.common.report.page import render
from frugal.common.report.plots import Curve, legend, line_chart


@dataclass(frozen=True)
class Outcome:
    """What a finished training reached and what it took."""

    samples: int
    train_seconds: float
    """In the training loop, without start and evaluation."""
    flops: float
    """Of all steps, by the models' own arithmetic."""
    top1: float
    """Zero-shot, over all 64 classes."""
    top1_held_out: float


def scenes(folder: Path, *, train_samples: int, image_size: int) -> Path:
    """The data set, drawn if it is not there yet."""
    words = ["--train-samples", str(train_samples), "--image-size", str(image_size)]
    subprocess.run(
        [sys.executable, "-m", "frugal.common.scenes", "--out", str(folder), *words], check=True
    )
    return folder


def train_small(module: str, recipe: str, data: Path, run: Path, words: Sequence[str]) -> Outcome:
    """Train a recipe in one process, or read what an earlier call left in ``run``."""
    given = [f"--data.train={data / 'train'}", f"--evaluation.0.data={data}"]
    finish(module, recipe, run, [*given, "--run.log-every=20", "--run.save-every=100000", *words])
    return outcome(run)


def speed(module: str, recipe: str, data: Path, run: Path, words: Sequence[str]) -> float:
    """Samples per second of a short training in one process, start and evaluation left out.

    Trainings that take an hour together do not find the machine alike; short ones right after one
    another do.
    """
    given = [f"--data.train={data / 'train'}", "--run.log-every=4", *words, *lasting(2_560)]
    finish(module, recipe, run, given)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["samples_per_second"] for line in lines[1:])


def finish(module: str, recipe: str, run: Path, words: Sequence[str]) -> None:
    """Start an entry script in one process; it continues, or finds nothing left to do."""
    command = [sys.executable, "-m", module, recipe, f"--run.dir={run}", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def outcome(run: Path) -> Outcome:
    """What the files of a run directory say."""
    answers = json.loads((run / "evaluation" / "zero_shot.json").read_text())
    cost = cost_of(run)
    return Outcome(
        samples=round(cost.samples),
        train_seconds=cost.seconds,
        flops=cost.flops,
        top1=answers["zero_shot_top1"],
        top1_held_out=answers["zero_shot_top1_held_out"],
    )


def report_seeds(
    path: Path,
    outcomes: dict[str, list[dict[str, float]]],
    *,
    settings: dict[str, Any],
    contests: dict[str, tuple[str, str]],
    shown: tuple[str, str],
    title: str,
    summary: str,
) -> None:
    """Table, JSON and page of what several trainings reached, seed by seed.

    Args:
        path: of the files, without their suffix.
        outcomes: the numbers of every seed, by the name of the training.
        settings: what goes into the JSON besides.
        contests: columns that say how often the first of two trainings is above the second.
        shown: the number that is drawn, and what it is called.
        title: of the page.
        summary: a sentence under it.
    """
    first, *others = (seeds[0] for seeds in outcomes.values())
    names = [name for name in first if all(name in other for other in others)]
    rows = []
    for name in names:
        values = {key: [numbers[name] for numbers in seeds] for key, seeds in outcomes.items()}
        spreads = (mean_and_spread(part) for part in values.values())
        cells = [f"{mean:.4g} ± {spread:.2g}" for mean, spread in spreads]
        for one, other in contests.values():
            pairs = list(zip(values[one], values[other], strict=True))
            cells.append(f"{sum(a > b for a, b in pairs)} of {len(pairs)}")
        rows.append([name, *cells])
    text = table(["number", *outcomes, *contests], rows)
    print(text)
    write(path.with_suffix(".json"), settings | outcomes)
    number, called = shown
    curves = [
        Curve(name, tuple((seed, 100 * found[number]) for seed, found in enumerate(seeds)))
        for name, seeds in outcomes.items()
    ]
    charts = {f"{called} by seed": ("seed", curves)}
    write_page(path.with_suffix(".html"), title=title, summary=summary, text=text, charts=charts)


def write_page(
    path: Path, *, title: str, summary: str, text: str, charts: dict[str, tuple[str, list[Curve]]]
) -> None:
    """A page with charts (title to name of the x axis and curves) and a table as text."""
    sections = []
    for name, (x_name, curves) in charts.items():
        chart = line_chart(name, curves, x_name=x_name, description=summary, from_zero=True)
        sections.append((name, Markup("<p>{}</p>{}").format(legend(curves), chart)))
    sections.append(("Numbers", Markup("<pre>{}</pre>").format(text)))
    page = render("page.html.j2", title=title, summary=summary, sections=sections)
    path.write_text(page, encoding="utf-8")
    print(f"written to {path}")
