"""Flax's msgpack as a tree in which arrays are places in the file, not values.

An index may hold arrays of any size beside its descriptions, and msgpack's Unpacker hands out a
value only once it holds all of it. Values beyond 128 KiB are therefore not shown to it but
skipped; arrays are read later from where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from frugal.flip.archive_files import library

_DEEPEST = 200
_LONGEST = 1 << 17
_ARRAY, _SCALAR = 1, 3
"""Flax's extensions: [shape, dtype, values] of an array and of a numpy scalar. 2 is a complex
number; it and others are skipped."""
_MAPS = {*range(0x80, 0x90), 0xDE, 0xDF}
_LISTS = {*range(0x90, 0xA0), 0xDC, 0xDD}
_BYTES, _EXTENSION, _TEXT = 0xC6, 0xC9, 0xDB
"""First bytes of values (msgpack specification); of the last three, four bytes of length follow."""


@dataclass(frozen=True)
class Extent:
    """An array in the index: its values, in C order, are at one place of the file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int
    """Bytes."""


def read_index(content: memoryview) -> dict[str, Any]:
    """The map that a whole file holds: maps, texts, numbers, and :class:`Extent` for every array.

    Args:
        content: the file's bytes, mapped into memory.

    Raises:
        ValueError, EOFError: if it holds something else, or ends early.
        InputError: if msgpack is not installed.
    """
    reader = _Reader(content)
    try:
        tree = reader.value(depth=0)
    except (reader.msgpack.OutOfData, IndexError):
        raise EOFError("ends early") from None
    if not isinstance(tree, dict) or reader.offset != len(content):
        raise ValueError("is no tree that flax has written")
    return tree


def sides(shape: Any) -> tuple[int, ...]:
    """A shape as it was read.

    Raises:
        ValueError: if it is none.
    """
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"describes an array of shape {shape}")
    return tuple(shape)


class _Tail:
    """Bytes from an offset on, as msgpack wants a file."""

    def __init__(self, content: memoryview, offset: int) -> None:
        self._content = content
        self._offset = offset

    def read(self, size: int) -> bytes:
        """The next bytes."""
        begin = self._offset
        self._offset += size
        return bytes(self._content[begin : self._offset])


class _Reader:
    def __init__(self, content: memoryview) -> None:
        self.msgpack = library("msgpack")
        self._content = content
        self._go_on_from(0)

    def _go_on_from(self, offset: int) -> None:
        self._begin = offset
        self._unpacker = self.msgpack.Unpacker(
            _Tail(self._content, offset), read_size=1 << 14, ext_hook=self._extension
        )

    @property
    def offset(self) -> int:
        """Where the next value begins."""
        return self._begin + self._unpacker.tell()

    def value(self, depth: int) -> Any:
        """The value that begins here."""
        if depth > _DEEPEST:
            raise ValueError("is nested too deeply")
        code = self._content[self.offset]
        if code in _MAPS:
            pairs = range(self._unpacker.read_map_header())
            return {self._name(): self.value(depth + 1) for _ in pairs}
        if code in _LISTS:
            return [self.value(depth + 1) for _ in range(self._unpacker.read_array_header())]
        if code in (_BYTES, _EXTENSION, _TEXT) and self._length(self.offset) > _LONGEST:
            return self._long(self.offset, is_extension=code == _EXTENSION)
        value = self._unpacker.unpack()
        if isinstance(value, Extent):  # its values end where the extension does
            return replace(value, offset=self.offset - value.size)
        return value

    def _name(self) -> str:
        name = self._unpacker.unpack()
        if not isinstance(name, (str, int)):
            raise ValueError("has a name that is no text")
        return str(name)

    def _length(self, offset: int) -> int:
        return int.from_bytes(self._content[offset + 1 : offset + 5], "big")

    def _extension(self, kind: int, data: bytes) -> Extent | None:
        """An array that msgpack has read; where it was is not known here."""
        if kind not in (_ARRAY, _SCALAR):
            return None
        parts = self.msgpack.unpackb(data, raw=True)  # flax once wrote the values as text
        if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], bytes):
            raise ValueError("holds an array that is malformed")
        return _extent(parts[0], parts[1], offset=0, size=len(parts[2]))

    def _long(self, offset: int, *, is_extension: bool) -> Extent | None:
        """The place of a long array, or nothing for what else is long."""
        begin = offset + 5 + is_extension
        end = begin + self._length(offset)
        if end > len(self._content):
            raise EOFError("ends early")
        self._go_on_from(end)
        if not is_extension or self._content[begin - 1] not in (_ARRAY, _SCALAR):
            return None
        unpacker = self.msgpack.Unpacker(raw=True)
        unpacker.feed(self._content[begin : begin + _LONGEST])
        parts, shape, dtype = unpacker.read_array_header(), unpacker.unpack(), unpacker.unpack()
        values = begin + unpacker.tell()
        found = _extent(shape, dtype, offset=values + 5, size=self._length(values))
        is_whole = parts == 3 and found.offset + found.size == end
        if not is_whole or self._content[values] not in (_BYTES, _TEXT):
            raise ValueError("holds an array that is malformed")
        return found


def _extent(shape: Any, dtype: Any, *, offset: int, size: int) -> Extent:
    if not isinstance(shape, list) or not isinstance(dtype, bytes):
        raise ValueError("holds an array that is malformed")
    return Extent(sides(shape), dtype.decode(), offset, size)
