"""The samples of a tar that comes as a stream: whole ones, and what is known of the others."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, Self

from frugal.common.data.damage import Damaged, Kind, PassedOver
from frugal.common.data.samples import describe_members, printable
from frugal.common.data.stores.grouping import (
    LARGEST_MEMBER,
    Group,
    count_doubled,
    reason_without_sample,
    refuse_size,
    split_group,
    split_name,
)
from frugal.common.data.stores.url import Patience, UrlStream
from frugal.common.files import LARGEST_FILE, reason_of, refuse_exhaustion, too_large

_APART = (
    "members of one key lie apart in the tar, which a stream cannot join; write them one after "
    "the other (`tar --sort=name`), or copy the tar to a disk and read it from there"
)


Streamed = tuple[str, dict[str, bytes] | Damaged]
"""``shard/key`` and the members of a sample by extension, or what is wrong with it."""
_BUFFER = 1 << 16
"""Bytes that are read at a time."""
_PACKED = 1 << 10
"""The same where they are compressed: whatever they become is in memory, and copied per header."""
_MOST_ZEROS = 1 << 16
"""Blocks of zeros, one after the other, that are read; a few KB of gzip are billions of them."""


class _Header(tarfile.TarInfo):
    """A tar header that tells its archive of what is none."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See :meth:`tarfile.TarInfo.frombuf`."""
        header = super().frombuf(buf, encoding, errors)
        refuse_size(header)
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """See :meth:`tarfile.TarInfo.fromtarfile`."""
        assert isinstance(archive, _Archive)
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.num_zeros += 1
            if archive.num_zeros > _MOST_ZEROS:
                raise tarfile.ReadError(
                    f"{_MOST_ZEROS * tarfile.BLOCKSIZE:,} zeros are in place of members"
                ) from None
            raise
        except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
            archive.num_garbled += 1
            raise
        except tarfile.TruncatedHeaderError:  # type: ignore[attr-defined]
            archive.is_cut = True
            raise


class _Archive(tarfile.TarFile):
    """A streamed tar that goes on behind its end and behind what is no header, and counts both."""

    tarinfo = _Header
    num_zeros = 0
    """Blocks of zeros since the last member."""
    num_garbled = 0
    """Blocks since the last member that are neither zeros nor a header."""
    is_cut = False
    """Whether the stream ended in the middle of a block."""


class StreamedTar:
    """The samples of a tar in the order of the stream.

    Neighbors of one key are a sample, as in webdataset. What lies behind an end-of-archive marker
    is read too.
    """

    def __init__(self, stream: Any, passed_over: PassedOver | None = None) -> None:
        """Read a stream.

        Args:
            stream: opened, perhaps compressed.
            passed_over: counts the members that belong to no sample.
        """
        self._stream = stream
        self._passed_over = PassedOver() if passed_over is None else passed_over
        self._seen: dict[str, frozenset[str]] = {}
        """The extensions that were met by key."""
        self._names: list[str] = []
        self._contents: list[bytes] = []
        self._size = 0
        """Bytes of the pending sample."""
        self.pending = ""
        """The key of the sample whose members came last, which may go on."""

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes] | Damaged]]:
        """Keys and members by extension, or what is wrong.

        Raises:
            OSError, tarfile.TarError, EOFError, zlib.error: if the stream goes on unreadably or
                ends too soon; ``pending`` is then the sample that may lack a member.
        """
        opened = _Archive.open(fileobj=self._stream, mode="r|*", ignore_zeros=True, bufsize=_PACKED)
        with opened as archive:
            assert isinstance(archive, _Archive)
            if archive.fileobj.comptype == "tar":  # type: ignore[union-attr, attr-defined]
                archive.fileobj.bufsize = _BUFFER  # type: ignore[union-attr, attr-defined]
            for member in archive:
                if not 0 <= member.size <= LARGEST_MEMBER:
                    raise tarfile.ReadError(f"a member has a size of {member.size} bytes")
                yield from self._before(archive)
                parts = split_name(member.name) if member.isreg() else None
                if parts is None:
                    if reason := reason_without_sample(member):
                        self._passed_over.add(reason, printable(member.name))
                else:
                    if parts[0] != self.pending:
                        yield from self._finish()
                    file = archive.extractfile(member)
                    assert file is not None
                    self.pending = parts[0]
                    self._size += member.size
                    self._names.append(member.name)
                    self._contents.append(b"" if self._size > LARGEST_FILE else file.read())
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            yield from self._end(archive)

    def _before(self, archive: _Archive) -> Iterator[tuple[str, dict[str, bytes] | Damaged]]:
        """What ends where something else than a member was met in front of the next one."""
        zeros, garbled = archive.num_zeros, archive.num_garbled
        archive.num_zeros = archive.num_garbled = 0
        if garbled:
            reason = f"{garbled} blocks of the tar in front of the next member are no member"
            if zeros > 1:
                yield from self._finish()
            yield self.pending, Damaged("truncated", reason)
            self._forget()
        elif zeros:
            yield from self._finish()

    def _end(self, archive: _Archive) -> Iterator[tuple[str, dict[str, bytes] | Damaged]]:
        others = archive.num_garbled + archive.is_cut
        if archive.num_zeros < (2 if others else 1):
            raise tarfile.ReadError(
                "a header is unreadable" if others else "the end-of-archive marker is missing"
            )
        yield from self._finish()
        if others:
            reason = f"{others} blocks behind the end-of-archive marker are no members"
            yield "", Damaged("truncated", reason)

    def _forget(self) -> None:
        self.pending = ""
        self._names, self._contents, self._size = [], [], 0

    def _finish(self) -> Iterator[tuple[str, dict[str, bytes] | Damaged]]:
        """The samples among the members that lie together."""
        key, names, contents, size = self.pending, self._names, self._contents, self._size
        self._forget()
        if not names:
            return
        if size > LARGEST_FILE:
            yield key, Damaged("unreadable", too_large(size))
            return
        extensions = [name[len(key) + 1 :].lower() for name in names]
        group = Group(key, {extension: number for number, extension in enumerate(extensions)})
        if len(group.members) < len(names):
            for _ in range(count_doubled(names)):
                yield key, Damaged("duplicate", f"its members are {describe_members(names)}")
            return
        before = self._seen.get(key, frozenset())
        self._seen[key] = before | group.members.keys()
        if before and not before & group.members.keys():
            yield key, Damaged("apart", f"{_APART}; here are {describe_members(names)}")
            return
        for part in split_group(group, names, lambda middle: None) or [group]:
            yield part.key, {name: contents[number] for name, number in part.members.items()}


