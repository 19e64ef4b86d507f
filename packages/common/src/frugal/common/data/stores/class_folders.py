"""Which sub-folders of a folder are classes, in which order, and what they are called.

Classes of different folders are brought together by name, and a run keeps those it began with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from frugal.common.data.damage import PassedOver
from frugal.common.data.patterns import natural_key
from frugal.common.data.stores.image_walk import images_below, subfolders
from frugal.common.errors import InputError
from frugal.common.files import read_json, read_json_object, read_lines, write_json

_WORDNET_ID = re.compile(r"n\d{8}")
_OBJECTNET = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
_JSON, _TEXT = "classnames.json", "classnames.txt"


@dataclass(frozen=True)
class ClassFolders:
    """The classes of a folder."""

    names: dict[str, str]
    """What they are called, by folder; class numbers count them in this order."""
    images: dict[str, list[str]]
    """Paths below the folder, by class folder."""
    has_given_names: bool
    """A file says what they are called; else they are called as their folders."""
    empty: tuple[str, ...] = ()
    """Folders without images that are no classes."""
    texts: tuple[str, ...] = ()
    """Paths below the folder of files that may hold captions."""


def is_bare_number(name: str) -> bool:
    """Whether a class folder is called by its number, which says nothing about its images."""
    return name.isdecimal()


def is_wordnet_id(name: str) -> bool:
    """Whether a class folder is called as those of ImageNet are."""
    return _WORDNET_ID.fullmatch(name) is not None


def read_class_folders(
    folder: Path, extensions: Collection[str], passed_over: PassedOver
) -> ClassFolders:
    """The classes of a folder with one sub-folder per class, and their images.

    ``classnames.json`` names folders, and folders that it does not name are left out; so do the
    mappings that ObjectNet comes with, which name the classes it shares with ImageNet-1k.
    ``classnames.txt`` has one line for every folder. Without any, folders are called as they are.
    A folder without images is a class only where names or numbers make it one.

    Raises:
        InputError: if a file of names does not fit the folders, or their order is in doubt.
    """
    refuse_misspelled_names(folder)
    folders = subfolders(folder, passed_over)
    chosen = _chosen_folders(folder)
    if chosen is not None and (folder / _TEXT).is_file():
        passed_over.add(f"lists of class names beside {chosen[0].name}", f"{folder / _TEXT}")
    if chosen is not None:
        source, by_folder = chosen
        if missing := sorted(by_folder.keys() - set(folders)):
            raise InputError(
                f"{source} names the class folder {missing[0]!r}, which {folder} does not have; "
                "copy it, or correct the file"
            )
        for left in [name for name in folders if name not in by_folder]:
            passed_over.add(f"folders that {source.name} does not name", f"{folder}/{left}")
        folders = [name for name in folders if name in by_folder]
    texts: list[str] = []
    images = images_below(folder, folders, extensions, passed_over, texts)
    folders = [name for name in folders if name in images]
    if chosen is not None:
        names = {name: chosen[1][name] for name in folders}
        return ClassFolders(names, images, True, texts=tuple(texts))
    lines = _listed_names(folder)
    classes = _classes(folder, folders, images, lines)
    empty = tuple(name for name in folders if name not in classes)
    for name in empty if classes else ():
        passed_over.add("folders without images, which are no classes", f"{folder}/{name}")
    if lines is None:
        names = {name: _in_words(folder, name) for name in classes}
    else:
        names = dict(zip(classes, lines, strict=True))
    return ClassFolders(names, images, lines is not None, empty, tuple(texts))


def _in_words(folder: Path, name: str) -> str:
    """What the class of a folder is called where no file says it."""
    words = name.replace("_", " ").strip()
    if not words:
        raise InputError(
            f"a class folder of {folder} is called {name!r}, which is no name; rename it, or write "
            f"the name of each class by its folder in {folder / _JSON}"
        )
    return words


def _classes(
    folder: Path, folders: list[str], images: dict[str, list[str]], lines: list[str] | None
) -> list[str]:
    """The folders that are classes, in the order of their numbers."""
    filled = [name for name in folders if images[name]]
    kinds = [kind for kind in (is_bare_number, is_wordnet_id) if filled and all(map(kind, filled))]
    known = [name for name in folders if images[name] or any(kind(name) for kind in kinds)]
    if lines is None or not filled:
        return _in_order(folder, known)
    fitting = next((part for part in (known, filled, folders) if len(part) == len(lines)), None)
    if fitting is None:
        raise InputError(
            f"{folder / _TEXT} names {len(lines)} classes but {folder} has {len(known)} class "
            "folders; write one line per folder, in their sorted order"
        )
    classes = _in_order(folder, fitting)
    natural = sorted(classes, key=natural_key)
    if classes != natural and not all(map(is_bare_number, classes)):
        odd = next(name for name, other in zip(classes, natural, strict=True) if name != other)
        raise InputError(
            f"it cannot be told which line of {folder / _TEXT} belongs to {odd!r}: the class "
            f"folders stand in another order as text ({', '.join(classes[:3])}, ...) than as "
            f"numbers; write the name of each by its folder in {folder / _JSON}, such as "
            f'{{"{classes[0]}": "..."}}'
        )
    return classes


def _in_order(folder: Path, names: Sequence[str]) -> list[str]:
    """Sorted as torchvision sorts them, but numbers (ImageNet-V2: 0 to 999) by their value."""
    numbers = [name for name in names if is_bare_number(name)]
    by_value = sorted(numbers, key=lambda name: (int(name), name))
    if len(numbers) == len(names):
        return by_value
    if by_value != sorted(numbers):
        stray = min(name for name in names if name not in numbers)
        raise InputError(
            f"{folder} has class folders that are numbers and {stray!r}, which is none, so that "
            "it is in doubt whether 10 comes before 2; move it away, or write the name of every "
            f"class by its folder in {folder / _JSON}"
        )
    return sorted(names)


def _listed_names(folder: Path) -> list[str] | None:
    """The lines of ``classnames.txt``; None where there is none.

    Raises:
        InputError: if it cannot be read, or a line between others is blank.
    """
    path = folder / _TEXT
    return read_class_names(path) if path.is_file() else None


def read_class_names(path: Path) -> list[str]:
    """One class name per line.

    Raises:
        InputError: if it cannot be read, or a line between others is blank.
    """
    lines = read_lines(path)
    if "" in lines:
        raise InputError(
            f"{path} has a blank line between others (the name of class {lines.index('')}); write "
            "one name per line"
        )
    return lines


def refuse_misspelled_names(folder: Path) -> None:
    """Refuse a file of names that would not be read because of capitals in its own name."""
    for path in folder.iterdir():
        if path.name.lower() in (_JSON, _TEXT) and path.name not in (_JSON, _TEXT):
            raise InputError(
                f"{path} is not read, because it is not called {path.name.lower()}; rename it"
            )


def find_objectnet(folder: Path) -> Path | None:
    """Where the mappings of ObjectNet lie, if this is it or its images; None for other data."""
    places = (folder / "mappings", folder.parent / "mappings")
    return next((p for p in places if all((p / name).is_file() for name in _OBJECTNET)), None)


def _chosen_folders(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """Where it is said which class folders count, and what they are called."""
    named, mappings = folder / _JSON, find_objectnet(folder)
    if named.is_file():
        return named, _read_names(named)
    if mappings is None:
        return None
    labels, shared = (_read_names(mappings / name) for name in _OBJECTNET)
    return mappings, {name: label for name, label in labels.items() if label in shared}


def _read_names(path: Path) -> dict[str, str]:
    content = read_json(path)
    is_mapping = isinstance(content, dict) and content
    if not is_mapping or not all(isinstance(value, str) for value in content.values()):
        raise InputError(
            f"{path} does not map strings to strings; write the name of every class by its folder, "
            'such as {"n01440764": "tench"}'
        )
    if blank := [name for name, value in content.items() if not value.strip()]:
        raise InputError(f"{path} has no name for {blank[0]!r}; write one")
    return {name: value.strip() for name, value in content.items()}


CLASSES = "classes.json"
"""In a run directory: what the classes of the model are called, in the order of their numbers."""


def class_numbers(
    trained: Sequence[str],
    folders: Sequence[str],
    filled: Collection[str],
    *,
    source: Path,
    of: str,
) -> list[int]:
    """The number that training gave each class folder; -1 for one without images that it has not.

    Args:
        trained: the class folders that were trained on, in the order of their numbers.
        folders: those that are measured on, in order.
        filled: those of them that hold images.
        source: where they are.
        of: what was trained on, in words.

    Raises:
        InputError: if a folder with images was not trained on.
    """
    number_of = {name: number for number, name in enumerate(trained)}
    for name in folders:
        if name in filled and name not in number_of:
            like = next((n for n in trained if _plain(n) == _plain(name)), None)
            hint = f" (it has {like!r})" if like is not None else ""
            raise InputError(
                f"{source} has the class {name!r}, which {of} does not have{hint}; give both the "
                "same class folders, or leave those images out"
            )
    return [number_of.get(name, -1) for name in folders]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def keep_classes(
    run_dir: Path,
    folders: Sequence[str],
    names: Sequence[str],
    *,
    source: str,
    is_resumed: bool,
    is_main: bool,
) -> None:
    """Keep what the classes of a run are called, or compare where it goes on.

    Args:
        run_dir: the run directory.
        folders: the class folders, in the order of the class numbers.
        names: what the classes are called, in the same order.
        source: the folder that holds them.
        is_resumed: whether the run goes on, and must have begun with the same.
        is_main: whether this process writes.

    Raises:
        InputError: if a run that goes on began with other classes, or the file cannot be written.
    """
    before = kept_classes(run_dir) if is_resumed else None
    if before is not None and before != list(folders):
        odd = sorted(set(before) ^ set(folders)) or before
        raise InputError(
            f"the class folders of {source} are not those that the run in {run_dir} began with "
            f"(see {odd[0]!r}), so that a number would mean another class; restore them, or choose "
            "another --run.dir"
        )
    if before is None and is_main:
        content = {"folders": list(folders), "names": list(names)}
        write_json(run_dir / CLASSES, content)


def kept_classes(run_dir: Path) -> list[str] | None:
    """The class folders that a run was trained on; None where it was not on class folders.

    Raises:
        InputError: if the file cannot be read.
    """
    path = run_dir / CLASSES
    if not path.is_file():
        return None
    folders = read_json_object(path).get("folders")
    if not isinstance(folders, list) or not all(isinstance(name, str) for name in folders):
        raise InputError(f"{path} does not list the class folders of the run; copy it again")
    return folders
