"""Proof of what a checkpoint is: the SHA-256 of every file, and of what its run is made of.

``manifest.json`` of a checkpoint holds, beside its format,
    ``files``  bytes and SHA-256 of every other file, ``state.json`` included;
    ``manifest``  SHA-256 of all the rest of it as JSON;
    ``recipe``  SHA-256 of the recipe as JSON;
    ``code``  the version of the package, and a SHA-256 over the sources of every installed method;
    ``tokenizer``  SHA-256 of its files;
    ``data``  what :func:`~frugal.common.data.contents.note_contents` notes: every shard with its
    samples and the digest of its index, and what else decides about samples.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError
from frugal.common.files import read_json_object, write_file

FILE = "manifest.json"
_AT_ONCE = 1 << 22


@dataclass
class Digests:
    """What tells the bytes of one file from others, taken while they pass."""

    def __post_init__(self) -> None:
        self.bytes = 0
        self.crc32 = 0
        self._sha256 = hashlib.sha256()

    def update(self, block: bytes | memoryview) -> None:
        """Go on with the next bytes."""
        self.bytes += len(block)
        self.crc32 = zlib.crc32(block, self.crc32)
        self._sha256.update(block)

    def to_json(self) -> dict[str, Any]:
        """``bytes``, ``crc32`` and ``sha256``."""
        return {"bytes": self.bytes, "crc32": self.crc32, "sha256": self._sha256.hexdigest()}


def digest_file(path: Path) -> dict[str, Any]:
    """``bytes``, ``crc32`` and ``sha256`` of a file, read once."""
    found = Digests()
    with path.open("rb") as file:
        while block := file.read(_AT_ONCE):
            found.update(block)
    return found.to_json()


def file_checksum(path: Path) -> int:
    """crc32 of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_AT_ONCE):
            checksum = zlib.crc32(block, checksum)
    return checksum


def digest_json(value: Any) -> str:
    """SHA-256 of JSON content, whatever the order of its keys."""
    encoded = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(encoded).hexdigest()


def write_manifest(folder: Path, sha256: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose other files are complete.

    Args:
        folder: of the checkpoint.
        sha256: of its files, by their names.
        about: what else the manifest tells.

    Raises:
        InputError: if it cannot be written.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in sha256.items()
    }
    content = {"files": files, **about}
    content["manifest"] = digest_json(content)
    write_file(folder / FILE, json.dumps(content, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint that was verified says; {} where it has none."""
    path = folder / FILE
    return read_json_object(path) if path.exists() else {}


def data_of(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a checkpoint says of a run's data; None where it says nothing."""
    try:
        told = read_manifest(folder).get("data")
    except InputError:  # told by who opens the checkpoint
        return None
    return told if isinstance(told, dict) else None


class DamagedError(InputError):
    """A checkpoint is not as it was written."""

    def __init__(self, what: str) -> None:
        """``what`` is the first half of the sentence, without what to do."""
        super().__init__(f"{what}; use an older checkpoint")
        self.what = what


def check_manifest(folder: Path, *, files: Iterable[str] = ()) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        folder: of the checkpoint.
        files: that the manifest must tell of.

    Raises:
        DamagedError: naming the file that is missing, truncated or altered.
    """
    expected = _expected(folder / FILE)
    if expected is None:
        what = "was altered" if (folder / FILE).exists() else "is missing"
        raise DamagedError(f"{folder / FILE} {what}: the checkpoint is damaged")
    for name, (size, sha256) in expected.items():
        check_size(folder / name, size)
        if digest_file(folder / name)["sha256"] != sha256:
            raise DamagedError(f"{folder / name} {ALTERED}")
    if untold := sorted(set(files) - expected.keys()):
        raise DamagedError(f"{folder / FILE} was altered: it tells nothing of {untold[0]}")


ALTERED = "was altered after it was written (its checksum differs)"


def check_size(path: Path, size: int) -> None:
    """Refuse a file of a checkpoint that has another size than it was written with.

    Raises:
        DamagedError: naming it.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        words = "is missing" if found is None else f"has {found} bytes"
        raise DamagedError(f"{path} {words} where {size} were written: the checkpoint is damaged")


def _expected(path: Path) -> dict[str, tuple[int, str]] | None:
    """Bytes and SHA-256 of files by their names; None where a manifest is not as it was written."""
    try:
        content: dict[str, Any] = read_json_object(path)
        is_whole = content.pop("manifest", None) == digest_json(content)
        files = content["files"].items()
        found = {name: (entry["bytes"], entry["sha256"]) for name, entry in files}
    except (InputError, KeyError, TypeError, AttributeError):
        return None
    return found if is_whole and all(Path(name).name == name for name in found) else None
