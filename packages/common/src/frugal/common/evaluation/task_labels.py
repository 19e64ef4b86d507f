"""Class names and prompt templates of the 26 tasks on which CLIP-class models are compared.

The files in ``slip_labels`` are those of SLIP (Mu et al., arXiv:2112.12750; MIT license beside
them), which CiT (arXiv:2301.02241) uses too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError

TASKS = (
    "food101", "cifar10", "cifar100", "cub200", "sun397", "cars", "aircraft", "dtd", "pets",
    "caltech101", "flowers", "mnist", "fer2013", "stl10", "eurosat", "resisc45", "gtsrb",
    "kitti_distance", "country211", "patch_camelyon", "ucf101_frames", "kinetics700_frames",
    "clevr_counts", "hateful_memes", "rendered_sst2", "imagenet",
)  # fmt: skip
"""The 26 tasks; there are labels of birdsnap and voc2007 besides."""


@dataclass(frozen=True)
class TaskLabels:
    """What the classes of a task are called."""

    classes: tuple[tuple[str, ...], ...]
    """In the order of the class numbers: every name of each, of equal standing."""
    templates: tuple[str, ...]
    """Sentences with ``{c}`` for the class."""


def task_labels(name: str) -> TaskLabels:
    """The labels of a task.

    Raises:
        InputError: if there is no task of this name.
    """
    labels = _file("labels.json")
    if name not in labels:
        raise InputError(f"there is no task {name!r}; choose from {', '.join(sorted(labels))}")
    return TaskLabels(
        classes=tuple((c,) if isinstance(c, str) else tuple(c) for c in labels[name]),
        templates=tuple(t.replace("{}", "{c}") for t in _file("templates.json")[name]),
    )


@cache
def _file(name: str) -> dict[str, Any]:
    path = Path(__file__).with_name("slip_labels") / name
    return json.loads(path.read_text(encoding="utf-8"))
