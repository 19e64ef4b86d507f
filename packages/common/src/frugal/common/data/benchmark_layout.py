"""The text files that describe a data set, in the layout of clip_benchmark."""

from __future__ import annotations

from pathlib import Path

from frugal.common.data.patterns import kind_of
from frugal.common.data.stores.class_folders import find_objectnet, read_class_names
from frugal.common.errors import InputError
from frugal.common.files import is_system_name, read_lines


def check_number_of_shards(folder: Path, files: list[Path]) -> None:
    """Refuse a folder that holds other shards than its ``nshards.txt`` says.

    Raises:
        InputError: if their number differs, or the file does not hold one.
    """
    listed = folder / "nshards.txt"
    if not listed.is_file():
        return
    lines = read_lines(listed)
    if len(lines) != 1 or not lines[0].isdecimal():
        raise InputError(
            f"{listed} must hold one whole number, the number of the tars beside it, but says "
            f"{' '.join(lines)!r}; correct it"
        )
    if int(lines[0]) != len(files):
        what = "copy what is missing" if int(lines[0]) > len(files) else "remove what is not of it"
        raise InputError(
            f"{listed} says {lines[0]!r} shards but {folder} holds {len(files)}; {what}"
        )


def test_split(folder: Path) -> Path:
    """clip_benchmark keeps its splits in sub-folders; other layouts are the folder itself."""
    split, images = folder / "test", folder / "images"
    if split.is_dir() and next(split.glob("*.tar"), None):
        return split
    return images if images.is_dir() and find_objectnet(folder) else folder


def find_text(folder: Path, name: str) -> Path | None:
    """A text file of a data set, in its folder or the one above; None if there is none."""
    return next((p for p in (folder / name, folder.parent / name) if p.is_file()), None)


def has_class_names(folder: Path) -> bool:
    """Whether a data set comes with a list of what its classes are called."""
    return find_text(test_split(folder), "classnames.txt") is not None


def holds_class_folders(folder: Path) -> bool:
    """Whether images lie in one folder per class, without shards or lists beside them."""
    split = test_split(folder)
    if not split.is_dir():
        return False
    inside = [path for path in split.iterdir() if not is_system_name(path.name)]
    has_stores = any(kind_of(path) is not None for path in inside if path.is_file())
    return not has_stores and any(path.is_dir() for path in inside)


def class_names(folder: Path) -> list[str] | None:
    """What the classes of a data set are called, by ``classnames.txt``; None where it has none."""
    path = find_text(folder, "classnames.txt")
    return None if path is None else read_class_names(path)


def templates(folder: Path) -> list[str] | None:
    """Prompts with ``{c}`` for the class.

    Raises:
        InputError: if the file holds none, or a blank line between others.
    """
    path = find_text(folder, "zeroshot_classification_templates.txt")
    if path is None:
        return None
    lines = read_lines(path)
    if not lines or "" in lines:
        raise InputError(
            f"{path} {'has a blank line between others' if lines else 'holds no template'}; write "
            "one template per line, such as 'a photo of a {c}.', or remove the file"
        )
    return lines


DATASET_TYPES = ("classification", "retrieval", "multilabel")
"""What clip_benchmark calls the kinds of data sets."""


def dataset_type(folder: Path) -> str | None:
    """What ``dataset_type.txt`` says of a data set, in its folder or the one above; or None.

    Raises:
        InputError: if it is none of clip_benchmark's words.
    """
    path = find_text(test_split(folder), "dataset_type.txt")
    if path is None:
        return None
    word = " ".join(read_lines(path)).lower()
    if word not in DATASET_TYPES:
        raise InputError(
            f"{path} says {word!r}, which is no kind of data set; write one of "
            f"{', '.join(DATASET_TYPES)}, or remove it for classification"
        )
    return word


def is_multi_labeled(folder: Path) -> bool:
    """Whether clip_benchmark's layout says that an image may be of several classes."""
    return dataset_type(folder) == "multilabel"