class ShardSizes:
    """Samples of the shards that one reader has read whole: what one lost of others."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def learn(self, url: str, samples: int) -> None:
        """A shard was read whole."""
        self._sizes[url] = samples

    def lost(self, url: str, read: int) -> tuple[int, str]:
        """(samples lost, in words) of a shard that ends with its ``read``-th, which is damaged.

        By what it held when it was read whole; otherwise by what the others hold on average.
        """
        done = f"sample {read} is damaged" if read > 1 else "no sample was read"
        if url in self._sizes:
            whole = self._sizes[url]
            return max(whole - read, 0), f"{done}, it held {whole}"
        if self._sizes:
            mean = round(sum(self._sizes.values()) / len(self._sizes))
            return max(mean - read, 0), f"{done}, others hold {mean} on average"
        return 0, f"{done}, and nobody knows how many it holds"


def stream_tar(
    url: str,
    *,
    patience: Patience | None = None,
    sizes: ShardSizes | None = None,
    passed_over: PassedOver | None = None,
) -> Iterator[Streamed]:
    """The samples of a tar in the order of the file; at least one, if only a damaged one.

    A shard that cannot be opened or goes on unreadably counts as one damaged sample with the
    number of those that were lost with it, and so does the last sample of a shard that ends
    without an end-of-archive marker. So does a whole archive whose command failed.

    Args:
        url: a path, ``pipe:`` with a command, or a URL.
        patience: limits the waiting; ten minutes by default.
        sizes: of other shards, and of this one when it was read before.
        passed_over: counts the members that belong to no sample.

    Raises:
        InputError: if nothing comes at all.
    """
    sizes = sizes or ShardSizes()
    try:
        stream = UrlStream(url, patience or Patience(600.0))
    except (OSError, ValueError) as error:
        refuse_exhaustion(error)
        lost, _ = sizes.lost(url, 1)
        yield url, Damaged("unreadable", reason_of(error), lost=lost)
        return
    try:
        yield from _samples(url, stream, sizes, passed_over)
    finally:
        stream.close()


def _samples(
    url: str, stream: UrlStream, sizes: ShardSizes, passed_over: PassedOver | None
) -> Iterator[Streamed]:
    archive = StreamedTar(stream, passed_over)
    has_any, read = False, 0
    try:
        for key, sample in archive:
            has_any, read = True, read + bool(key)
            yield f"{url}/{key}" if key else url, sample
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        cut = has_any or archive.pending
        where = f"{url}/{archive.pending}" if archive.pending else url
        reason = stream.failure() or reason_of(error)
        lost, words = sizes.lost(url, read + 1)
        kind: Kind = "truncated" if cut else "unreadable"
        yield where, Damaged(kind, f"{reason}; {words}", lost=lost)
        return
    reason = stream.failure()
    if not has_any:
        lost, words = sizes.lost(url, 1)
        yield url, Damaged("unreadable", f"{reason or 'it holds no sample'}; {words}", lost=lost)
        return
    sizes.learn(url, read)
    if reason:
        yield url, Damaged("truncated", reason)
