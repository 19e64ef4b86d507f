"""Small files: what others wrote, read by one rule; what a run writes, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import resource
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError

LARGEST_FILE = 1 << 30
"""Bytes of the largest file that is read whole: settings, lists, the picture of one sample."""
_DEEPEST = 64
"""Lists and objects of JSON inside one another; what is written here has less than ten."""
_SWELLING, _SMALL = 8, 1 << 26
"""How often its own size the members of an archive of numbers may have, and the bytes besides."""
_ENOUGH_FILES = 65_536
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_SYSTEM_NAMES = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "desktop.ini",
        "__pycache__",
    }
)

_OBJECT = re.compile(r"\s*<[^<>]*\bat 0x[0-9a-fA-F]+>|\s+at 0x[0-9a-fA-F]+")
"""An object with its address, or the address alone."""
_CLASS = re.compile(r"<class '([\w.]+)'>")
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
    "bytes": "bytes", "list": "a list", "tuple": "a list", "dict": "an object",
    "NoneType": "nothing", "Tensor": "a tensor", "ndarray": "an array",
}  # fmt: skip
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): ")
_LONGEST = 300
_UNKNOWN = "no reason is given"
_WORDS: dict[type[BaseException], str] = {
    MemoryError: "there is not enough memory",
    RecursionError: "it is nested too deeply",
    EOFError: "it ends early",
    TimeoutError: "it took too long",
    TypeError: "something in it is of another kind than expected",
    AttributeError: "something in it is of another kind than expected",
    IndexError: "something in it is shorter than expected",
}
"""Of errors that say nothing, or speak of Python and not of what was read."""


def is_system_name(name: str) -> bool:
    """Whether a file or folder was put there by an operating system, an archiver or an editor.

    Names with a leading dot (``.DS_Store``, ``._name`` of macOS, ``.ipynb_checkpoints``) and the
    folders of macOS's archives, Synology, Windows and ext4. Whoever leaves one out says so.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def open_file(path: Path) -> FileIO:
    """A file opened for reading, unbuffered; never something that may hold one up without end.

    Raises:
        OSError: if it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file but a folder, a pipe or a device")
    return FileIO(descriptor)


def read_bytes(path: Path) -> bytes:
    """What a file of at most :data:`LARGEST_FILE` bytes holds.

    Raises:
        OSError: as :func:`open_file` does, or if it is larger.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise OSError(errno.EFBIG, too_large(size))
        return file.readall()


def too_large(size: int) -> str:
    """What is wrong with so many bytes where a small file or a member of a sample should be."""
    return f"it has {size:,} bytes, more than the {LARGEST_FILE:,} that are ever read at once"


def read_text(path: Path) -> str:
    r"""A small text file: UTF-8, without a byte-order mark, its lines ended by ``\n`` alone.

    ``\r\n`` and a lone ``\r`` become ``\n``; nothing else (U+2028, vertical tab, form feed) ends a
    line here, although :meth:`str.splitlines` would have it so.

    Raises:
        InputError: if the file cannot be read or is not UTF-8.
    """
    try:
        encoded = read_bytes(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}); check the path") from None
    try:
        text = encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8 text (byte {encoded[error.start]:#04x} in line {line}); save it "
            "as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a small text file, without the blank ones at its beginning and end.

    A blank line between others stays, as an empty string: whoever counts lines must see it.

    Raises:
        InputError: as :func:`read_text`.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds; bytes may begin with a byte-order mark.

    Raises:
        ValueError: if it is no JSON, is nested too deeply, names something twice in one object, or
            holds a number that Python will not convert. :class:`json.JSONDecodeError` and
            ``UnicodeDecodeError`` are among them.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        content = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > _DEEPEST:  # the JSON of a sample has few of them
        _refuse_depth(content)
    return content


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} occurs twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unrepeated)
"""``json.loads`` would make one for every sample."""


