"""What an evaluation leaves behind: a JSON file, what it found image by image, a row of a table."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from frugal.common.contracts import EvaluationTask
from frugal.common.errors import InputError
from frugal.common.evaluation.config import Compositional, LinearProbe, Retrieval, ZeroShot
from frugal.common.evaluation.contrasts import CATEGORIES
from frugal.common.evaluation.outcomes import Outcomes
from frugal.common.files import reason_of, write_json
from frugal.common.recipe import to_json

OUTCOMES = ".outcomes.safetensors"
"""Ends the name of the file with what was found image by image."""
COLUMNS = (
    "model", "pretrained", "model_fullname", "dataset", "task", "language", "acc1", "acc5",
    "mean_per_class_recall", "mean_average_precision", "image_retrieval_recall@1",
    "image_retrieval_recall@5", "image_retrieval_recall@10", "text_retrieval_recall@1",
    "text_retrieval_recall@5", "text_retrieval_recall@10", "text_acc", "lp_acc1", "lp_acc5",
    "lp_mean_per_class_recall", "weight_decay", "epochs", "seed", "fewshot_k", "normalized",
)  # fmt: skip
"""Of the table; what ``clip_benchmark build`` makes of its JSON files of these tasks."""


@dataclass(frozen=True)
class Subject:
    """Which model was measured."""

    model: str
    """What was given as --checkpoint."""
    pretrained: str
    """The checkpoint in it, or the name that its weights were loaded under."""
    facts: dict[str, Any]
    """Everything else that is needed to measure it again, ready for JSON."""


def write(
    task: EvaluationTask,
    numbers: Mapping[str, Any],
    outcomes: Outcomes | None,
    subject: Subject,
    out: Path,
    head: Mapping[str, Any],
) -> None:
    """Write ``{task}.json`` and, beside it, what was found image by image.

    Args:
        task: as it was measured.
        numbers: what it returned.
        outcomes: what it kept.
        subject: the model.
        out: made if missing.
        head: what stands before the numbers.

    Raises:
        InputError: if the files cannot be written.
    """
    facts = outcomes.facts if outcomes is not None else {}
    content = {
        **head,
        "data": str(getattr(task, "data", None)),
        **numbers,
        f"{task.name}_settings": to_json(task),
        f"{task.name}_measured": {**subject.facts, **facts},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{task.name}.json"
        aside = out / f".{task.name}{OUTCOMES}.{os.getpid()}"
        try:
            if outcomes is not None:
                outcomes.save(aside)  # first: the numbers of a run never stand beside another's
            write_json(file, content)
            if outcomes is not None:
                # safetensors writes for its owner alone
                aside.chmod(file.stat().st_mode)
                aside.replace(out / f"{task.name}{OUTCOMES}")
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{out} cannot be written ({reason_of(error)}); choose another --out"
        ) from None


def rows(
    task: EvaluationTask, numbers: Mapping[str, Any], subject: Subject
) -> list[dict[str, Any]]:
    """What a task adds to the table, under clip_benchmark's names; [] for tasks it has not."""
    data = getattr(task, "data", None)
    standard = type(task)().name if isinstance(task, tuple(_TASKS)) else task.name  # type: ignore[call-arg]
    head = {
        "model": subject.model,
        "pretrained": subject.pretrained,
        "model_fullname": f"{subject.model} {subject.pretrained}",
        "dataset": str(data) if task.name == standard else task.name,
        "language": "en",
    }
    own = {name.removeprefix(f"{task.name}_"): value for name, value in numbers.items()}
    if isinstance(task, Compositional):
        kind = {"task": "image_caption_selection"}
        return [
            {**head, **kind, "dataset": f"{head['dataset']}/{name}", "text_acc": own[name]}
            for name in CATEGORIES
            if name in own
        ]
    if isinstance(task, Retrieval):
        found = {
            f"{way}_retrieval_recall@{k}": numbers[f"{way}_{task.name}_recall_at_{k}"]
            for way in ("image", "text")
            for k in (1, 5, 10)
        }
        return [{**head, "task": "zeroshot_retrieval", **found}]
    names = {"top1": "acc1", "top5": "acc5", "mean_per_class_recall": "mean_per_class_recall"}
    if isinstance(task, LinearProbe):
        found = {f"lp_{theirs}": own[ours] for ours, theirs in names.items()}
        found |= {"weight_decay": own["weight_decay"], "seed": task.seed}
        found |= {"fewshot_k": -1, "normalized": True}
        if task.solver != "lbfgs":
            found["epochs"] = task.epochs
        return [{**head, "task": "linear_probe", **found}]
    if isinstance(task, ZeroShot):
        names["mean_average_precision"] = "mean_average_precision"
        found = {theirs: own[ours] for ours, theirs in names.items() if ours in own}
        return [{**head, "task": "zeroshot_classification", **found}]
    if "top1" in own:  # a classifier's
        found = {theirs: own[ours] for ours, theirs in names.items() if ours in own}
        return [{**head, "task": "classification", **found}]
    return []


_TASKS = (Compositional, Retrieval, LinearProbe, ZeroShot)


def append(path: Path, added: list[dict[str, Any]]) -> None:
    """Add rows to a table, which begins with the names of its columns.

    Several processes may do so at once: a row is never mixed with another.

    Raises:
        InputError: if the file is another table, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", newline="", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            header = next(csv.reader(file), None)
            if header is not None and tuple(header) != COLUMNS:
                raise InputError(
                    f"{path} has other columns than {', '.join(COLUMNS[:4])} and so on; choose "
                    "another --csv"
                )
            file.seek(0, 2)
            table = csv.DictWriter(file, COLUMNS)
            if header is None:
                table.writeheader()
            table.writerows(added)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be added to ({error}); choose another --csv") from None


def suite_numbers(
    suite: str, scores: Mapping[str, float], asked: tuple[str, ...]
) -> dict[str, Any]:
    """The mean over the tasks of a suite that were there, and which those were."""
    name = suite.replace("-", "_")
    return {
        f"{name}_mean": sum(scores.values()) / len(scores),
        f"{name}_tasks": len(scores),
        f"{name}_scores": dict(scores),
        f"{name}_missing": [task for task in asked if task not in scores],
    }
