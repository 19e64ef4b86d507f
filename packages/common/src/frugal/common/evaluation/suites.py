"""Sets of tasks that are measured together: 26 classification tasks, and ImageNet's variants.

The 26 tasks are those of SLIP (Mu et al., arXiv:2112.12750) and CiT (Xu et al., arXiv:2301.02241),
with the class names and prompts of CLIP (see ``task_labels``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from frugal.common.data.damage import PassedOver
from frugal.common.data.stores.image_walk import subfolders
from frugal.common.errors import InputError
from frugal.common.evaluation.task_labels import TASKS

_LOG = logging.getLogger("frugal")
Metric = Literal["top1", "mean_per_class_recall", "mean_top1_top5", "roc_auc"]
"""mean_per_class_recall: over the classes that occur. mean_top1_top5: half of both. roc_auc: of the
second of two classes over the first."""

_METRICS: dict[str, Metric] = {
    "aircraft": "mean_per_class_recall",
    "pets": "mean_per_class_recall",
    "caltech101": "mean_per_class_recall",
    "flowers": "mean_per_class_recall",
    "kinetics700_frames": "mean_top1_top5",
    "hateful_memes": "roc_auc",
}
ROBUSTNESS = (
    "imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet",
)  # fmt: skip
"""ImageNet and the sets that ask its classes of other pictures, under the names of their
folders."""
SUITES: dict[str, tuple[str, ...]] = {"clip-26": TASKS, "imagenet-robustness": ROBUSTNESS}
"""Tasks by the word that asks for all of them."""
_SPLITS = ("test", "val", "val_images", "dev", "validation")


def listed() -> tuple[str, ...]:
    """The names of all tasks that there are lists of class names and prompts for."""
    return (*TASKS, "birdsnap", "voc2007")


def metric_of(task: str) -> Metric:
    """What one of the 26 tasks is measured by."""
    return _METRICS.get(task, "top1")


def find_parts(root: Path, suite: str) -> dict[str, Path]:
    """The folders of the tasks of a suite that are there, by task.

    A task lies in a sub-folder of its name, with ``-`` for ``_`` or without either; of a folder
    with ``test`` or ``val`` in it, that part.

    Raises:
        InputError: if there is none, or one is there twice.
    """
    below: dict[str, Path] = {}
    passed_over = PassedOver()
    wanted = {_plain(task) for task in SUITES[suite]}
    for name in subfolders(root, passed_over):
        if _plain(name) not in wanted:
            passed_over.add(f"folders that are no task of {suite}", str(root / name))
        elif _plain(name) in below:
            raise InputError(
                f"{below[_plain(name)]} and {root / name} are one task of {suite}; leave one of "
                "them out"
            )
        below[_plain(name)] = root / name
    for line in passed_over.lines():
        _LOG.warning("%s: %s", suite, line)
    found = {task: below[_plain(task)] for task in SUITES[suite] if _plain(task) in below}
    if not found:
        raise InputError(
            f"{root} holds none of the tasks of {suite}; give the folder with a sub-folder for "
            f"each that you have, such as {', '.join(SUITES[suite][:3])}"
        )
    return {task: _split(path) for task, path in found.items()}


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _split(folder: Path) -> Path:
    """The part that is tested on; tars in ``test/`` are found from the folder above them."""
    parts = (folder / name for name in _SPLITS)
    part = next((path for path in parts if path.is_dir()), None)
    if part is None or (part.name == "test" and next(part.glob("*.tar"), None)):
        return folder
    return part
