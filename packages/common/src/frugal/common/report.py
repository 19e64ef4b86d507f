"""One self-contained HTML page about a finished run, and the same numbers as JSON.

``python -m frugal.common.report runs/demo`` writes ``report.html`` and ``report.json`` there, for
a run directory or for a folder that holds the run directories of several stages. The page needs
no network and no script.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from frugal.common.cli import run_politely
from frugal.common.errors import InputError
from frugal.common.evaluation import sections
from frugal.common.evaluation.page import PAGE, STYLE
from frugal.common.evaluation.sections import Command
from frugal.common.files import finite, read_json_object, write_file, write_json
from frugal.common.recipe import Recipe, load_recipe
from frugal.common.run import make_logger
from frugal.common.words import command_words

if TYPE_CHECKING:
    from frugal.common.evaluation.gathering import Gathered

REQUIRED = (
    "zero_shot_top1",
    "zero_shot_top1_held_out",
    "image_retrieval_recall_at_1",
    "text_retrieval_recall_at_1",
    "retrieval_candidates",
    "samples_seen",
    "train_seconds",
    "samples_per_second",
    "world_size",
    "engine",
)
"""Numbers that every ``report.json`` holds; null where the run did not measure one."""


def write_report(
    folder: Path,
    *,
    numbers: Mapping[str, Any],
    stages: Mapping[str, Path],
    gathered: Gathered | None = None,
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
        gathered: example images and what the model makes of them.
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
    logged = {name: read_metrics(run_dir) for name, run_dir in stages.items()}
    body = [sections.headline(numbers), sections.missing(numbers)]
    body.append(sections.section("How it learned", sections.curves(logged)))
    body.append(sections.section("What was read", sections.damage(logged)))
    body += [sections.section(name, content) for name, content in about_data]
    if gathered is not None:
        classes = sections.classes(gathered.classes, gathered.confused)
        body += [
            sections.section("What it sees while training", sections.masked(gathered.masked)),
            sections.section("How patches are chosen", sections.drawn(gathered.drawn)),
            sections.section("What it makes of a batch", sections.drawn(gathered.batch)),
            sections.section("What it recognizes", sections.classified(gathered.classified)),
            sections.section("Class by class", classes),
            sections.section(
                "The captions it finds nearest", sections.retrieved(gathered.retrieved)
            ),
        ]
    contrasts = sections.contrasted(numbers, gathered.contrasted if gathered else ())
    body.append(sections.section("True captions against false ones", contrasts))
    body.append(sections.section("What to type next", sections.commands(commands)))
    body.append(sections.all_numbers(numbers))
    page = PAGE.format(
        title=escape(title),
        style=STYLE,
        summary=f'<p class="summary">{escape(summary)}</p>' if summary else "",
        body="\n".join(part for part in body if part),
    )
    path = folder / "report.html"
    write_json(folder / "report.json", numbers)
    write_file(path, page)
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` in order; a line cut short by a crash is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("samples"), (int, float)):
            lines.append(line)
    return lines


# From run directories on disk to a report.


def find_stages(folder: Path) -> dict[str, Path]:
    """The run directories in a folder by name, each after the one it started from.

    Raises:
        InputError: if there is none.
    """
    if (folder / "recipe.json").is_file():
        return {folder.name: folder}
    runs = [path.parent for path in sorted(folder.glob("*/recipe.json"))]
    if not runs:
        raise InputError(
            f"{folder} holds no run (a folder with recipe.json); give a run directory, or a folder "
            "of them"
        )
    origins = {run: load_recipe(run / "recipe.json").run.start_from for run in runs}

    def ancestors(run: Path) -> int:
        origin, count = origins[run], 0
        while origin is not None and count < len(runs):
            before = [r for r in runs if origin.resolve().is_relative_to(r.resolve())]
            origin, count = (origins[before[0]], count + 1) if before else (None, count)
        return count

    return {run.name: run for run in sorted(runs, key=ancestors)}


def collect_numbers(stages: Mapping[str, Path]) -> dict[str, Any]:
    """What ``report.json`` holds: the last stage's evaluations, and how long all stages took.

    Raises:
        InputError: if a stage has no checkpoint, or the last one was to be evaluated and was not.
    """
    from frugal.common.checkpoint.store import find_checkpoint

    states = [find_checkpoint(run_dir).state for run_dir in stages.values()]
    last = list(stages.values())[-1]
    numbers: dict[str, Any] = dict.fromkeys(REQUIRED)
    numbers |= _evaluated(last, load_recipe(last / "recipe.json"))
    logged = [read_metrics(run_dir) for run_dir in stages.values()]
    samples = sum(state["samples"] for state in states)
    numbers |= {
        "samples_seen": samples,
        "train_seconds": sum(state["seconds"] for state in states),
        "samples_per_second": samples_per_second(logged),
        "world_size": states[-1]["world_size"],
        "engine": states[-1]["engine"],
    }
    return numbers | read_in_all(logged)


def _evaluated(run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """The numbers of the newest evaluation of a run, and what of it is not there."""
    files = sorted((run_dir / "evaluation").glob("*.json"))
    contents = {file.stem: read_json_object(file) for file in files}
    tasks = {task.name: getattr(task, "data", None) for task in recipe.evaluation}
    if not contents and any(data is not None for data in tasks.values()):
        raise InputError(f"{run_dir} was not evaluated yet; start its training again to finish it")
    newest = max((content["step"] for content in contents.values() if "step" in content), default=0)
    older = {name: c["step"] for name, c in contents.items() if c.get("step", newest) != newest}
    missing = {name: f"measured after step {step}, not {newest}" for name, step in older.items()}
    for name, data in tasks.items():
        if name not in contents:
            missing[name] = "it was given no data" if data is None else "it was not measured"
    numbers: dict[str, Any] = {}
    for name, content in contents.items():
        if name not in older:
            # what was measured, and with what, is for repeating it; a page would hide the rest
            numbers |= {n: value for n, value in content.items() if not n.endswith("_measured")}
    for name in ("step", "samples"):
        numbers.pop(name, None)
    return numbers | ({"not_measured": missing} if missing else {})


def samples_per_second(stages: Iterable[Sequence[Mapping[str, Any]]]) -> float | None:
    """The mean of what the stages logged, every sample with the time of its steps alone.

    Evaluations, checkpoints and pictures are no steps, and the log leaves their time out.

    Args:
        stages: the lines of ``metrics.jsonl`` of each stage.
    """
    samples = seconds = 0.0
    for lines in stages:
        before = 0.0
        for line in lines:
            trained, rate = line["samples"] - before, line.get("samples_per_second")
            before = line["samples"]
            if isinstance(rate, (int, float)) and rate > 0 and trained > 0:
                samples, seconds = samples + trained, seconds + trained / rate
    return samples / seconds if seconds else None


def read_in_all(stages: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Samples read and damaged over all stages, and what was passed over; {} where none was."""
    read = 0
    counts: dict[str, Counter[str]] = {"damaged": Counter(), "passed_over": Counter()}
    for lines in stages:
        last = lines[-1] if lines else {}
        read += last.get("read_samples", 0)
        for name, counter in counts.items():
            if isinstance(last.get(name), dict):
                counter.update(last[name])
    found = {name: dict(counter) for name, counter in counts.items() if counter.total()}
    return {"read_samples": read, **found} if found else {}


