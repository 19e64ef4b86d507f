"""Classes of different folders, brought together by name; a run keeps those it began with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from frugal.common.data.stores.folder import FileList
from frugal.common.errors import InputError
from frugal.common.files import read_json_object, write_json

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


def keep_classes(run_dir: Path, shard: FileList, *, is_resumed: bool, is_main: bool) -> None:
    """Keep what the classes of a run are called, or compare where it goes on.

    Raises:
        InputError: if a run that goes on began with other classes, or the file cannot be written.
    """
    before = kept_classes(run_dir) if is_resumed else None
    if before is not None and before != list(shard.class_folders):
        odd = sorted(set(before) ^ set(shard.class_folders)) or before
        raise InputError(
            f"the class folders of {shard.name} are not those that the run in {run_dir} began with "
            f"(see {odd[0]!r}), so that a number would mean another class; restore them, or choose "
            "another --run.dir"
        )
    if before is None and is_main:
        content = {"folders": list(shard.class_folders), "names": list(shard.class_names)}
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
