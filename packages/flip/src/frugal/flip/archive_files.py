"""The files of a published archive, read in place: a folder, or a zip that is never unpacked.

Paths are relative to the archive and joined by slashes.
"""

from __future__ import annotations

import json
import os
import posixpath
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from frugal.common.errors import InputError

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


class Files(Protocol):
    """The files of an archive."""

    path: Path
    """What the user named."""

    def named(self, name: str) -> list[str]:
        """Paths of the files of one name, in any folder that holds no other of them."""
        ...

    def has(self, path: str) -> bool:
        """Whether there is such a file."""
        ...

    def size(self, path: str) -> int:
        """Bytes of a file."""
        ...

    def open(self, path: str) -> BinaryIO:
        """A file to read, which can seek."""
        ...

    def close(self) -> None:
        """Let go of the archive."""
        ...


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

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return (self.path / path).stat().st_size

    def open(self, path: str) -> BinaryIO:
        """A file to read."""
        return (self.path / path).open("rb")

    def close(self) -> None:
        """Nothing is held open."""


class Zip:
    """An archive as it was downloaded."""

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

    def size(self, path: str) -> int:
        """Bytes of a file when unpacked."""
        return self._members[path].file_size

    def open(self, path: str) -> BinaryIO:
        """A file to read, whose checksum is verified at its end.

        Raises:
            InputError: if it is encrypted, or packed in a way that Python cannot undo.
        """
        try:
            member: Any = self._zip.open(self._members[path])
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"{path} in {self.path} cannot be unpacked ({error}); unpack the zip file and "
                "give the folder"
            ) from None
        member.MAX_SEEK_READ = 1 << 16  # it seeks by reading: 16 MiB at a time, held three times
        return member

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


def open_files(path: Path) -> Files:
    """The files in a folder or a zip.

    Raises:
        InputError: if the zip is truncated.
    """
    return Folder(path) if path.is_dir() else Zip(path)


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
