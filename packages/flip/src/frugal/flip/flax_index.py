"""Flax's msgpack as a tree in which arrays are places in the file, not values.

An index may hold arrays of any size beside its descriptions. The msgpack package would hold all
of them, and the largest three times; here they are skipped, and read later from where they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

_DEEPEST = 200
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: "f", 0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q",
    0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q",
}  # fmt: skip
_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_LENGTHS = {
    0xC4: ("bytes", "B"), 0xC5: ("bytes", "H"), 0xC6: ("bytes", "I"),
    0xC7: ("extension", "B"), 0xC8: ("extension", "H"), 0xC9: ("extension", "I"),
    0xD9: ("text", "B"), 0xDA: ("text", "H"), 0xDB: ("text", "I"),
    0xDC: ("list", "H"), 0xDD: ("list", "I"), 0xDE: ("map", "H"), 0xDF: ("map", "I"),
}  # fmt: skip
"""First bytes of values (msgpack specification): what follows, in struct's letters."""
_ARRAY, _SCALAR = 1, 3
"""Flax's extensions: [shape, dtype, values] of an array and of a numpy scalar. 2 is a complex
number; it and others are skipped."""


@dataclass(frozen=True)
class Extent:
    """An array in the index: its values, in C order, are at one place of the file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int
    """Bytes."""


def read_index(file: BinaryIO, size: int) -> dict[str, Any]:
    """The map that a whole file holds: maps, texts, numbers, and :class:`Extent` for every array.

    Args:
        file: at its beginning; it is left at its end.
        size: bytes of the file.

    Raises:
        ValueError, EOFError: if it holds something else, or ends early.
    """
    reader = _Reader(file, size)
    tree = reader.value(depth=0)
    if not isinstance(tree, dict) or file.tell() != size:
        raise ValueError("is no tree that flax has written")
    return tree


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def value(self, depth: int) -> Any:
        """The value that begins here."""
        if depth > _DEEPEST:
            raise ValueError("is nested too deeply")
        code = self._take(1)[0]
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code <= 0xBF:
            return self._sized(*_short(code), depth=depth)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if code in _EXTENSIONS:
            return self._extension(_EXTENSIONS[code], depth)
        if code not in _LENGTHS:
            raise ValueError(f"has a byte {code:#x} where a value should begin")
        kind, layout = _LENGTHS[code]
        return self._sized(kind, self._number(layout), depth=depth)

    def _sized(self, kind: str, length: int, *, depth: int) -> Any:
        if kind == "map":
            return {self._name(): self.value(depth + 1) for _ in range(length)}
        if kind == "list":
            return [self.value(depth + 1) for _ in range(length)]
        if kind == "text":
            return self._take(length).decode()
        if kind == "extension":
            return self._extension(length, depth)
        self._skip(length)
        return None

    def _name(self) -> str:
        name = self.value(_DEEPEST)
        if not isinstance(name, (str, int)):
            raise ValueError("has a name that is no text")
        return str(name)

    def _extension(self, length: int, depth: int) -> Extent | None:
        kind = self._number("b")
        start = self._file.tell()
        if kind not in (_ARRAY, _SCALAR):
            self._skip(length)
            return None
        code, shape, dtype = self._take(1)[0], self.value(depth + 1), self.value(depth + 1)
        offset, size = self._raw()
        is_whole = code == 0x93 and self._file.tell() == start + length  # a list of three
        if not (is_whole and isinstance(shape, list) and isinstance(dtype, str)):
            raise ValueError("holds an array that is malformed")
        return Extent(sides(shape), dtype, offset, size)

    def _raw(self) -> tuple[int, int]:
        """Where the values of an array are; flax once wrote them as text."""
        code = self._take(1)[0]
        if 0xA0 <= code <= 0xBF:
            return self._skip(code & 0x1F)
        kind, layout = _LENGTHS.get(code, ("", ""))
        if kind not in ("bytes", "text"):
            raise ValueError("holds an array without values")
        return self._skip(self._number(layout))

    def _skip(self, length: int) -> tuple[int, int]:
        """Where some bytes are, and how many; the file stands behind them afterwards."""
        offset = self._file.tell()
        if offset + length > self._size:
            raise EOFError("ends early")
        self._file.seek(offset + length)
        return offset, length

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError("ends early")
        return data

    def _number(self, layout: str) -> Any:
        return struct.unpack(f">{layout}", self._take(struct.calcsize(layout)))[0]


def sides(shape: list[Any]) -> tuple[int, ...]:
    """A shape as it was read.

    Raises:
        ValueError: if it is none.
    """
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"describes an array of shape {shape}")
    return tuple(shape)


def _short(code: int) -> tuple[str, int]:
    """Maps, lists and texts whose length is in their first byte."""
    if code <= 0x8F:
        return "map", code & 0x0F
    if code <= 0x9F:
        return "list", code & 0x0F
    return "text", code & 0x1F
