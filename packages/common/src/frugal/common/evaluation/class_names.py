"""What the classes of a data set are called, and what is written around their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from frugal.common.data.damage import shortened
from frugal.common.data.labeled import LabeledImages, MultiLabeledImages
from frugal.common.data.patterns import natural_key
from frugal.common.data.stores.class_folders import is_bare_number, is_wordnet_id
from frugal.common.errors import InputError
from frugal.common.evaluation.prompts import ClassName, imagenet_class_names, named_templates
from frugal.common.evaluation.suites import listed
from frugal.common.evaluation.task_labels import task_labels
from frugal.common.files import read_text

SUBSETS = ("imagenet_a", "imagenet_r")
"""Of ImageNet's classes."""
CLASS_NAMES = ("data", "imagenet", *SUBSETS)
TEMPLATES = ("data", "imagenet_7", "imagenet_9", "imagenet_80", "name")
"""Words of their own beside the names of tasks."""
_NUMBERS = [str(number) for number in range(1000)]
ClassifiedImages = LabeledImages | MultiLabeledImages


@dataclass(frozen=True)
class Naming:
    """What the classes of a data set are called, and which of them its labels stand for."""

    names: list[ClassName]
    templates: list[str]
    """Prompts with ``{c}`` for the class."""
    numbers: list[int] | None = None
    """The place among the names that each label of the data stands for; None for its own."""
    incomplete: str = ""
    """What is missing of the set that the names belong to, in words; empty if nothing is."""


def naming(class_names: str, templates: str, data: ClassifiedImages, source: Path) -> Naming:
    """What the classes are called and what is written around the names.

    Args:
        class_names: ``ZeroShot.class_names``.
        templates: ``ZeroShot.templates``.
        data: says what its own classes and prompts are.
        source: of the data, for messages.

    Raises:
        InputError: if the data has no names, or they cannot be brought together with those of the
            task or ImageNet's.
    """
    prompts = _templates(templates, data)
    if class_names in SUBSETS:
        return Naming(_names_of_subset(class_names, data, source), prompts)
    if class_names in listed() and class_names != "imagenet":
        return Naming(_names_of_task(class_names, data, source), prompts)
    names = list(data.class_names or ())
    if class_names == "imagenet":
        own = list(data.class_folders or names)
        return _among_imagenets(own, prompts, source, has_numbers=data.class_folders is None)
    if names == _NUMBERS or any(map(is_wordnet_id, names)):
        names = _imagenet_names(names, source, has_numbers=data.class_folders is None)
        return Naming(list(names), prompts, incomplete=_incomplete(len(names)))
    if not names:
        raise InputError(
            f"{source} does not say what its classes are called; add a classnames.txt with one "
            "name per line, or choose the class names 'imagenet'"
        )
    number = next(filter(is_bare_number, names), None)
    if number is not None and not data.has_given_names:
        raise InputError(
            f"the class folders of {source} are called by numbers such as {number!r}, of which no "
            "prompt can be made; write the name of each class by its folder in "
            f'{source / "classnames.json"}, such as {{"{number}": "..."}}, or choose a task\'s '
            "names with --zero-shot.class-names"
        )
    return Naming(list(names), prompts)


def held_out_classes(data: Path, num_classes: int) -> list[int]:
    """The classes that training never saw, from ``held_out.txt``; [] where there is none.

    Raises:
        InputError: if a line is not the index of a class.
    """
    path = data / "held_out.txt"
    if not path.is_file():
        return []
    lines = read_text(path).split()
    if not all(n.isdecimal() and len(n) < 10 and int(n) < num_classes for n in lines):
        raise InputError(
            f"{path} must hold one class index below {num_classes} per line; write the data "
            "again, or correct the file"
        )
    return sorted({int(line) for line in lines})


def _among_imagenets(
    own: list[str], templates: list[str], source: Path, *, has_numbers: bool
) -> Naming:
    """All of ImageNet's names, and which of them the classes of the data are."""
    _imagenet_names(own, source, has_numbers=has_numbers)
    numbers = None
    if any(map(is_wordnet_id, own)):
        place = {name: number for number, name in enumerate(_wordnet_ids())}
        numbers = [place[name] for name in own]
    missing = "" if numbers is None else _incomplete(len(set(numbers)))
    return Naming(list(imagenet_class_names()), templates, numbers, missing)


def _incomplete(count: int) -> str:
    whole = len(imagenet_class_names())
    return "" if count == whole else f"{count} of the {whole:,} classes of ImageNet-1k"


def _templates(templates: str, data: ClassifiedImages) -> list[str]:
    if templates != "data":
        return named_templates(templates)
    return list(data.templates or ()) or named_templates("imagenet_7")


