"""What the classes of a data set are called, and what is written around their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError
from frugal.common.evaluation.config import SUBSETS, ZeroShot
from frugal.common.evaluation.prompts import ClassName, imagenet_class_names, named_templates
from frugal.common.evaluation.suites import listed
from frugal.common.evaluation.task_labels import task_labels

_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBERS = [str(number) for number in range(1000)]


def names_and_templates(
    task: ZeroShot, data: Any, source: Path
) -> tuple[list[ClassName], list[str]]:
    """What the classes are called and what is written around the names.

    Raises:
        InputError: if the data has no names, or they cannot be brought together with ImageNet's.
    """
    if task.class_names in SUBSETS:
        return _names_of_subset(task.class_names, data, source), _templates(task, data)
    if task.class_names in listed() and task.class_names != "imagenet":
        names = _names_of_task(task.class_names, data, source)
        return names, _templates(task, data)
    names = list(data.class_names or ())
    is_imagenet = names == _NUMBERS or any(map(_is_wordnet_id, names))
    if task.class_names == "imagenet" or is_imagenet:
        own = data.class_folders or names if task.class_names == "imagenet" else names
        names = _imagenet_names(own, source, has_numbers=data.class_folders is None)
    if not names:
        raise InputError(
            f"{source} does not say what its classes are called; add a classnames.txt with one "
            "name per line, or choose the class names 'imagenet'"
        )
    return names, _templates(task, data)


def _templates(task: ZeroShot, data: Any) -> list[str]:
    if task.templates != "data":
        return named_templates(task.templates)
    return list(data.templates or ()) or named_templates("imagenet_7")


def _names_of_task(task: str, data: Any, source: Path) -> list[ClassName]:
    """The names of a task of a suite, in the order of the classes of the data.

    Class folders that are called as the classes are found by name. Others are taken in their
    order, as are the numbers in tars.
    """
    names: list[ClassName] = [
        words[0] if len(words) == 1 else words for words in task_labels(task).classes
    ]
    own = data.class_folders or data.class_names or ()
    if own and len(own) != len(names):
        raise InputError(
            f"{source} holds {len(own)} classes, but {task} has {len(names)} names; use the "
            "complete folder, or the class names the data comes with (data)"
        )
    by_name = {_plain(word): name for name in names for word in _words(name)}
    folders = [_plain(folder) for folder in data.class_folders or ()]
    if folders and by_name.keys() >= set(folders):
        return [by_name[folder] for folder in folders]
    return names


def _names_of_subset(name: str, data: Any, source: Path) -> list[ClassName]:
    """ImageNet's names for the classes of ImageNet-A or -R, all of which must be there."""
    listed_ids = files("timm.data") / "_info" / f"{name}_synsets.txt"
    ids = sorted(listed_ids.read_text().split())
    if data.class_folders is not None and (odd := sorted(set(ids) ^ set(data.class_folders))):
        raise InputError(
            f"{source} holds {len(data.class_folders)} classes, but {name} has {len(ids)}: only "
            f"one of them has {odd[0]}; use the complete folder"
        )
    if data.class_folders is None and data.class_names and len(data.class_names) != len(ids):
        raise InputError(
            f"{source} names {len(data.class_names)} classes, but {name} has {len(ids)}; use the "
            "complete data set"
        )
    return _imagenet_names(ids, source, has_numbers=False)


def _words(name: ClassName) -> Sequence[str]:
    return [name] if isinstance(name, str) else name


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _is_wordnet_id(name: ClassName) -> bool:
    return isinstance(name, str) and _WORDNET_ID.fullmatch(name) is not None


def _imagenet_names(
    own: Sequence[ClassName], source: Path, *, has_numbers: bool
) -> list[ClassName]:
    """ImageNet-1k's names for the classes of a data set, in the order of its class numbers.

    Args:
        own: the class folders, or what the data calls its classes, if anything.
        source: of the data, for messages.
        has_numbers: labels come with the images; else they count the class folders.
    """
    names = imagenet_class_names()
    if any(map(_is_wordnet_id, own)):
        from timm.data import ImageNetInfo

        by_id = dict(zip(ImageNetInfo("imagenet-1k").label_names(), names, strict=True))
        if unknown := [name for name in own if name not in by_id]:
            raise InputError(
                f"{source} has the class {unknown[0]}, which is no WordNet id of ImageNet-1k; "
                "remove it, or give your classes names of their own in a classnames.txt"
            )
        return [by_id[str(name)] for name in own]
    if own and len(own) != len(names):
        raise InputError(
            f"{source} holds {len(own)} classes, but ImageNet-1k has {len(names)} names; use "
            "the complete folder, or give your classes names of their own"
        )
    if not has_numbers and list(own) != _NUMBERS:
        raise InputError(
            f"the class folders of {source} are neither ImageNet-1k's WordNet ids nor the numbers "
            f"0 to 999 (the first is {own[0]!r}), so it cannot be told which class is which; "
            "rename them"
        )
    return list(names)
