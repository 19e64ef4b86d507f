"""The side-car index of a shard: where every member lies, and the checksum of its bytes.

The index of ``00000.tar`` is ``00000.tar.index.safetensors`` beside it, or a file of the user's
cache folder where the shard's folder must not be written. With it a sample can be read without
reading what lies before it, and a shard that was cut or altered since is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from frugal.common.data.damage import Damaged, Kind, PassedOver
from frugal.common.data.samples import Fields, Reader, StringTable
from frugal.common.errors import InputError
from frugal.common.files import LARGEST_FILE, parse_json, reason_of, refuse_exhaustion, too_large

SUFFIX = ".index.safetensors"
_VERSION = "2"
"""2: members of a sample that lie apart are joined, and what is left out is counted."""
_EARLIER = ("1",)
_REPLACED = (
    "its bytes are not those that were indexed; copy the shard again, or, if it was replaced, run "
    "`python -m frugal.common.shards index --rebuild` on it"
)
_KINDS: tuple[Kind | None, ...] = (None, "truncated", "checksum", "duplicate")


@dataclass(frozen=True)
class ShardSummary:
    """What can be known of a shard without loading its index."""

    num_samples: int
    note: str
    """What is wrong with the shard as a whole; empty if nothing is."""
    behind: str = ""
    """What lies behind the end-of-archive marker, where nothing should; empty if nothing does."""
    digest: str = ""
    """Of the names, checksums and order of all members: alike wherever the shard is copied."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    """Members that belong to no sample."""
    remarks: PassedOver = field(default_factory=PassedOver)
    """What was done to samples that are not laid out as usual, by kind."""
    stamp: str = ""
    """Of the shard as it lies on the disk: another after every writing, whatever its times say."""

    def lines(self, shard: Path) -> list[str]:
        """What is wrong with the shard as a whole, and what lies behind its end."""
        lines = [f"{shard} is {self.note}"] if self.note else []
        return [*lines, f"{shard}: {self.behind}"] if self.behind else lines


@dataclass(frozen=True)
class ShardIndex:
    """Where the M members of the S samples of a shard lie."""

    names: StringTable
    """M names, or none where members have no names (TFRecords)."""
    offsets: np.ndarray
    """(M,) int64: first byte."""
    lengths: np.ndarray
    """(M,) int64: bytes."""
    checksums: np.ndarray
    """(M,) uint32: CRC-32 of the bytes."""
    first_member: np.ndarray
    """(S + 1,) int64: members ``first_member[i]`` to ``first_member[i + 1]`` are sample i."""
    damage: np.ndarray
    """(S,) uint8: what was wrong with a sample when it was indexed; 0 if nothing was."""
    shard_bytes: int
    key_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(S,) int64: letters of the key in the names of a sample's members; none in TFRecords."""
    note: str = ""
    behind: str = ""
    passed_over: PassedOver = field(default_factory=PassedOver)
    remarks: PassedOver = field(default_factory=PassedOver)

    @property
    def num_samples(self) -> int:
        """Samples, damaged ones included."""
        return len(self.damage)

    def damage_of(self, sample: int) -> Kind | None:
        """What was wrong with a sample when it was indexed."""
        return _KINDS[self.damage[sample]]

    def read(self, descriptor: int, member: int) -> bytes:
        """The bytes of a member, checked.

        Raises:
            Damaged: if they cannot be read or are not those that were indexed.
        """
        length = int(self.lengths[member])
        if length > LARGEST_FILE:
            raise Damaged("unreadable", too_large(length))
        try:
            content = os.pread(descriptor, length, int(self.offsets[member]))
        except OSError as error:
            refuse_exhaustion(error)
            raise Damaged("unreadable", reason_of(error)) from None
        if len(content) < length:
            raise Damaged("truncated", f"{len(content)} of {length} bytes")
        if zlib.crc32(content) != self.checksums[member]:
            raise Damaged("checksum", _REPLACED)
        return content

    def checksums_by_place(self) -> dict[tuple[int, int], int]:
        """The checksum of every member by its first byte and its length."""
        places = zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)
        return dict(zip(places, self.checksums.tolist(), strict=True))

    def digest(self) -> str:
        """See :attr:`ShardSummary.digest`."""
        found = hashlib.blake2b(digest_size=8)
        for part in (self.names.blob, self.names.ends, self.checksums, self.first_member):
            found.update(part.tobytes())
        return found.hexdigest()


