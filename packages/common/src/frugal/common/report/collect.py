"""What run directories say of themselves: stages, logged metrics, numbers of evaluations."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.errors import InputError
from frugal.common.files import read_json_lines, read_json_object
from frugal.common.history import read_history
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import load_recipe

_LOG = logging.getLogger("frugal")
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


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` in order; says how many are none and left out."""
    path = run_dir / "metrics.jsonl"
    lines, unreadable = read_json_lines(path)
    if unreadable:
        _LOG.warning("%s: %d lines are no JSON and are left out", path, unreadable)
    return [line for line in lines if isinstance(line.get("samples"), (int, float))]


def find_stages(folder: Path) -> dict[str, Path]:
    """The run directories in a folder by name, each after the one it started from.

    Raises:
        InputError: if there is none.
    """
    if (folder / "recipe.json").is_file():
        return {folder.name: folder}
    found = [path.parent for path in sorted(folder.glob("*/recipe.json"))]
    runs = [run for run in found if not _is_export(run)]
    for export in sorted(set(found) - set(runs)):
        _LOG.warning(
            "%s holds no checkpoint and no log of a run, but weights for another library or a run "
            "that never began; it is passed over", export,
        )  # fmt: skip
    if not runs:
        raise InputError(
            f"{folder} holds no run (a folder with recipe.json); give a run directory, or a folder "
            "of them"
        )
    origins: dict[Path, Path | None] = {}
    for run in list(runs):
        try:
            origins[run] = load_recipe(run / "recipe.json").run.start_from
        except InputError as error:
            if len(runs) == 1:
                raise
            _LOG.warning("%s is passed over: %s", run, error)
            runs.remove(run)

    def ancestors(run: Path) -> int:
        origin, count = origins[run], 0
        while origin is not None and count < len(runs):
            before = [r for r in runs if origin.resolve().is_relative_to(r.resolve())]
            origin, count = (origins[before[0]], count + 1) if before else (None, count)
        return count

    return {run.name: run for run in sorted(runs, key=ancestors)}


def _is_export(folder: Path) -> bool:
    """Whether a recipe lies beside weights in another library's layout, as exports keep it."""
    return not any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl"))


def collect_numbers(stages: Mapping[str, Path]) -> dict[str, Any]:
    """What ``report.json`` holds: the last stage's evaluations, and how long all stages took.

    Raises:
        InputError: if a stage has no checkpoint, or the last one was to be evaluated and was not.
    """
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
    tasks = {task.name: task.data for task in recipe.evaluation}
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


_EVENTS = {
    "began": "began",
    "continued": "went on",
    "data_changed": "went on with other data",
    "checkpoint_lost": "could not write the checkpoint",
    "rewind": "diverged and went back",
    "branched": "branched off",
}


def describe_history(stages: Mapping[str, Path]) -> list[tuple[str, str]]:
    """A title and HTML of when every stage began and went on, where one was interrupted."""
    rows = [
        (name, line)
        for name, run_dir in stages.items()
        for line in read_history(run_dir)
        if line["event"] != "ended"
    ]
    if all(line["event"] == "began" for _, line in rows):
        return []
    cells = Markup().join(
        Markup("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n").format(
            name,
            time.strftime("%Y-%m-%d %H:%M", time.gmtime(line.get("time", 0))),
            f"{_EVENTS.get(line['event'], line['event'])} after step {line.get('step', 0)}",
            "; ".join(
                filter(None, [*line.get("changes", ()), line.get("reason"), _way_back(line)])
            ),
        )
        for name, line in rows
    )
    table = Markup('<div class="scroll"><table class="numbers">\n{}</table></div>').format(cells)
    return [("Restarts", table)]


def _way_back(line: Mapping[str, Any]) -> str:
    """Where a run went that had diverged."""
    if line["event"] != "rewind":
        return ""
    return f"to step {line.get('to')}, without the samples of {len(line.get('left_out', ()))} steps"