def describe_data(stages: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Titles and HTML of what the data of every stage tells about itself."""
    recipes = {run_dir: load_recipe(run_dir / "recipe.json") for run_dir in stages.values()}
    return [part for run_dir, recipe in recipes.items() for part in recipe.data.report(run_dir)]


def gather_examples(stages: Mapping[str, Path], *, count: int) -> Gathered:
    """Pictures and answers of the last stage's model, masked as in the first stage.

    Of a model that reads no captions, what its objective draws, or nothing where the teacher or
    the training data is not there any more.

    Raises:
        InputError: if the checkpoint or the data of an evaluation cannot be used.
    """
    from frugal.common.evaluation.gathering import Gathered, draw_batch, gather
    from frugal.common.loading import load_trained

    first, last = next(iter(stages.values())), list(stages.values())[-1]
    if not hasattr(load_recipe(last / "recipe.json").model, "text"):
        try:
            trained = load_trained(last)
            return draw_batch(trained.objective, trained.recipe, trained.run)
        except InputError as error:
            make_logger(0).warning("the page shows no pictures: %s", error)
            return Gathered()
    trained = load_trained(last)
    reduction = load_recipe(first / "recipe.json").reduction.image
    return gather(trained.model, trained.recipe, trained.run, reduction=reduction, count=count)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write report.html and report.json about a finished run, or about the stages of one."""

    folder: tyro.conf.Positional[Path]
    """A run directory, or a folder that holds one per stage; the report goes there."""
    next: tuple[str, ...] = ()
    """What to type next, each as 'purpose: command'."""
    examples: int = 12
    """Images of each kind on the page."""
    title: str | None = None
    """Of the page; by default the name of the folder."""


def report(options: Options) -> None:
    """Collect, write, and say where the page is."""
    if options.examples < 1:
        raise InputError(f"--examples is {options.examples}, must be at least 1")
    stages = find_stages(options.folder)
    numbers = collect_numbers(stages)
    commands = [Command(*entry.partition(": ")[::2]) for entry in options.next]
    path = write_report(
        options.folder,
        numbers=numbers,
        stages=stages,
        gathered=gather_examples(stages, count=options.examples),
        about_data=describe_data(stages),
        commands=commands,
        title=options.title or f"Report of {options.folder.resolve().name}",
        summary=f"Stages of the training: {', then '.join(stages)}." if len(stages) > 1 else "",
    )
    write = sys.stdout.write
    log = make_logger(0)
    for name, reason in numbers.get("not_measured", {}).items():
        log.warning("the report has no numbers of %s: %s", name, reason)
    named = (*REQUIRED, "compositional_mean", "accuracy_top1", "segmentation_miou")
    shown = [name for name in named if numbers.get(name) is not None]
    for name in shown:
        value = numbers[name]
        write(
            f"{name:>28}  {value:.4g}\n" if isinstance(value, float) else f"{name:>28}  {value}\n"
        )
    write(f"\nThe report is {path}; open it in a browser.\n")
    for command in commands:
        write(f"\n{command.purpose}:\n    {command.line}\n")


def main() -> None:
    """The body of ``python -m frugal.common.report``."""
    run_politely(
        lambda: report(
            tyro.cli(Options, args=command_words(), prog="python -m frugal.common.report")
        ),
        alone=True,
    )


if __name__ == "__main__":
    main()
