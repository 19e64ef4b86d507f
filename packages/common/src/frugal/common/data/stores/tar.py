"""Plain webdataset tars: how they are indexed, and samples read from any place of them."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.samples import (
    RawSample,
    StringTable,
    assemble,
    assemble_captions,
    describe_members,
    printable,
)
from frugal.common.data.stores.grouping import (
    group_members,
    is_plain,
    reason_without_sample,
    refuse_size,
    split_name,
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

_CHUNK = 1 << 24
_MAGIC, _MAGIC_PLACE = b"ustar", 257


class StrictHeader(tarfile.TarInfo):
    """A tar header that tells the end of an archive from a place where no header is.

    ``tarfile`` (and with it webdataset) takes both a missing end and a garbled header for the
    end; here they raise ``tarfile.ReadError``.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See :meth:`tarfile.TarInfo.frombuf`."""
        try:
            header = super().frombuf(buf, encoding, errors)
            refuse_size(header)
            return header
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end-of-archive marker
            reason = "a header is unreadable" if buf else "the end-of-archive marker is missing"
            raise tarfile.ReadError(reason) from error


@dataclass(frozen=True)
class Break:
    """A place of a tar where no member is although bytes follow, or where the tar ends too soon."""

    reason: str
    """Of the first member missing, or of what lies behind the end."""
    stop: int
    """Where members go on; the size of the file where none do."""
    is_loss: bool
    """Whether members may have been lost."""
    cuts_sample: bool
    """Whether the sample in front of it may lack a member."""


def walk_tar(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo | Break]:
    """Every member of a tar, and every place from which on members are missing.

    Members are searched for behind an end-of-archive marker too (as by GNU tar's
    ``--ignore-zeros``), and behind what is no header.

    Raises:
        tarfile.ReadError: if the file does not begin like a tar.
    """
    start = 0
    while start < size:
        file.seek(start)
        fault, end, archive, is_empty = "", start, None, True
        try:
            archive = tarfile.TarFile(fileobj=file, mode="r", tarinfo=StrictHeader)
            for member in archive:
                is_empty = False
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                if member.size < 0:  # as extended headers may have it
                    fault = f"{printable(member.name)} has a size of {member.size} bytes"
                    break
                yield member
                if is_plain(member) and member.offset_data + member.size > size:
                    fault = f"the file ends in the middle of {printable(member.name)}"
                    break
            # a size that is wrong must not hide what lies behind its header
            end = member.offset_data if fault else archive.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            fault = str(error)
            if start == 0 and file.tell() <= tarfile.BLOCKSIZE:
                raise tarfile.ReadError(fault) from None
            end = start if archive is None else archive.offset
        found = _search_on(file, start, end, size, fault)
        if found is None:
            return
        # where not even the first header can be read (some versions of Python raise there, others
        # end), the tar in front of it had ended
        yield replace(found, cuts_sample=False) if is_empty else found
        start = found.stop


def _search_on(file: BinaryIO, start: int, end: int, size: int, fault: str) -> Break | None:
    """What follows the place where a tar that began at a byte ended; None if nothing does."""
    content = _first_other(file, end, size)
    if not fault and content >= size:
        return None
    block = end + (content - end) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    if fault or block == end:
        stop = _find_header(file, end + 1, size)
        return Break(f"{fault or 'a header is unreadable'} at byte {end}", stop, True, True)
    is_marked = block - end >= 2 * tarfile.BLOCKSIZE
    marker = f"the end-of-archive marker at byte {end}"
    # zeros of any other length were not written by what writes tars, but in place of members
    is_padded = block - end == 2 * tarfile.BLOCKSIZE or (block - start) % tarfile.RECORDSIZE == 0
    if is_marked and is_padded and _is_header(file, block):
        return Break(f"another tar begins behind {marker}", block, False, False)
    stop = _find_header(file, block, size)
    if is_marked and stop == size:
        return Break(f"{size - content:,} bytes behind {marker} are no members", stop, False, False)
    return Break(f"zeros are in place of a member at byte {end}", stop, True, not is_marked)


def _first_other(file: BinaryIO, start: int, size: int) -> int:
    """The first byte from a place on that is not zero; the size if there is none."""
    for place in range(start, size, _CHUNK):
        chunk = os.pread(file.fileno(), _CHUNK, place)
        if rest := chunk.lstrip(b"\0"):
            return place + len(chunk) - len(rest)
    return size


def _is_header(file: BinaryIO, place: int) -> bool:
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, place)
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _find_header(file: BinaryIO, start: int, size: int) -> int:
    """The first header from a place on, at any byte, as all but the oldest tars have it."""
    place, overlap = start, len(_MAGIC) - 1
    while place < size:
        chunk = os.pread(file.fileno(), _CHUNK, place + _MAGIC_PLACE)
        at = chunk.find(_MAGIC)
        while at >= 0:
            if _is_header(file, place + at):
                return place + at
            at = chunk.find(_MAGIC, at + 1)
        if len(chunk) <= overlap:
            break
        place += len(chunk) - overlap
    return size


def _checksum(descriptor: int, offset: int, length: int) -> int:
    checksum = 0
    for start in range(0, length, _CHUNK):
        chunk = os.pread(descriptor, min(_CHUNK, length - start), offset + start)
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def index_tar(shard: Path, known: ShardIndex | None = None) -> ShardIndex:
    """Read a tar from end to end and say where its samples are.

    Nobody can tell whether the sample in front of a place where a tar is cut or garbled is whole
    (it may lack a member): it is marked as truncated.

    Args:
        shard: the tar.
        known: what an earlier version found; checksums of members that it knows are believed.

    Raises:
        InputError: if the file cannot be read, is empty, compressed or no tar.
    """
    try:
        with io.BufferedReader(open_file(shard)) as file:
            refuse_empty(file, shard)
            found = _Found(file, known)
            try:
                for part in walk_tar(file, found.size):
                    found.add(part)
            except tarfile.ReadError:
                raise _no_tar(file, shard) from None
    except OSError as error:
        raise unreadable_shard(shard, error) from None
    if not found.num_parts and found.size > tarfile.RECORDSIZE:
        raise InputError(f"{shard} holds {found.size:,} zeros and nothing else; copy it again")
    return found.index()


def _no_tar(file: BinaryIO, shard: Path) -> InputError:
    foreign = foreign_content(file)
    if foreign is None:
        return InputError(f"{shard} is not a tar archive; copy it again")
    is_compressed = foreign.startswith("compressed")
    return InputError(f"{shard} is {'' if is_compressed else 'not a tar archive but '}{foreign}")


class _Found:
    """What was met while a tar was read."""

    def __init__(self, file: BinaryIO, known: ShardIndex | None) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.num_parts = 0
        self._file = file
        self._known = {} if known is None else known.checksums_by_place()
        self._names: list[str] = []
        self._places: list[tuple[int, int, int]] = []
        self._passed_over = PassedOver()
        self._lost: list[str] = []
        self._behind: list[str] = []
        self._starts: set[int] = set()
        self._cut: list[int] = []
        """Members behind which the tar may lack one of the same sample."""

    def add(self, part: tarfile.TarInfo | Break) -> None:
        """Take note of a member, or of a place without one."""
        self.num_parts += 1
        if isinstance(part, Break):
            self._break_off(part)
        elif not is_plain(part) or split_name(part.name) is None:
            if reason := reason_without_sample(part):
                self._passed_over.add(reason, printable(part.name))
        else:
            offset, length = part.offset_data, min(part.size, self.size - part.offset_data)
            checksum = self._known.get((offset, length))
            if checksum is None:
                checksum = _checksum(self._file.fileno(), offset, length)
            self._names.append(part.name)
            self._places.append((offset, length, checksum))

    def _break_off(self, part: Break) -> None:
        last = printable(self._names[-1]) if self._names else "its beginning"
        on = f"; members go on at byte {part.stop}" if part.stop < self.size else ""
        if not part.is_loss:
            self._behind.append(part.reason + on)
            self._starts.add(len(self._names))
            return
        self._lost.append(f"damaged or cut off behind {last} ({part.reason}{on})")
        if part.cuts_sample and self._names:
            self._cut.append(len(self._names) - 1)

    def index(self) -> ShardIndex:
        """Where the samples are."""
        grouping = group_members(self._names, self._starts)
        groups, sample_of = grouping.groups, np.zeros(len(self._names), np.int64)
        members: list[int] = []
        first_member = [0]
        damage = np.zeros(len(groups), np.uint8)
        for sample, group in enumerate(groups):
            sample_of[group.numbers] = sample
            members += group.numbers
            first_member.append(len(members))
            if group.is_doubled:
                damage[sample] = damage_code("duplicate")
        damage[sample_of[self._cut]] = damage_code("truncated")
        table = np.array(self._places, np.int64).reshape(-1, 3)[members]
        return ShardIndex(
            names=StringTable.of(self._names[member] for member in members),
            offsets=table[:, 0].copy(),
            lengths=table[:, 1].copy(),
            checksums=table[:, 2].astype(np.uint32),
            first_member=np.array(first_member, np.int64),
            key_lengths=np.array([len(group.key) for group in groups], np.int64),
            damage=damage,
            shard_bytes=self.size,
            note="; ".join(self._lost),
            behind="; ".join(self._behind),
            passed_over=self._passed_over,
            remarks=grouping.remarks,
        )


class TarReader(IndexedReader):
    """An opened tar of one process."""

    has_names = True

    def key(self, index: int) -> str:
        """``shard/key`` of a sample."""
        name = self.index.names[int(self.index.first_member[index])]
        return f"{self.path}/{name[: self.index.key_lengths[index]]}"

    def members(self, index: int) -> dict[str, int]:
        """The members of a sample: their numbers by extension.

        Raises:
            Damaged: if the sample was damaged when it was indexed.
        """
        first, end = map(int, self.index.first_member[index : index + 2])
        if kind := self.index.damage_of(index):
            names = describe_members(self.index.names[member] for member in range(first, end))
            raise Damaged(kind, f"its members are {names}")
        behind_key = int(self.index.key_lengths[index]) + 1
        return {
            self.index.names[member][behind_key:].lower(): member for member in range(first, end)
        }

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
