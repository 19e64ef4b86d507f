"""Arrays of an archive, copied into memory of the caller's without a second copy of their own.

An array is a folder in zarr's format 2 (``.zarray`` and compressed chunks ``0.0``, ``0.1``, ...),
or stands in the index itself. The zarr package reads folders. It would unpack chunks whole in
memory, and a chunk may be the whole array; so they are unpacked a MiB at a time, those beyond a MiB
into a temporary file, which zarr finds mapped into memory: the system takes its pages back at any
time. Free room for the largest chunk is needed in the folder for temporary files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from frugal.common.errors import InputError
from frugal.common.files import parse_json
from frugal.flip.archive_files import (
    MALFORMED,
    UNREADABLE,
    Files,
    content,
    inflated,
    library,
    mapped,
    reason,
    unpacked,
)
from frugal.flip.flax_index import Extent, sides

_COMPRESSORS = (None, "gzip", "zlib")
"""By zarr's names; others are not found in archives of t5x."""
_UPPER_HALF = np.dtype({"names": ["bits"], "formats": ["<u2"], "offsets": [2], "itemsize": 4})
"""What a bfloat16 is of a float32."""


@dataclass(frozen=True)
class InlineArray:
    """An array in the index, in one piece or, beyond 1 GiB, in several."""

    where: str
    """The archive and the array, to begin a sentence with."""
    index: BinaryIO
    shape: tuple[int, ...]
    pieces: tuple[Extent, ...]

    def read_into(self, destination: np.ndarray) -> None:
        """Copy every value, converted to the destination's dtype.

        Args:
            destination: of the array's shape, in any strides; float32 if the array is bfloat16.

        Raises:
            InputError: if the array is damaged.
        """
        dtype, begin = self.pieces[0].dtype, 0
        try:
            storage, target = _storage(dtype), _target(destination, dtype)
            for piece in self.pieces:
                raw = mapped(self.index, piece.offset, piece.size)
                values = raw.view(storage)
                begin += len(values)
                if len(self.pieces) == 1:  # faster than .flat
                    target[...] = values.reshape(self.shape)
                else:
                    target.flat[begin - len(values) : begin] = values
            if begin != math.prod(self.shape):
                raise ValueError("is of another size than its shape")
        except UNREADABLE as error:
            raise InputError(
                f"{self.where} is damaged: what the index holds of it {reason(error)}; download "
                "or copy the archive again"
            ) from None


