"""What an evaluation leaves behind: a JSON file, what it found image by image, a row of a table."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal.common.contracts import EvaluationTask
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import SampleResults
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.sugarcrepe import CATEGORIES
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.files import (
    finite,
    read_bytes,
    read_json_object,
    reason_of,
    write_file,
    write_json,
)
from frugal.common.recipe_json import to_json

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
    outcomes: SampleResults | None,
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
    own = {**subject.facts, **facts}
    path, beside = out / f"{task.name}.json", out / f"{task.name}{OUTCOMES}"
    if outcomes is not None:
        encoded = outcomes.encoded()
        own["outcomes_sha256"] = hashlib.sha256(encoded).hexdigest()
    content = {
        **head,
        "data": None if task.data is None else str(task.data),
        **numbers,
        f"{task.name}_settings": to_json(task),
        f"{task.name}_measured": own,
    }
    if outcomes is not None:
        write_file(beside, encoded)
    write_json(path, content)


def read_facts(folder: Path, task: str) -> dict[str, Any]:
    """What the JSON file of a task says of its measuring, which that found image by image is of.

    Raises:
        InputError: if it cannot be read, or is of another measurement than the outcomes beside it.
    """
    path, beside = folder / f"{task}.json", folder / f"{task}{OUTCOMES}"
    facts: dict[str, Any] = read_json_object(path).get(f"{task}_measured", {})
    wanted = facts.get("outcomes_sha256")
    if wanted is not None and hashlib.sha256(read_bytes(beside)).hexdigest() != wanted:
        raise InputError(
            f"{path} and {beside.name} are not of one measurement (writing them was interrupted, "
            "or one was replaced); measure again"
        )
    return facts


def check_free(
    task: EvaluationTask,
    subject: Subject,
    out: Path,
    *,
    step: int | None,
    trained_on: Mapping[str, str],
) -> None:
    """Refuse to replace what was measured on other data or with other weights.

    Args:
        task: about to be measured.
        subject: the model.
        out: where its file would go.
        step: of the checkpoint, which the files that training writes know it by.
        trained_on: the data that the run of this folder evaluates on itself, by task, for files
            that do not say it.

    Raises:
        InputError: if there is such a file.
    """
    path = out / f"{task.name}.json"
    if not path.is_file():
        return
    try:
        before = read_json_object(path)
    except InputError:
        return  # cut in two by a crash, and worth nothing
    facts = before.get(f"{task.name}_measured", {})
    data, what = _data_of(task, subject.facts), []
    known = facts.get("data_url") or before.get("data") or trained_on.get(task.name)
    if known is not None and Path(known).resolve() != Path(data).resolve():
        what.append(f"on {known}")
    same = ("weights_sha256", "config_digest")
    if any(facts.get(name, subject.facts[name]) != subject.facts[name] for name in same):
        what.append(f"with the other weights of {facts.get('checkpoint')}")
    elif not facts and before.get("step", step) != step:
        what.append(f"after step {before['step']}")
    if what:
        raise InputError(
            f"{path} holds what was measured {' and '.join(what)}, and would be replaced; give "
            "this measurement a --name of its own, or another --out"
        )


def _data_of(task: EvaluationTask, facts: Mapping[str, Any]) -> str:
    return str(facts.get("data_url") or task.data)


def rows(
    task: EvaluationTask, numbers: Mapping[str, Any], subject: Subject
) -> list[dict[str, Any]]:
    """What a task adds to the table, under clip_benchmark's names; [] for tasks it has not."""
    data = task.data
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
        with path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            present = file.read()
            text = present.decode("utf-8-sig")
            header = next(csv.reader(io.StringIO(text)), None)
            if header is not None and tuple(header) != COLUMNS:
                raise InputError(
                    f"{path} has other columns than {', '.join(COLUMNS[:4])} and so on; choose "
                    "another --csv"
                )
            lines = io.StringIO(newline="")
            if text and not text.endswith("\n"):  # somebody's editor ended the last line so
                lines.write("\r\n")
            table = csv.DictWriter(lines, COLUMNS)
            if header is None:
                table.writeheader()
            table.writerows(finite(row) for row in added)
            _append_whole(file, lines.getvalue().encode("utf-8"), len(present))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be added to ({reason_of(error)}); make room there, or choose another "
            "--csv"
        ) from None


def _append_whole(file: Any, encoded: bytes, size: int) -> None:
    """Add bytes to a file of some size, or leave it as it was."""
    try:
        done = 0
        while done < len(encoded):
            done += file.write(encoded[done:])
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


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
