"""Arrays of an archive, copied into memory of the caller's a MiB at a time.

An array is a folder in zarr's format 2 (``.zarray`` and compressed chunks ``0.0``, ``0.1``, ...),
or stands in the index itself. Either way no array exists twice in memory.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, Protocol

import numpy as np

from frugal.common.errors import InputError
from frugal.flip.archive_files import MALFORMED, UNREADABLE, Files, reason
from frugal.flip.flax_index import Extent, sides

_BLOCK = 1 << 20
"""Bytes that are decompressed at a time."""
_WINDOWS = {None: None, "gzip": 16 + zlib.MAX_WBITS, "zlib": zlib.MAX_WBITS}
"""Compressors by zarr's names, and how zlib is told of them."""


class StoredArray(Protocol):
    """An array of an archive."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        ...

    def read_into(self, destination: np.ndarray) -> None:
        """Copy every value, converted to the destination's dtype.

        Args:
            destination: of the array's shape, in any strides.

        Raises:
            InputError: if the array is damaged.
        """
        ...


@dataclass(frozen=True)
class InlineArray:
    """An array in the index, in one piece or, beyond 1 GiB, in several."""

    where: str
    """The archive and the array, to begin a sentence with."""
    index: BinaryIO
    shape: tuple[int, ...]
    pieces: tuple[Extent, ...]

    def read_into(self, destination: np.ndarray) -> None:
        """Copy every value, converted to the destination's dtype."""
        try:
            _fill(destination, self.shape, self.pieces[0].dtype, _Pieces(self.index, self.pieces))
        except UNREADABLE as error:
            raise InputError(
                f"{self.where} is damaged: what the index holds of it {reason(error)}; download "
                "or copy the archive again"
            ) from None


