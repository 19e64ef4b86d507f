"""The side-car index of a shard: where every member lies, and the checksum of its bytes.

The index of ``00000.tar`` is ``00000.tar.index.safetensors`` beside it, or a file of the user's
cache folder where the shard's folder must not be written. With it a sample can be read without
reading what lies before it, and a shard that was cut or altered since is noticed.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from frugal.common.data.damage import Damaged, Kind
from frugal.common.data.samples import StringTable
from frugal.common.errors import InputError
from frugal.common.files import reason_of, refuse_exhaustion

SUFFIX = ".index.safetensors"
_VERSION = "1"
_KINDS: tuple[Kind | None, ...] = (None, "truncated", "checksum", "duplicate")


@dataclass(frozen=True)
class ShardSummary:
    """What can be known of a shard without loading its index."""

    num_samples: int
    note: str
    """What is wrong with the shard as a whole; empty if nothing is."""


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
    note: str = ""

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
        try:
            content = os.pread(descriptor, length, int(self.offsets[member]))
        except OSError as error:
            refuse_exhaustion(error)
            raise Damaged("unreadable", reason_of(error)) from None
        if len(content) < length:
            raise Damaged("truncated", f"{len(content)} of {length} bytes")
        if zlib.crc32(content) != self.checksums[member]:
            raise Damaged("checksum")
        return content


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
    """The index of a shard, if it has one."""
    return next((place for place in _places(shard) if place.is_file()), None)


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
            "damage": index.damage,
        },
        metadata={
            "version": _VERSION,
            "samples": str(index.num_samples),
            "shard_bytes": str(index.shard_bytes),
            "note": index.note,
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
            problem = str(error)
            continue
        return place
    raise InputError(
        f"the index of {shard} cannot be written: {problem}; make the folder or {cache_folder()} "
        "writable, or set XDG_CACHE_HOME"
    )


def _open(shard: Path) -> tuple[Path, dict[str, str]]:
    """The index file of a shard and its metadata, checked against the shard's size."""
    place = find_index(shard)
    rebuild = f"rebuild it with `python -m frugal.common.shards index --rebuild {shard}`"
    if place is None:
        raise InputError(f"{shard} has no index; {rebuild}")
    try:
        with safe_open(place, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        _refuse_exhaustion_at(place)
        raise InputError(f"the index {place} cannot be read ({error}); {rebuild}") from None
    if metadata.get("version") != _VERSION:
        raise InputError(f"the index {place} was written by another version; {rebuild}")
    size = shard.stat().st_size
    if size != int(metadata["shard_bytes"]):
        raise InputError(
            f"{shard} has {size} bytes but had {metadata['shard_bytes']} when it was indexed: it "
            f"was cut or replaced; restore it, or, if it is meant to be so, {rebuild}"
        )
    return place, metadata


def _refuse_exhaustion_at(place: Path) -> None:
    """Stop where too many files are open, which safetensors may call a missing file."""
    try:
        place.open("rb").close()
    except OSError as error:
        refuse_exhaustion(error)


def read_summary(shard: Path) -> ShardSummary:
    """What the index of a shard says without being loaded.

    Raises:
        InputError: if there is no index, or it does not belong to the shard as it is now.
    """
    _, metadata = _open(shard)
    return ShardSummary(int(metadata["samples"]), metadata["note"])


def load_index(shard: Path) -> ShardIndex:
    """The index of a shard.

    Raises:
        InputError: if there is none, or it does not belong to the shard as it is now.
    """
    place, metadata = _open(shard)
    with safe_open(place, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = StringTable(tensors.pop("names"), tensors.pop("name_ends"))
    return ShardIndex(
        names=names,
        **tensors,
        shard_bytes=int(metadata["shard_bytes"]),
        note=metadata["note"],
    )