def _names_of_task(task: str, data: ClassifiedImages, source: Path) -> list[ClassName]:
    """The names of a task of a suite, in the order of the classes of the data.

    Class folders that are called as the classes are found by name. Others are taken in their
    order, as are the numbers in tars.
    """
    names: list[ClassName] = [
        words[0] if len(words) == 1 else words for words in task_labels(task).classes
    ]
    folders: list[str] = data.class_folders or []
    number_of = {_plain(word): n for n, name in enumerate(names) for word in _words(name)}
    known = [folder for folder in folders if _plain(folder) in number_of]
    if 2 * len(known) > len(folders):
        # a class without images is a name to choose from all the same
        folders = [*folders, *(name for name in data.empty_folders if _plain(name) in number_of)]
        _check_folders(task, folders, number_of, names, source)
        return [names[number_of[_plain(folder)]] for folder in folders]
    own = folders or data.class_names or ()
    if own and len(own) != len(names):
        raise InputError(
            f"{source} holds {len(own)} classes, but {task} has {len(names)} names; use the "
            "complete folder, or the class names the data comes with (data)"
        )
    _check_order(task, folders, number_of, source)
    return names


def _check_folders(
    task: str,
    folders: list[str],
    number_of: dict[str, int],
    names: Sequence[ClassName],
    source: Path,
) -> None:
    """Refuse class folders that are not, one by one, those of a task."""
    found: dict[int, str] = {}
    for folder in folders:
        number = number_of.get(_plain(folder))
        if number is None:
            near = difflib.get_close_matches(_plain(folder), number_of, n=1)
            hint = f" (did you mean {_words(names[number_of[near[0]]])[0]!r}?)" if near else ""
            raise InputError(
                f"the class folder {folder!r} of {source} is no class of {task}{hint}, though "
                "others are; rename it, or use the class names the data comes with (data)"
            )
        if number in found:
            raise InputError(
                f"the class folders {found[number]!r} and {folder!r} of {source} are one class "
                f"of {task}; put their images together"
            )
        found[number] = folder
    missing = [_words(name)[0] for number, name in enumerate(names) if number not in found]
    if missing:
        raise InputError(
            f"{source} holds {len(found)} classes, but {task} has {len(names)} names: there is no "
            f"folder of {shortened(missing, 3)}; use the complete folder, or the class names the "
            "data comes with (data)"
        )


def _check_order(task: str, folders: list[str], number_of: dict[str, int], source: Path) -> None:
    """Refuse class folders, called otherwise than the classes, whose order is in doubt."""
    way = (
        "so that it cannot be told which is which; call them as the classes, or write the name of "
        f"each by its folder in {source / 'classnames.json'} and use the class names the data "
        "comes with (data)"
    )
    if folders != sorted(folders, key=natural_key):
        raise InputError(
            f"the class folders of {source} are not called as the classes of {task}, and stand in "
            f"another order as text ({', '.join(folders[:3])}, ...) than as numbers, {way}"
        )
    for place, folder in enumerate(folders):
        if number_of.get(_plain(folder), place) != place:
            raise InputError(
                f"the class folder {folder!r} of {source} is a class of {task} but does not stand "
                f"at its place, and most others are not called as its classes, {way}"
            )


def _names_of_subset(name: str, data: ClassifiedImages, source: Path) -> list[ClassName]:
    """ImageNet's names for the classes of ImageNet-A or -R, all of which must be there."""
    listed_ids = files("timm.data") / "_info" / f"{name}_synsets.txt"
    ids = sorted(listed_ids.read_text(encoding="utf-8").split())
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
    return list(_imagenet_names(ids, source, has_numbers=False))


def _words(name: ClassName) -> Sequence[str]:
    return [name] if isinstance(name, str) else name


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _wordnet_ids() -> list[str]:
    """Of ImageNet-1k's classes, in the order of their numbers."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def _imagenet_names(own: Sequence[str], source: Path, *, has_numbers: bool) -> list[str]:
    """ImageNet-1k's names for the classes of a data set, in the order of its class numbers.

    Args:
        own: the class folders, or what the data calls its classes, if anything.
        source: of the data, for messages.
        has_numbers: labels come with the images; else they count the class folders.
    """
    names = imagenet_class_names()
    if any(map(is_wordnet_id, own)):
        by_id = dict(zip(_wordnet_ids(), names, strict=True))
        if unknown := [name for name in own if name not in by_id]:
            raise InputError(
                f"{source} has the class {unknown[0]}, which is no WordNet id of ImageNet-1k; "
                "remove it, or give your classes names of their own in a classnames.txt"
            )
        return [by_id[name] for name in own]
    if own and len(own) != len(names):
        raise InputError(
            f"{source} holds {len(own)} classes, but ImageNet-1k has {len(names)} names; use "
            "the complete folder, or give your classes names of their own"
        )
    if not has_numbers and not _are_imagenets_numbers(own):
        raise InputError(
            f"the class folders of {source} are neither ImageNet-1k's WordNet ids nor the numbers "
            f"0 to 999 (the first is {own[0]!r}), so it cannot be told which class is which; "
            "rename them"
        )
    return list(names)


def _are_imagenets_numbers(own: Sequence[str]) -> bool:
    """Whether class folders are called 0 to 999, or 000 to 999, in this order."""
    return all(map(is_bare_number, own)) and [int(name) for name in own] == list(range(1000))