class ZarrArray:
    """An array in a folder of its own."""

    def __init__(self, where: str, files: Files, folder: str | None) -> None:
        """Nothing is read yet.

        Args:
            where: the archive and the array, to begin a sentence with.
            files: of the archive.
            folder: of the array; None where the index names none.
        """
        self._where = where
        self._files = files
        self._folder = folder

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self._described["shape"])

    @cached_property
    def _described(self) -> dict[str, Any]:
        """The content of ``.zarray``."""
        if self._folder is None:
            raise InputError(f"{self._where} is damaged: the index does not tell its folder")
        path = f"{self._folder}/.zarray"
        if not self._files.has(path):
            raise InputError(
                f"{self._where} is missing: there is no {path}; download or copy the archive again"
            )
        try:
            with self._files.open(path) as file:
                described = parse_json(file.read(1 << 20))
            _check(described)
        except MALFORMED as error:
            raise InputError(f"{self._where} cannot be read: its {path} {reason(error)}") from None
        return described

    def read_into(self, destination: np.ndarray) -> None:
        """Copy every value, converted to the destination's dtype.

        Args:
            destination: of the array's shape, in any strides; float32 if the array is bfloat16.

        Raises:
            InputError: if the array is damaged, or zarr is not installed.
        """
        zarr, memory = library("zarr"), library("zarr.buffer.cpu")
        dtype, fill = self._described["dtype"], self._described["fill_value"]
        if fill is not None and dtype == "bfloat16":
            fill = int(np.float32(fill).view("<u4") >> 16)
        shown = {"compressor": None, "dtype": _storage(dtype).str, "fill_value": fill}
        described = json.dumps(self._described | shown).encode()
        store = _Chunks(self, {".zarray": memory.Buffer.from_bytes(described)})
        try:
            files = zarr.storage.MemoryStore(store, read_only=True)
            array = zarr.open_array(files, mode="r", zarr_format=2)
            target = _target(destination, dtype)
            # zarr would hold all chunks of what it is asked for
            for place in np.ndindex(array.cdata_shape):
                box: tuple[Any, ...] = tuple(
                    slice(number * side, (number + 1) * side)
                    for number, side in zip(place, array.chunks, strict=True)
                )
                # with ... the box of an array without dimensions is a view, too
                out = memory.NDBuffer.from_numpy_array(target[(*box, ...)])
                array.get_basic_selection(box, out=out)
        except MALFORMED as error:
            raise InputError(f"{self._where} cannot be read: it {reason(error)}") from None

    def unpacked_chunk(self, key: str) -> np.ndarray:
        """The bytes of a chunk.

        Raises:
            KeyError: if it is not stored.
            InputError: if it must be, or is damaged.
        """
        path, described = f"{self._folder}/{key}", self._described
        if not self._files.has(path):
            if described["fill_value"] is not None:
                raise KeyError(key)
            raise InputError(
                f"{self._where} is damaged: its chunk {path} is missing; download or copy the "
                "archive again"
            )
        size = math.prod(described["chunks"]) * _storage(described["dtype"]).itemsize
        try:
            file = self._files.open(path)
            with unpacked(
                inflated(file) if described["compressor"] else content(file), size
            ) as raw:
                return mapped(raw)
        except UNREADABLE as error:
            raise InputError(
                f"{self._where} is damaged: its chunk {path} {reason(error)}; download or copy "
                "the archive again"
            ) from None


StoredArray: TypeAlias = InlineArray | ZarrArray


class _Chunks(dict[str, Any]):
    """What zarr finds in its store: chunks that are unpacked when it asks for them."""

    def __init__(self, array: ZarrArray, described: dict[str, Any]) -> None:
        super().__init__(described)
        self._array = array

    def __missing__(self, key: str) -> Any:
        if key.startswith(".z"):
            raise KeyError(key)
        return library("zarr.buffer.cpu").Buffer.from_array_like(self._array.unpacked_chunk(key))


def _check(described: Any) -> None:
    """Refuse what is not read here, of a ``.zarray``, before zarr sees it.

    Raises:
        ValueError, KeyError, TypeError: with a few words, to follow the name of the file.
    """
    if described["zarr_format"] != 2:
        raise ValueError(f"is of zarr format {described['zarr_format']}; only 2 is supported")
    if described.get("filters"):  # one of them unpickles
        raise ValueError("describes filters, which are not supported")
    compressor = described["compressor"]["id"] if described["compressor"] else None
    if compressor not in _COMPRESSORS:
        raise ValueError(f"names the compressor {compressor!r}; gzip and zlib are supported")
    shape, chunks = sides(described["shape"]), sides(described["chunks"])
    if len(shape) != len(chunks) or 0 in chunks:
        raise ValueError(f"describes chunks of {chunks} in an array of {shape}")
    _storage(described["dtype"])
    float(described.setdefault("fill_value", None) or 0)  # "NaN" and "-Infinity" are numbers, too


def _storage(dtype: Any) -> np.dtype:
    """What numpy reads floating-point numbers or integers as.

    Raises:
        ValueError: if it is neither.
    """
    if dtype == "bfloat16":
        return np.dtype("<u2")
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found.kind not in "fiu":
        raise ValueError(f"has values of type {dtype!r}, which are not supported")
    return found.newbyteorder("<") if found.byteorder == "=" else found


def _target(destination: np.ndarray, dtype: str) -> np.ndarray:
    """Where to copy what :func:`_storage` reads of a dtype."""
    if dtype != "bfloat16":
        return destination
    halves = destination.view(_UPPER_HALF)["bits"]
    destination[...] = 0
    return halves
