"""T5x checkpoints, as FLIP's weights were released: an index beside one zarr array per parameter.

``checkpoint_380000/``
    ``checkpoint``  flax's msgpack: the tree of parameters and optimizer state, each leaf a
    description of a zarr array, or the array itself;
    ``target.img_encoder.cls/``  the array of one parameter.
"""

from __future__ import annotations

import itertools
import math
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from frugal.common.errors import InputError
from frugal.flip.archive_files import (
    MALFORMED,
    Files,
    Folder,
    Zip,
    content,
    is_zip,
    mapped,
    reason,
    unpacked,
)
from frugal.flip.flax_index import Extent, read_index, sides
from frugal.flip.stored_arrays import InlineArray, StoredArray, ZarrArray

_INDEX = "checkpoint"
_STEP_FOLDER = re.compile(r"checkpoint_(\d+)")
_UNFINISHED = re.compile(r"checkpoint_\d+\.tmp.*")
"""T5x writes to such a folder and renames it when it is whole."""


class T5xArchive:
    """One checkpoint of an archive; a context manager, as it may hold files open."""

    def __init__(self, files: Files, index: str, *, older: Sequence[str] = ()) -> None:
        """Read the index.

        Args:
            files: of the archive.
            index: which of them is the index; the arrays are beside it.
            older: folders of the archive's older checkpoints.

        Raises:
            InputError: if the index is damaged, or none of t5x.
        """
        self._files = files
        self._folder = posixpath.dirname(index)
        self.older = older
        """Folders of the archive's older checkpoints."""
        self.name = f"{files.path}/{self._folder}" if self._folder else str(files.path)
        """To begin a sentence with."""
        try:
            self._index = unpacked(content(files.open(index)))
            tree = read_index(mapped(self._index).data)
        except MALFORMED as error:
            raise InputError(
                f"{files.path / index} is damaged, or no index of a t5x checkpoint: it "
                f"{reason(error)}; download or copy the archive again"
            ) from None
        optimizer = tree.get("optimizer", tree)
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("target"), dict):
            raise InputError(
                f"{self.name} is no t5x checkpoint: its index has no parameters (optimizer/target)"
            )
        self.arrays = dict(self._arrays(optimizer, ""))
        """Every array by slash-joined path: ``target/...``, and ``state/...`` where it was kept."""

    def _arrays(self, tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, StoredArray]]:
        for key, value in tree.items():
            name = prefix + key
            where = f"{self.name}: the array {name.removeprefix('target/')}"
            if isinstance(value, Extent):
                yield name, InlineArray(where, self._index, value.shape, (value,))
            elif not isinstance(value, dict):
                continue  # a number, or nothing
            elif "__msgpack_chunked_array__" in value:
                yield name, InlineArray(where, self._index, *_pieces(value, where))
            elif isinstance(value.get("driver"), str):
                yield name, ZarrArray(where, self._files, self._array_folder(value))
            else:
                yield from self._arrays(value, f"{name}/")

    def _array_folder(self, described: dict[str, Any]) -> str | None:
        """Beside the index, whatever machine or bucket the description was written on."""
        store = described.get("kvstore")
        paths = (store.get("path") if isinstance(store, dict) else store, described.get("path"))
        folders = []
        for path in paths:  # tensorstore once wrote the path beside the store
            parts = path.split("/") if isinstance(path, str) else []
            parts = [part for part in parts if part not in ("", ".")]
            if parts and ".." not in parts:
                folders += ["/".join(parts), parts[-1]]
        beside = [posixpath.join(self._folder, folder) for folder in folders]
        there = (folder for folder in beside if self._files.has(f"{folder}/.zarray"))
        return next(there, beside[-1] if beside else None)

    @property
    def parameters(self) -> dict[str, StoredArray]:
        """The model's arrays by slash-joined path."""
        return {
            name.removeprefix("target/"): array
            for name, array in self.arrays.items()
            if name.startswith("target/")
        }

    @property
    def step(self) -> int:
        """Optimizer steps taken; 0 where neither the index nor the folder's name tells."""
        saved = self.arrays.get("state/step")
        if saved is None or math.prod(saved.shape) != 1:
            return _step_of(self._folder or str(self._files.path.resolve())) or 0
        step = np.zeros(saved.shape, dtype=np.int64)
        saved.read_into(step)
        return max(0, int(step.item()))

    def __enter__(self) -> T5xArchive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._index.close()
        self._files.close()


def _pieces(value: dict[str, Any], where: str) -> tuple[tuple[int, ...], tuple[Extent, ...]]:
    """Shape and pieces of an array beyond 1 GiB: flax's lists are maps from "0" on there."""
    try:
        shape = sides([value["shape"][str(i)] for i in range(len(value["shape"]))])
        pieces = tuple(value["chunks"][str(i)] for i in range(len(value["chunks"])))
    except MALFORMED:
        pieces = ()
    if not pieces or not all(isinstance(piece, Extent) for piece in pieces):
        raise InputError(f"{where} is damaged: the index does not describe its pieces")
    return shape, pieces


def _step_of(folder: str) -> int | None:
    match = _STEP_FOLDER.fullmatch(posixpath.basename(folder))
    return int(match[1]) if match else None


def open_archive(source: Path) -> T5xArchive:
    """The checkpoint in a zip, a folder of checkpoints, one checkpoint's folder, or an index file.

    Of several checkpoints side by side, the newest.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    if not source.exists():
        raise InputError(f"there is no {source}; give FLIP's archive, or the folder it unpacks to")
    if source.is_file() and not is_zip(source):
        return T5xArchive(Folder(source.parent), source.name)
    files = Folder(source) if source.is_dir() else Zip(source)
    index, *older = _newest_first(files)
    return T5xArchive(files, index, older=[posixpath.dirname(path) for path in older])


def _newest_first(files: Files) -> list[str]:
    """The indices of an archive: one, or those of several steps in one folder."""
    if files.has(_INDEX):
        return [_INDEX]
    found = {path: posixpath.dirname(path) for path in files.named(_INDEX)}
    found = {
        path: folder
        for path, folder in found.items()
        if not _UNFINISHED.fullmatch(posixpath.basename(folder))
    }
    if not found:
        raise InputError(
            f"{files.path} holds no t5x checkpoint: there is no file named {_INDEX!r} with "
            "folders target.... beside it; give FLIP's archive, or the folder it unpacks to"
        )
    steps = {path: _step_of(folder) for path, folder in found.items()}
    in_one_place = len({posixpath.dirname(folder) for folder in found.values()}) == 1
    if len(found) > 1 and (None in steps.values() or not in_one_place):
        one, other = itertools.islice(sorted(found.values()), 2)
        raise InputError(
            f"{files.path} holds several checkpoints, such as {one} and {other}; unpack it and "
            "give the folder of the one you mean"
        )
    return sorted(found, key=lambda path: steps[path] or 0, reverse=True)