def damage_code(kind: Kind) -> int:
    """How an index writes a kind of damage."""
    return _KINDS.index(kind)


def cache_folder() -> Path:
    """Where indexes go whose shards lie in a folder that must not be written."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "frugal" / "index"


def _places(shard: Path) -> tuple[Path, Path]:
    absolute = shard.absolute()
    folder = hashlib.blake2b(os.fsencode(absolute.parent), digest_size=8).hexdigest()
    return absolute.with_name(shard.name + SUFFIX), cache_folder() / folder / (shard.name + SUFFIX)


def find_index(shard: Path) -> Path | None:
    """The index of a shard, if it has one that is not of an earlier version."""
    earlier = [place for place in _places(shard) if place.is_file()]
    return next((place for place in earlier if _version(place) not in _EARLIER), None)


def find_earlier_index(shard: Path) -> Path | None:
    """The index of a shard that an earlier version of this software wrote, if there is one."""
    places = [place for place in _places(shard) if place.is_file()]
    return next((place for place in places if _version(place) in _EARLIER), None)


def _version(place: Path) -> str | None:
    """What wrote an index; None where it cannot be read, which is told by who needs it."""
    try:
        return _metadata(place).get("version")
    except (SafetensorError, OSError):
        return None


def _metadata(place: Path) -> dict[str, str]:
    with safe_open(place, framework="numpy") as file:
        return file.metadata() or {}


def _may_write(folder: Path) -> bool:
    # A folder whose mode lets nobody write stays untouched, though root could.
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def write_index(shard: Path, index: ShardIndex) -> Path:
    """Write an index beside its shard or into the cache folder; never half of one.

    Raises:
        InputError: if neither can be written.
    """
    encoded = save(
        {
            "names": index.names.blob,
            "name_ends": index.names.ends,
            "offsets": index.offsets,
            "lengths": index.lengths,
            "checksums": index.checksums,
            "first_member": index.first_member,
            "key_lengths": index.key_lengths,
            "damage": index.damage,
        },
        metadata={
            "version": _VERSION,
            "samples": str(index.num_samples),
            "shard_bytes": str(index.shard_bytes),
            "note": index.note,
            "behind": index.behind,
            "digest": index.digest(),
            "passed_over": json.dumps(vars(index.passed_over)),
            "remarks": json.dumps(vars(index.remarks)),
        },
    )
    beside, cached = _places(shard)
    problem = "its folder must not be written"
    for place in (beside, cached) if _may_write(beside.parent) else (cached,):
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(encoded)
            aside.replace(place)
        except OSError as error:
            problem = reason_of(error)
            continue
        return place
    raise InputError(
        f"the index of {shard} cannot be written: {problem}; make the folder or {cache_folder()} "
        "writable, or set XDG_CACHE_HOME"
    )


def _open(shard: Path) -> tuple[Path, dict[str, str]]:
    """The index file of a shard and its metadata, checked against the shard's size."""
    rebuild = _rebuild(shard)
    problem = f"{shard} has no index"
    for place in _places(shard):
        if not place.is_file():
            continue
        try:
            metadata = _metadata(place)
        except (SafetensorError, OSError) as error:
            raise _unreadable(place, error, rebuild) from None
        if metadata.get("version") == _VERSION:
            break
        problem = f"the index {place} was written by another version"
    else:
        raise InputError(f"{problem}; {rebuild}")
    size = shard.stat().st_size
    try:
        indexed = _count(metadata["shard_bytes"])
    except (KeyError, ValueError) as error:
        raise _unreadable(place, error, rebuild) from None
    if size != indexed:
        raise InputError(
            f"{shard} has {size} bytes but had {indexed} when it was indexed: it "
            f"was cut or replaced; restore it, or, if it is meant to be so, {rebuild}"
        )
    return place, metadata


