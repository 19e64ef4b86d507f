"""Plain webdataset tars: how they are indexed, and samples read from any place of them."""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from frugal.common.data.damage import Damaged
from frugal.common.data.index import ShardIndex, damage_code, load_index
from frugal.common.data.samples import (
    Fields,
    RawSample,
    StringTable,
    assemble,
    assemble_captions,
)
from frugal.common.errors import InputError

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_CHUNK = 1 << 24


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by webdataset's rule: at the first dot of the file's name.

    None for members that belong to no sample: webdataset's ``__meta__`` files, names without
    an extension, and hidden files (macOS leaves ``._name`` files behind in tars).
    """
    if _METADATA.match(name) or name.rpartition("/")[2].startswith("."):
        return None
    match = _KEY_AND_EXTENSION.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


class StrictHeader(tarfile.TarInfo):
    """A tar header that tells the end of an archive from a place where no header is.

    ``tarfile`` (and with it webdataset) takes both a missing end and a garbled header for the
    end; here they raise ``tarfile.ReadError``.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See :meth:`tarfile.TarInfo.frombuf`."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end-of-archive marker
            reason = "a header is unreadable" if buf else "the end-of-archive marker is missing"
            raise tarfile.ReadError(reason) from error


def _open_archive(file: BinaryIO, shard: Path) -> tarfile.TarFile:
    start = file.read(8)
    file.seek(0)
    if not start:
        raise InputError(f"{shard} is empty (0 bytes); copy it again, or leave it out")
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise InputError(
                f"{shard} is compressed ({name}), and a sample in the middle of it cannot be "
                "reached; unpack it to a plain tar"
            )
    try:
        return tarfile.open(fileobj=file, mode="r:", tarinfo=StrictHeader)
    except tarfile.TarError:
        raise InputError(f"{shard} is not a tar archive; copy it again") from None


def _checksum(descriptor: int, offset: int, length: int) -> int:
    checksum = 0
    for start in range(0, length, _CHUNK):
        chunk = os.pread(descriptor, min(_CHUNK, length - start), offset + start)
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def index_tar(shard: Path) -> ShardIndex:
    """Read a tar from end to end and say where its samples are.

    Nobody can tell whether the last sample of a tar that lacks its end is whole (it may lack a
    member): it is marked as truncated.

    Raises:
        InputError: if the file cannot be read, is empty, compressed or no tar.
    """
    try:
        with shard.open("rb") as file:
            return _index_open_tar(file, shard)
    except OSError as error:
        raise InputError(
            f"{shard} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None


def _index_open_tar(file: BinaryIO, shard: Path) -> ShardIndex:
    size = os.fstat(file.fileno()).st_size
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    first_member: list[int] = []
    duplicates: set[int] = set()
    current_key, extensions = None, set[str]()
    note = ""
    with _open_archive(file, shard) as archive:
        try:
            for member in archive:
                parts = split_name(member.name) if member.isreg() else None
                if parts is None:
                    continue
                key, extension = parts
                if key != current_key:
                    current_key, extensions = key, set()
                    first_member.append(len(names))
                if extension in extensions:
                    duplicates.add(len(first_member) - 1)
                extensions.add(extension)
                offset, length = member.offset_data, member.size
                names.append(member.name)
                places.append((offset, length, _checksum(file.fileno(), offset, length)))
        except tarfile.TarError as error:
            behind = f"behind {names[-1]}" if names else "from its beginning on"
            note = f"damaged or cut off {behind} ({error})"
    damage = np.zeros(len(first_member), np.uint8)
    damage[list(duplicates)] = damage_code("duplicate")
    if note:
        damage[-1:] = damage_code("truncated")
    table = np.array(places, np.int64).reshape(-1, 3)
    return ShardIndex(
        names=StringTable.of(names),
        offsets=table[:, 0].copy(),
        lengths=table[:, 1].copy(),
        checksums=table[:, 2].astype(np.uint32),
        first_member=np.array([*first_member, len(names)], np.int64),
        damage=damage,
        shard_bytes=size,
        note=note,
    )


class TarReader:
    """An opened tar of one process."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self.path = path
        self.fields = fields
        self.index = load_index(path)
        self._file = path.open("rb", buffering=0)

    def close(self) -> None:
        """Give back the file."""
        self._file.close()

    def key(self, index: int) -> str:
        """``shard/key`` of a sample."""
        parts = split_name(self.index.names[int(self.index.first_member[index])])
        assert parts is not None
        return f"{self.path}/{parts[0]}"

    def members(self, index: int) -> dict[str, int]:
        """The members of a sample: their numbers by extension.

        Raises:
            Damaged: if the sample was damaged when it was indexed.
        """
        if kind := self.index.damage_of(index):
            raise Damaged(kind)
        first, end = self.index.first_member[index : index + 2]
        extensions = {}
        for member in range(int(first), int(end)):
            parts = split_name(self.index.names[member])
            assert parts is not None
            extensions[parts[1]] = member
        return extensions

    def content(self, member: int) -> bytes:
        """The bytes of a member by its number; raises ``Damaged`` if they have changed."""
        return self.index.read(self._file.fileno(), member)

    def captions(self, index: int) -> list[str]:
        """The captions of a sample, without reading its image; raises ``Damaged``."""
        members = self.members(index)
        return assemble_captions(self.fields, members, lambda name: self.content(members[name]))

    def read(self, index: int) -> RawSample:
        """A sample.

        Raises:
            Damaged: if it was damaged when it was indexed, has changed since, or has no image.
        """
        members = self.members(index)
        return assemble(self.fields, members, lambda name: self.content(members[name]))


@dataclass(frozen=True)
class TarShard:
    """An indexed tar."""

    path: Path
    num_samples: int

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self, fields: Fields) -> TarReader:
        """A reader for this process."""
        return TarReader(self.path, fields)