def _refuse_depth(content: Any) -> None:
    """Refuse what functions that call themselves would not come to the bottom of."""
    level, depth = [content], 0
    while level := [part for parts in level for part in _parts(parts)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")


def _parts(content: Any) -> Iterable[Any]:
    """The lists and objects inside of one."""
    values = content.values() if isinstance(content, dict) else content
    return (
        [value for value in values if isinstance(value, dict | list)]
        if isinstance(content, dict | list)
        else ()
    )


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: if it cannot be read, or is no JSON.
    """
    try:
        return parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({reason_of(error)}); copy it again"
        ) from None


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file that holds one per line, and how many of its lines are none.

    A crash may have cut the last line in two. Where there is no file there are no lines.
    """
    if not path.is_file():
        return [], 0
    lines, unreadable = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            unreadable += bool(text.strip())
    return lines, unreadable


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        InputError: if it cannot be read, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


class SwellingError(zipfile.BadZipFile):
    """An archive would unpack to far more than it holds."""


@contextlib.contextmanager
def making_sense_of(path: Path | str) -> Iterator[None]:
    """Where files that others wrote become parts of ours: what does not fit is one sentence.

    No list of the ways in which a number of somebody else's can be wrong is complete.

    Raises:
        InputError: for whatever is raised inside.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        logging.getLogger("frugal").debug("%s cannot be made sense of", path, exc_info=True)
        raise InputError(
            f"{path} does not describe anything that can be built ({reason_of(error)}); copy it "
            "again, or give what its library wrote"
        ) from error


def refuse_swelling(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive of numbers whose members unpack to far more than it holds.

    Weights become hardly smaller by compression: what does was made to fill the memory.

    Args:
        archive: opened; nothing of it is unpacked.
        size: bytes of its file.

    Raises:
        SwellingError: if it does.
    """
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > _SWELLING * size + _SMALL:
        raise SwellingError(
            f"its {size:,} bytes would unpack to {unpacked:,}, as those of no weights do"
        )


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file aside and rename it: its name holds all of the content or what it held before.

    Raises:
        InputError: if it cannot be written, with the room that is left where the disk is full.
    """
    encoded = content.encode("utf-8") if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON as :func:`write_file` does; numbers that are not finite become ``null``.

    Raises:
        InputError: if it cannot be written.
    """
    write_file(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """JSON content with ``None`` in the place of every number that JSON cannot hold."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def reason_of(error: BaseException, *, last_line: bool = False) -> str:
    """What went wrong, in words: without a path, an address of memory or a type's name.

    Args:
        error: of the system, or of a library.
        last_line: take the last line of its text instead of the first, where libraries that tell
            many things say what it was.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, TypeError | AttributeError) or not lines:
        return next((words for kind, words in _WORDS.items() if isinstance(error, kind)), _UNKNOWN)
    line = lines[-1 if last_line else 0]
    line = _CLASS.sub(lambda found: _KINDS.get(found[1].split(".")[-1], "something else"), line)
    line = _ERROR.sub("", _OBJECT.sub("", line))
    return line.strip().rstrip(".:").strip()[:_LONGEST] or _UNKNOWN


def raise_open_files_limit() -> None:
    """Let this process, and those that it starts, open many files, where the system allows it."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def refuse_exhaustion(error: Exception) -> None:
    """Stop where a file cannot be opened for a reason that is not the file's.

    Raises:
        InputError: if too many files are open, or the memory is used up.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _SYSTEM_ERROR.search(str(error))):
        number = int(found[1])  # as safetensors reports them
    if number in (errno.EMFILE, errno.ENFILE):
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise InputError(
            f"too many files are open ({os.strerror(number)}; one process may open {soft}); allow "
            "more with `ulimit -n 65536`, or have fewer loader processes (--data.workers) or "
            "fewer shards at a time (--data.shuffle-shards)"
        ) from None
    if number == errno.ENOMEM:
        raise InputError(
            f"the memory of this machine is used up ({os.strerror(number)}); have fewer loader "
            "processes (--data.workers), or smaller batches"
        ) from None


def cannot_write(path: Path, error: OSError) -> InputError:
    """The sentence for a file that cannot be written, to be raised."""
    room = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(_existing(path)).free
            room = f", {size_words(free)} are free there"
    remedy = "make room or the folder writable, or choose another place"
    if path.is_dir():  # nothing takes its name
        remedy = "a folder has that name: remove it, or choose another place"
    return InputError(f"{path} cannot be written ({reason_of(error)}{room}); {remedy}")


def size_words(count: int) -> str:
    """Bytes in words: little does not look like nothing, as 0.3 MiB; 12,345 MiB."""
    if count < 2**17:
        return f"{count:,} bytes"
    return f"{count / 2**20:.1f} MiB" if count < 10 * 2**20 else f"{count / 2**20:,.0f} MiB"


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