@dataclass(frozen=True)
class _Layout:
    """What ``.zarray`` says of an array."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    compressor: str | None
    fill: float | None
    """Value of the chunks that are not stored; without it none may be missing."""
    separator: str
    is_fortran: bool
    """The first index of a chunk runs fastest."""


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
        return self._layout.shape

    @cached_property
    def _layout(self) -> _Layout:
        if self._folder is None:
            raise InputError(f"{self._where} is damaged: the index does not tell its folder")
        path = f"{self._folder}/.zarray"
        if not self._files.has(path):
            raise InputError(
                f"{self._where} is missing: there is no {path}; download or copy the archive again"
            )
        try:
            with self._files.open(path) as file:
                return _read_layout(json.loads(file.read(1 << 20)))
        except MALFORMED as error:
            raise InputError(f"{self._where} cannot be read: its {path} {reason(error)}") from None

    def read_into(self, destination: np.ndarray) -> None:
        """Copy every value, converted to the destination's dtype."""
        layout = self._layout
        lengths = list(zip(layout.shape, layout.chunks, strict=True))
        for place in np.ndindex(*(-(-length // chunk) for length, chunk in lengths)):
            box: tuple[Any, ...] = tuple(
                slice(number * chunk, min((number + 1) * chunk, length))
                for number, (length, chunk) in zip(place, lengths, strict=True)
            )
            key = layout.separator.join(map(str, place)) or "0"
            # with ... the box of an array without dimensions is a view, too
            self._read_chunk(f"{self._folder}/{key}", destination[(*box, ...)])

    def _read_chunk(self, path: str, destination: np.ndarray) -> None:
        layout = self._layout
        if not self._files.has(path):
            if layout.fill is None:
                raise InputError(
                    f"{self._where} is damaged: its chunk {path} is missing; download or copy the "
                    "archive again"
                )
            destination[...] = layout.fill
            return
        shape = layout.chunks
        if layout.is_fortran:
            shape, destination = shape[::-1], destination.T
        window = _WINDOWS[layout.compressor]
        try:
            with self._files.open(path) as file:
                stream = file if window is None else _Inflated(file, window)
                _fill(destination, shape, layout.dtype, stream)
        except UNREADABLE as error:
            raise InputError(
                f"{self._where} is damaged: its chunk {path} {reason(error)}; download or copy "
                "the archive again"
            ) from None


def _read_layout(described: Any) -> _Layout:
    """The content of a ``.zarray``, refused where it describes what this reader does not know."""
    if described["zarr_format"] != 2:
        raise ValueError(f"is of zarr format {described['zarr_format']}; only 2 is supported")
    if described.get("filters"):
        raise ValueError("describes filters, which are not supported")
    compressor = described["compressor"]["id"] if described["compressor"] else None
    if compressor not in _WINDOWS:
        raise ValueError(f"names the compressor {compressor!r}; gzip and zlib are supported")
    shape, chunks = sides(described["shape"]), sides(described["chunks"])
    if len(shape) != len(chunks) or 0 in chunks:
        raise ValueError(f"describes chunks of {chunks} in an array of {shape}")
    _storage(described["dtype"])
    separator = described.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise ValueError(f"names the separator {separator!r}; only . and / are known")
    fill = described.get("fill_value")
    return _Layout(
        shape=shape,
        chunks=chunks,
        dtype=described["dtype"],
        compressor=compressor,
        fill=None if fill is None else float(fill),  # "NaN" and "-Infinity" too
        separator=separator,
        is_fortran=described.get("order", "C") == "F",
    )


def _storage(dtype: str) -> np.dtype:
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


def _values(raw: memoryview, dtype: str) -> np.ndarray:
    stored = np.frombuffer(raw, _storage(dtype))
    if dtype == "bfloat16":  # the upper half of a float32
        return (stored.astype("<u4") << 16).view("<f4")
    return stored


def _fill(
    destination: np.ndarray, shape: tuple[int, ...], dtype: str, stream: io.RawIOBase | BinaryIO
) -> None:
    """Copy an array out of a stream that holds it in C order and nothing else.

    Args:
        destination: takes the corner of the array that fits into it, in its own dtype and strides.
        shape: of the array in the stream.
        dtype: of the array in the stream.
        stream: of the values.

    Raises:
        ValueError, EOFError, zlib.error: if the stream is shorter, longer or damaged.
    """
    if not shape:
        shape, destination = (1,), destination.reshape(1)
    row = math.prod(shape[1:]) * _storage(dtype).itemsize
    rows = max(1, min(shape[0], _BLOCK // row)) if row else 1
    buffer = memoryview(bytearray(rows * row))
    inside = tuple(slice(0, length) for length in destination.shape[1:])
    for first in range(0, shape[0] if row else 0, rows):
        raw = buffer[: min(rows, shape[0] - first) * row]
        _read_exactly(stream, raw)
        block = _values(raw, dtype).reshape(-1, *shape[1:])
        target = destination[first : first + rows]  # nothing beyond a ragged edge
        target[...] = block[(slice(0, len(target)), *inside)]
    if stream.read(1):  # also has the checksum at the end verified
        raise ValueError("is longer than its shape")


def _read_exactly(stream: io.RawIOBase | BinaryIO, buffer: memoryview) -> None:
    while buffer:
        count = stream.readinto(buffer)  # type: ignore[union-attr]
        if not count:
            raise EOFError("ends early")
        buffer = buffer[count:]


class _Inflated(io.RawIOBase):
    """What a gzip or zlib stream holds, decompressed as it is read."""

    def __init__(self, file: BinaryIO, window: int) -> None:
        self._file = file
        self._stream = zlib.decompressobj(window)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end, where the stream's checksum was verified."""
        while not self._stream.eof:
            compressed = self._stream.unconsumed_tail or self._file.read(1 << 16)
            if data := self._stream.decompress(compressed, len(buffer)):
                buffer[: len(data)] = data
                return len(data)
            if not compressed and not self._stream.eof:
                raise EOFError("ends early")
        if self._stream.unused_data or self._file.read(1):
            raise ValueError("goes on behind its end")
        return 0


class _Pieces(io.RawIOBase):
    """Several places of one file, one behind the other."""

    def __init__(self, file: BinaryIO, extents: Sequence[Extent]) -> None:
        self._file = file
        self._left = [(extent.offset, extent.size) for extent in extents]

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end."""
        while self._left and self._left[0][1] == 0:
            self._left.pop(0)
        if not self._left:
            return 0
        offset, size = self._left[0]
        self._file.seek(offset)
        wanted = memoryview(buffer)[: min(len(buffer), size)]
        count = self._file.readinto(wanted)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("ends early")
        self._left[0] = (offset + count, size - count)
        return count