def read_summary(shard: Path) -> ShardSummary:
    """What the index of a shard says without being loaded.

    Raises:
        InputError: if there is no index, or it does not belong to the shard as it is now.
    """
    place, metadata = _open(shard)
    try:
        return ShardSummary(
            _count(metadata["samples"]),
            metadata["note"],
            metadata["behind"],
            metadata["digest"],
            _of_shard(shard, metadata["passed_over"]),
            _of_shard(shard, metadata["remarks"]),
            _stamp(shard),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(place, error, _rebuild(shard)) from None


def _count(digits: str) -> int:
    """A number of an index's metadata; raises ``ValueError`` for what is none."""
    if not (digits.isdecimal() and len(digits) < 19):
        raise ValueError(f"{digits[:20]!r} is no number")
    return int(digits)


def _stamp(shard: Path) -> str:
    # the time of the last change of the inode (ctime) is nobody's to set
    status = shard.stat()
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def _of_shard(shard: Path, encoded: str) -> PassedOver:
    found = PassedOver(**parse_json(encoded))
    for reason, names in found.examples.items():
        int(found.counts[reason])
        found.examples[reason] = [f"{shard}/{name}" for name in names]
    return found


def load_index(shard: Path) -> ShardIndex:
    """The index of a shard.

    Raises:
        InputError: if there is none, or it does not belong to the shard as it is now.
    """
    place, metadata = _open(shard)
    try:
        return _load(place, metadata)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(place, error, _rebuild(shard)) from None


def _rebuild(shard: Path) -> str:
    return f"rebuild it with `python -m frugal.common.shards index --rebuild {shard}`"


def _unreadable(place: Path, error: Exception, rebuild: str) -> InputError:
    """The sentence for an index that is there and cannot be read, to be raised."""
    try:
        place.open("rb").close()  # safetensors says "no such file" for whatever goes wrong
    except OSError as found:
        error = found
    refuse_exhaustion(error)
    return InputError(f"the index {place} cannot be read ({reason_of(error)}); {rebuild}")


def count_altered(shard: Path) -> int:
    """Samples whose bytes are not those that were indexed; all of the shard is read.

    Raises:
        InputError: if there is no index, or it does not belong to the shard as it is now.
    """
    index = load_index(shard)
    altered = set()
    with shard.open("rb", buffering=0) as file:
        for sample in np.flatnonzero(index.damage == 0).tolist():
            for member in range(index.first_member[sample], index.first_member[sample + 1]):
                try:
                    index.read(file.fileno(), member)
                except Damaged:
                    altered.add(sample)
    return len(altered)


def load_earlier_index(shard: Path) -> ShardIndex | None:
    """What an earlier version found in a shard; None if it is not of the shard as it is now."""
    place = find_earlier_index(shard)
    if place is None:
        return None
    try:
        index = _load(place, _metadata(place))
        return index if index.shard_bytes == shard.stat().st_size else None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        return None


def _load(place: Path, metadata: dict[str, str]) -> ShardIndex:
    with safe_open(place, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    index = ShardIndex(
        names=StringTable(tensors.pop("names"), tensors.pop("name_ends")),
        **tensors,
        shard_bytes=_count(metadata["shard_bytes"]),
        note=metadata["note"],
    )
    _refuse_lies(index)
    return index


def _refuse_lies(index: ShardIndex) -> None:
    """Refuse an index whose numbers lead out of the shard or out of its own tables.

    Raises:
        ValueError: with what is wrong.
    """
    members, samples = len(index.offsets), len(index.damage)
    table = ((index.offsets, "int64"), (index.lengths, "int64"), (index.checksums, "uint32"))
    is_whole = all(part.dtype == kind and part.shape == (members,) for part, kind in table)
    is_whole &= index.damage.dtype == np.uint8 and index.damage.shape == (samples,)
    is_whole &= index.first_member.dtype == np.int64 and index.first_member.shape == (samples + 1,)
    is_whole &= index.key_lengths.dtype == np.int64
    is_whole &= index.key_lengths.shape in ((0,), (samples,))
    names = index.names
    is_whole &= names.blob.dtype == np.uint8 and names.blob.ndim == 1
    is_whole &= names.ends.dtype == np.int64 and names.ends.shape in ((0,), (members,))
    if not is_whole:
        raise ValueError("its tables do not belong together")
    inside = (index.offsets >= 0) & (index.lengths >= 0)
    inside &= index.lengths <= index.shard_bytes - index.offsets
    first, ends = index.first_member, names.ends
    is_sound = bool(inside.all()) and first[0] == 0 and first[-1] == members
    is_sound &= bool((np.diff(first) > 0).all()) and bool((index.damage < len(_KINDS)).all())
    if len(ends):
        is_sound &= bool((np.diff(ends, prepend=0) >= 0).all()) and ends[-1] == len(names.blob)
    if not is_sound:
        raise ValueError("its numbers lead out of the shard")


class IndexedReader:
    """An opened shard of one process, whose samples are found by its index."""

    has_names = False
    """Whether members have names, and samples keys in them."""

    def __init__(self, path: Path, fields: Fields) -> None:
        """Open a shard.

        Raises:
            InputError: if it has no index, or is not the shard that was indexed.
            OSError: if it cannot be opened.
        """
        self.path = path
        self.fields = fields
        self.index = index = load_index(path)
        are_named = (len(index.names), len(index.key_lengths)) == (
            len(index.offsets),
            index.num_samples,
        )
        if self.has_names and not are_named:
            raise InputError(f"the index of {path} names no members; {_rebuild(path)}")
        self._file = path.open("rb", buffering=0)

    def close(self) -> None:
        """Give back the file."""
        self._file.close()

    def content(self, member: int) -> bytes:
        """The bytes of a member by its number; raises ``Damaged`` if they have changed."""
        return self.index.read(self._file.fileno(), member)


@dataclass(frozen=True)
class IndexedShard:
    """A shard that has an index; a small value that can be pickled."""

    path: Path
    num_samples: int
    """Samples, damaged ones included."""
    reader: Callable[[Path, Fields], Reader]
    """The reader of shards of this kind, a class that can be pickled by its name."""

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self, fields: Fields) -> Reader:
        """A reader for this process."""
        return self.reader(self.path, fields)


_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_GIT_LFS = b"version https://git-lfs"
_LOOKED_AT = 512


def foreign_content(file: BinaryIO) -> str | None:
    """What lies in the place of a shard and what to do, to follow "it is "; None if unknown."""
    start = os.pread(file.fileno(), _LOOKED_AT, 0)
    name = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    if name is not None:
        return f"compressed ({name}), and a sample in the middle of it cannot be reached; unpack it"
    if start.startswith(_GIT_LFS):
        return "a pointer of git-lfs; fetch the file itself with `git lfs pull`"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        words = " ".join(start.decode("utf-8", "replace").split())[:60]
        return f"a page that a server sent in its place ({words} ...); copy it again"
    return None


def refuse_empty(file: BinaryIO, shard: Path) -> None:
    """Refuse a file of no bytes with :class:`InputError`."""
    if not os.fstat(file.fileno()).st_size:
        raise InputError(f"{shard} is empty (0 bytes); copy it again, or leave it out")


def unreadable_shard(shard: Path, error: OSError) -> InputError:
    """The sentence for a shard that the system does not let be read, to be raised."""
    refuse_exhaustion(error)
    return InputError(
        f"{shard} cannot be read ({reason_of(error)}); check the path and its permissions"
    )
