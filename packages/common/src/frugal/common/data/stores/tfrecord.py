"""TFRecord files as img2dataset writes them, read without TensorFlow.

A record is framed as ``uint64 length, uint32 crc(length), data, uint32 crc(data)`` with masked
CRC-32C checksums, and its data is a ``tf.train.Example`` protocol buffer.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from frugal.common.data.damage import Damaged
from frugal.common.data.samples import (
    RawSample,
    StringTable,
    caption_lines,
    caption_text,
    class_number,
    decode_label,
    decode_text,
    group_text,
    no_image,
    select_captions,
)
from frugal.common.data.stores.index import (
    IndexedReader,
    ShardIndex,
    damage_code,
    foreign_content,
    refuse_empty,
    unreadable_shard,
)
from frugal.common.errors import InputError
from frugal.common.files import open_file

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_VARINT_BITS, _MOST = 70, (1 << 64) - 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Features = dict[str, list[bytes] | list[int] | np.ndarray]
"""What a record holds, by name."""


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    return int(google_crc32c.value(data))


def mask_checksum(checksum: int) -> int:
    """The form in which TFRecords store a CRC-32C."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def index_records(shard: Path) -> ShardIndex:
    """Read a TFRecord file from end to end and say where its records are.

    Raises:
        InputError: if the file cannot be read, is empty or holds no TFRecords.
    """
    try:
        with io.BufferedReader(open_file(shard)) as file:
            return _index_open_records(file, shard)
    except OSError as error:
        raise unreadable_shard(shard, error) from None


def _index_open_records(file: BinaryIO, shard: Path) -> ShardIndex:
    size = os.fstat(file.fileno()).st_size
    refuse_empty(file, shard)
    offsets, lengths, checksums, damage = [], [], [], []
    note, position = "", 0
    while position < size:
        header = file.read(_HEADER.size)
        length = _record_length(header)
        end = position + _HEADER.size + (length or 0) + _FOOTER.size
        if length is None and not position and len(header) == _HEADER.size:
            foreign = foreign_content(file)
            wrong = f": it is {foreign}" if foreign else "; copy it again, or unpack it first"
            raise InputError(f"{shard} does not begin like a TFRecord file{wrong}")
        broken = length is None or end > size
        data = b"" if broken else file.read(length or 0)
        offsets.append(position + _HEADER.size)
        lengths.append(len(data))
        checksums.append(zlib.crc32(data))
        if broken:
            note = f"damaged or cut off: no readable record at byte {position} of {size}"
            damage.append(damage_code("truncated"))
            break
        matches = _matches(data, file.read(_FOOTER.size))
        damage.append(0 if matches else damage_code("checksum"))
        position = end
    return ShardIndex(
        names=StringTable.of([]),
        offsets=np.array(offsets, np.int64),
        lengths=np.array(lengths, np.int64),
        checksums=np.array(checksums, np.uint32),
        first_member=np.arange(len(offsets) + 1, dtype=np.int64),
        damage=np.array(damage, np.uint8),
        shard_bytes=size,
        note=note,
    )


def _record_length(header: bytes) -> int | None:
    if len(header) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack(header)
    return length if mask_checksum(crc32c(header[:8])) == checksum else None


def _matches(data: bytes, footer: bytes) -> bool:
    return mask_checksum(crc32c(data)) == _FOOTER.unpack(footer)[0]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < _VARINT_BITS:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MOST, position
        shift += 7
    raise ValueError("a number has no end")


def _wire_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message: number and value, in the order written."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + length > len(data):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, data[position : position + length]
        position += length


def _only(message: memoryview, number: int) -> Iterator[memoryview]:
    for found, value in _wire_fields(message):
        if found == number and isinstance(value, memoryview):
            yield value


def _integers(message: memoryview) -> Iterator[int]:
    """The values of an Int64List, packed or not."""
    for number, value in _wire_fields(message):
        if number != 1:
            continue
        values = [value] if isinstance(value, int) else []
        position = 0
        while isinstance(value, memoryview) and position < len(value):
            item, position = _varint(value, position)
            values.append(item)
        yield from (item - (1 << 64) if item >> 63 else item for item in values)


