"""Actions on files that nobody trusts, in processes whose memory, time and writing are watched.

A child is forked, so that what is imported already costs nothing. It may take a little memory and
a little time, starts no program, connects to nobody, and writes nowhere but where it may.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from frugal.common.data.damage import Damaged
from frugal.common.errors import InputError

Ending = Literal["read", "refused", "damaged", "escaped", "wrote", "hung", "died"]
"""How an action ended.

read: without complaint. refused: by an ``InputError``, which a command says as one sentence.
damaged: by a ``Damaged``, which a run counts. escaped: by any other exception. wrote: it ran a
program, connected to somewhere, or wrote where it must not. hung: it took too long. died:
its process ended.
"""
FINE = ("read", "refused", "damaged")
_RUNS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
    "pty.spawn", "socket.connect", "socket.sendto",
)  # fmt: skip
"""Python's audit events of who starts programs or talks to others."""
_WRITES = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "shutil.rmtree", "shutil.copyfile", "shutil.move",
)  # fmt: skip
_PATIENCE = 6
"""On a machine that others use too."""
_CLEAR = "/proc/self/clear_refs"
_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
_ADDRESSES = re.compile(r"VmSize:\s+(\d+) kB")


@dataclass(frozen=True)
class Outcome:
    """How one action ended."""

    ending: Ending
    words: str = ""
    """The sentence, the trace, or what was written."""
    seconds: float = 0.0
    """Of computing."""
    memory: int = 0
    """Bytes by which the resident memory of its process grew at most."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What an action may take."""

    seconds: float = 20.0
    """Of computing; whoever waits for something is given :data:`_PATIENCE` times as long."""
    addresses: int = 3 << 30
    """Bytes of address space beyond what the process has already."""
    folders: tuple[Path, ...] = ()
    """Where it may write."""


def confined(action: Callable[[], object], bounds: Bounds) -> Outcome:
    """How an action ends in a process of its own."""
    return next(confined_each([action], bounds))


def confined_each(actions: Sequence[Callable[[], object]], bounds: Bounds) -> Iterator[Outcome]:
    """How every action ends: in one process after the other, in another one where that is lost."""
    done = 0
    while done < len(actions):
        for outcome in _in_a_child(actions[done:], bounds):
            yield outcome
            done += 1


def _in_a_child(actions: Sequence[Callable[[], object]], bounds: Bounds) -> Iterator[Outcome]:
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _act(actions, bounds, writing)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb", buffering=0) as lines:
            left = len(actions)
            while left:
                is_there, _, _ = select.select([lines], [], [], _PATIENCE * bounds.seconds)
                line = lines.readline() if is_there else b""
                if not line:
                    yield _lost(pid, bounds, has_ended=bool(is_there))
                    return
                left -= 1
                yield Outcome(**json.loads(line))
    finally:
        _end(pid)


def _lost(pid: int, bounds: Bounds, *, has_ended: bool) -> Outcome:
    """What became of a process that says no more."""
    if not has_ended:
        seconds = _PATIENCE * bounds.seconds
        return Outcome("hung", f"it was not done after {seconds} s", seconds)
    _, status = os.waitpid(pid, 0)
    return Outcome("died", f"its process ended with {os.waitstatus_to_exitcode(status)}")


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _act(actions: Sequence[Callable[[], object]], bounds: Bounds, writing: int) -> NoReturn:
    """Do everything, and write a line for each; the process ends here."""
    status = 1
    try:
        found: list[str] = []
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _status(_ADDRESSES) + bounds.addresses
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if bounds.folders:
            tempfile.tempdir = str(bounds.folders[0])
        sys.addaudithook(_watcher(bounds, found))
        for action in actions:
            line = json.dumps(vars(_outcome(action, found, bounds))).encode() + b"\n"
            while line:
                line = line[os.write(writing, line) :]
        status = 0
    finally:
        os._exit(status)


def _outcome(action: Callable[[], object], found: list[str], bounds: Bounds) -> Outcome:
    Path(_CLEAR).write_text("5")  # forget the highest use so far
    before, start = _status(_PEAK), time.process_time()
    ending: Ending = "read"
    words = ""
    try:
        action()
    except InputError as error:
        ending, words = "refused", str(error)
    except Damaged as error:
        ending, words = "damaged", str(error)
    except BaseException:  # noqa: BLE001 - all that is neither is a fault
        ending, words = "escaped", traceback.format_exc()[-3_000:]
    if found:
        ending, words = "wrote", "; ".join(found)
        found.clear()
    seconds = time.process_time() - start
    if seconds > bounds.seconds:
        ending, words = "hung", f"it computed for {seconds:.1f} s"
    return Outcome(ending, words, seconds, _status(_PEAK) - before)


def _status(pattern: re.Pattern[str]) -> int:
    """Bytes, of this process."""
    found = pattern.search(Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _watcher(bounds: Bounds, found: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that notes what must not be."""
    allowed = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in bounds.folders)
    known = {os.path.realpath(path) for path in ("/dev/null", _CLEAR, *map(str, bounds.folders))}

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _RUNS:
            found.append(f"{event}{arguments[:2]!r}"[:300])
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not _may(path):
                found.append(f"it opened {path!r} to write")
        elif event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
            pass  # of shutil.rmtree, whose folder was looked at
        elif event in _WRITES and not _may(arguments[0]):
            found.append(f"{event}{arguments[:2]!r}"[:300])

    def _may(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor, which was opened before
        real = os.path.realpath(os.fsdecode(path))
        return real in known or real.startswith(allowed)

    return note
