"""The files of a published archive, read in place: a folder, or a zip that is never unpacked.

Paths are relative to the archive and joined by slashes.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import posixpath
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np

from frugal.common.errors import InputError
from frugal.common.files import open_file

BLOCK = 1 << 20
"""Bytes that are read or unpacked at a time."""
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)
"""What reading a truncated or altered file raises."""
MALFORMED = (*UNREADABLE, KeyError, TypeError)
"""What making sense of a foreign one raises besides."""


def reason(error: Exception) -> str:
    """A few words for one of these errors, to follow the name of the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON ({error})"
    if isinstance(error, UnicodeDecodeError):
        return "holds no text where there should be some"
    if isinstance(error, (KeyError, TypeError)):
        return f"is incomplete ({error})"
    if isinstance(error, (zlib.error, zipfile.BadZipFile)):
        return f"cannot be decompressed ({error})"
    return str(error) or "ends early"


def library(name: str) -> Any:
    """A module that comes with the extra ``t5x`` of this package.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"t5x archives are read with {name}, which cannot be imported ({error}); run "
            "`pip install frugal-flip[t5x]`"
        ) from None


def unpacked(blocks: Iterator[bytes], size: int | None = None) -> BinaryIO:
    """A file of these blocks for :func:`mapped`: of at most a MiB in memory, else on the disk.

    Args:
        blocks: each of at most a MiB.
        size: bytes of all of them, where that is known.

    Raises:
        ValueError, EOFError: if there are more or fewer.
        InputError: if there is no room for them.
    """
    file, written = cast(BinaryIO, io.BytesIO()), 0
    for block in blocks:
        written += len(block)
        if size is not None and written > size:
            raise ValueError("is longer than its shape")
        left = memoryview(block)
        try:
            if written > BLOCK and isinstance(file, io.BytesIO):
                left = memoryview(file.getvalue() + block)
                file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            while left:  # the last bytes that fit on a full disk are written without an error
                left = left[file.write(left) :]
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()} has no room to unpack an array or index ({error.strerror}"
                "); name a folder with more in TMPDIR"
            ) from None
    if size is not None and written < size:
        raise EOFError("ends early")
    return file


def mapped(file: BinaryIO, offset: int = 0, size: int | None = None) -> np.ndarray:
    """Bytes of an :func:`unpacked` file, all of them or some; they outlive it."""
    if isinstance(file, io.BytesIO):
        return np.frombuffer(file.getvalue(), np.uint8)[offset:][:size]
    return np.memmap(file, np.uint8, "r", offset, size)


def content(file: BinaryIO) -> Iterator[bytes]:
    """The blocks of a file."""
    with file:
        while block := file.read(BLOCK):
            yield block


def inflated(file: BinaryIO) -> Iterator[bytes]:
    """The blocks that a file of gzip or zlib holds, whose checksum is verified at its end."""
    stream = zlib.decompressobj(zlib.MAX_WBITS + 32)  # tells the two apart by their heads
    with file:
        while not stream.eof:
            packed = stream.unconsumed_tail or file.read(1 << 16)
            block = stream.decompress(packed, BLOCK)
            if not packed and not block:
                raise EOFError("ends early")
            yield block
        if stream.unused_data or file.read(1):
            raise ValueError("goes on behind its end")


class Folder:
    """An unpacked archive."""

    deepest = 5
    """Folders below one another in which a file is looked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def named(self, name: str) -> list[str]:
        """Paths of the files of one name, in any folder that holds no other of them."""
        found = []
        for folder, below, files in os.walk(self.path):
            inside = Path(folder).relative_to(self.path)
            if name in files:
                found.append((inside / name).as_posix())
            if name in files or len(inside.parts) == self.deepest:
                below.clear()
        return found

    def has(self, path: str) -> bool:
        """Whether there is such a file."""
        return (self.path / path).is_file()

    def open(self, path: str) -> BinaryIO:
        """A file to read."""
        return io.BufferedReader(open_file(self.path / path))

    def close(self) -> None:
        """Nothing is held open."""


class Zip:
    """An archive as it was downloaded, with the methods of :class:`Folder`."""

    def __init__(self, path: Path) -> None:
        """Read the directory at the end of the file.

        Raises:
            InputError: if that is damaged or missing.
        """
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (*UNREADABLE, NotImplementedError) as error:
            raise InputError(
                f"{path} is no whole zip file ({error}); it was truncated or altered, download "
                "or copy it again"
            ) from None
        self._members = {
            posixpath.normpath(member.filename): member
            for member in self._zip.infolist()
            if not member.is_dir()
        }

    def named(self, name: str) -> list[str]:
        """Paths of the files of one name, but for the shadows that macOS packs beside them."""
        found = [path for path in self._members if posixpath.basename(path) == name]
        return [path for path in found if not path.startswith("__MACOSX/")]

    def has(self, path: str) -> bool:
        """Whether there is such a file."""
        return path in self._members

    def open(self, path: str) -> BinaryIO:
        """A file to read, whose checksum is verified at its end.

        Raises:
            InputError: if it is encrypted, or packed in a way that Python cannot undo.
        """
        try:
            return cast(BinaryIO, self._zip.open(self._members[path]))
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"{path} in {self.path} cannot be unpacked ({error}); unpack the zip file and "
                "give the folder"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


Files: TypeAlias = Folder | Zip


def is_zip(path: Path) -> bool:
    """Whether a file is a zip, whole or truncated.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
