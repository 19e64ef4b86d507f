"""Files that are no shards although their names say so: recognized by how they begin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from frugal.common.errors import InputError
from frugal.common.files import reason_of, refuse_exhaustion

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