def _floats(message: memoryview) -> np.ndarray:
    """The values of a FloatList, packed or not: (n,) float32."""
    return np.frombuffer(b"".join(_only(message, 1)), "<f4")


def parse_example(data: bytes, *, floats: bool = False) -> Features:
    """The byte strings and integers of a ``tf.train.Example`` by name.

    Args:
        data: the message.
        floats: floats too, as float32 arrays; they are left out otherwise.

    Raises:
        ValueError: if the bytes are no such message.
    """
    try:
        return _parse_example(memoryview(data), floats=floats)
    except IndexError:
        raise ValueError("the message ends in the middle of a number") from None


def _parse_example(data: memoryview, *, floats: bool) -> Features:
    features: Features = {}
    for feature_map in _only(data, 1):
        for entry in _only(feature_map, 1):
            name = next(_only(entry, 1), memoryview(b"")).tobytes().decode("utf-8")
            for kind, values in _wire_fields(next(_only(entry, 2), memoryview(b""))):
                if kind == 1 and isinstance(values, memoryview):
                    features[name] = [value.tobytes() for value in _only(values, 1)]
                elif kind == 2 and floats and isinstance(values, memoryview):
                    features[name] = _floats(values)
                elif kind == 3 and isinstance(values, memoryview):
                    features[name] = list(_integers(values))
    return features


class RecordReader(IndexedReader):
    """An opened TFRecord file of one process."""

    def key(self, index: int) -> str:
        """``shard/number`` of a record."""
        return f"{self.path}/{index}"

    def features(self, index: int) -> Features:
        """The byte strings and numbers of a record by name.

        Raises:
            Damaged: if the record was damaged when it was indexed, or has changed since.
        """
        if kind := self.index.damage_of(index):
            raise Damaged(kind)
        try:
            return parse_example(self.content(index), floats=True)
        except ValueError as error:
            raise Damaged("unreadable", str(error)) from None

    def captions(self, index: int) -> list[str]:
        """The captions of a sample; raises ``Damaged``."""
        return self._captions(self.features(index))

    def read(self, index: int) -> RawSample:
        """A sample.

        Raises:
            Damaged: as :meth:`features`, and if it has no image.
        """
        features = self.features(index)
        images = (features[name] for name in self.fields.image if len(features.get(name, [])))
        image = next((values[0] for values in images if isinstance(values[0], bytes)), None)
        if image is None:
            raise no_image(self.fields, features)
        unreadable: list[Damaged] = []
        return RawSample(
            image=image,
            captions=self._captions(features, unreadable),
            label=_label(features.get("cls", [])),
            group=self._group(features),
            names=features.keys(),
            repaired=str(unreadable[0]) if unreadable else "",
        )

    def _group(self, features: Features) -> str | None:
        values = features.get((self.fields.group or "").removeprefix("json."), [])
        if not len(values) or isinstance(values, np.ndarray):
            return None
        value = values[0]
        return group_text(decode_text(value) if isinstance(value, bytes) else value)

    def _captions(self, features: Features, unreadable: list[Damaged] | None = None) -> list[str]:
        # img2dataset writes the fields of a sample's JSON as features of their own
        def values_of(field: str) -> list[Any]:
            values = features.get(field.removeprefix("json."), [])
            if isinstance(values, np.ndarray):  # with the digits that float32 holds
                return values[np.isfinite(values)].astype(str).tolist()
            texts = [decode_text(v) if isinstance(v, bytes) else v for v in values]
            if self.fields.caption_per_line and not field.startswith("json."):
                return [line for text in texts for line in caption_lines(caption_text(text))]
            return texts

        return select_captions(self.fields, values_of, unreadable)


def _label(values: list[bytes] | list[int] | np.ndarray) -> int | None:
    if not len(values):
        return None
    if isinstance(values, np.ndarray):
        raise Damaged("label", f"{values[0]} is no class number")
    return decode_label(values[0]) if isinstance(values[0], bytes) else class_number(values[0])
