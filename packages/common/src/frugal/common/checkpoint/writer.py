"""A process beside the trainer that writes what it is handed in memory, and outlives it.

``python -m frugal.common.checkpoint.writer MEMORY RANK WORLD_SIZE`` is started by
``checkpoint/background.py``, one per process of a run. ``MEMORY`` is the descriptor of memory that
holds one file of a checkpoint. It reads requests from its input and tells events on its output,
one JSON object per line each. Where its input ends, because the trainer has ended in whatever way,
it finishes what it was asked for, and ends too.

Every writer puts its file and then an entry about it into the folder of the attempt. That of the
first process waits for all entries and makes the checkpoint count; so no writer needs a trainer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from frugal.common.checkpoint.commit import count_as_newest, make_whole, remove_old
from frugal.common.checkpoint.manifest import Digests
from frugal.common.errors import InputError
from frugal.common.files import parse_json, reason_of, size_words, write_file
from frugal.common.history import note

LAST_ATTEMPTS = 4
"""At a checkpoint behind which no other comes, or whose trainer is gone."""
_LONGEST_PAUSE = 60.0
"""Seconds between two attempts, which begin with 1 and double."""
_STALLED = 180.0
"""Seconds without a sign of life of any writer before the first one gives up waiting."""
_AT_ONCE = 1 << 22
_SYNCED = 1 << 28
"""Bytes after which what was written is brought to the disk, and other writers see a sign."""


class _CancelledError(Exception):
    """The trainer has something newer to write."""


class _HopelessError(Exception):
    """No further attempt can help."""


class _Inbox:
    """Requests of the trainer, waited for in between of other things."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = b""
        self.is_closed = False
        """The trainer is gone."""

    def next(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next request; None if none comes in time, or no other ever."""
        while b"\n" not in self._buffer:
            if self.is_closed or not select.select([self._descriptor], [], [], timeout)[0]:
                return None
            block = os.read(self._descriptor, 1 << 16)
            self.is_closed = not block
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        request: dict[str, Any] = json.loads(line)
        return request


class Writer:
    """Writes the files of one process of a run, one after the other."""

    def __init__(self, memory: int, rank: int, world_size: int, *, requests: int) -> None:
        """Look at the memory; ``requests`` is the descriptor that the trainer writes to."""
        self.rank = rank
        self.world_size = world_size
        self._memory = mmap.mmap(memory, 0, prot=mmap.PROT_READ)
        self._inbox = _Inbox(requests)
        self._failures = 0
        """Attempts in a row that failed, whatever they were to write."""
        self._next_attempt = 0.0
        self._reason = ""
        self._entries: list[dict[str, Any]] | None = None
        """What all processes have written of what is written now, once that is known."""
        self._is_renamed = False

    def serve(self) -> None:
        """Do what is asked for until the trainer is gone."""
        begun: dict[str, Any] = {}
        while (request := self._inbox.next()) is not None:
            if request["do"] == "begin":
                begun = request
            elif request["do"] == "write":
                self._write(begun | request)
                begun = {}
            else:  # what is done already cannot be cancelled
                self._tell("cancelled")
        if begun:
            self._lose(begun, f"process {self.rank} ended before it was copied")

    def _write(self, job: dict[str, Any]) -> None:
        """Write until it is done, cancelled, or given up."""
        started, is_written, left = time.monotonic(), False, LAST_ATTEMPTS
        self._entries, self._is_renamed = None, False
        if job["is_last"]:
            self._next_attempt = 0.0
        elif self._failures:  # it is not the turn of the next attempt yet
            self._tell("failed", reason=self._reason, failures=self._failures)
        try:
            while True:
                self._pause(self._next_attempt)
                try:
                    if not is_written:
                        self._write_share(job)
                        is_written = True
                        self._tell("written")
                    if self.rank == 0:
                        self._complete(job)
                    self._failures, self._next_attempt = 0, 0.0
                    self._tell("complete", seconds=time.monotonic() - started)
                    return
                except (OSError, InputError) as error:
                    is_last = job["is_last"] or self._inbox.is_closed
                    self._note_failure(job, error, before=LAST_ATTEMPTS - left if is_last else None)
                    left -= is_last
                if not left:
                    raise _HopelessError(self._reason)
        except _CancelledError:
            self._discard(job)
            self._tell("cancelled")
        except _HopelessError as error:
            self._lose(job, str(error))
            self._tell("gave_up", reason=str(error), failures=self._failures)

    def _lose(self, job: dict[str, Any], reason: str) -> None:
        """Give a checkpoint up, and tell who waits for this process, or reads the history."""
        self._discard(job)
        with contextlib.suppress(OSError, InputError):
            if self.rank:  # the first process must not wait for what will never come
                Path(job["aside"]).mkdir(exist_ok=True)
                self._put_entry(job, {"failure": reason})
            else:
                folder = Path(job["final"]).parents[1]
                note(folder, "checkpoint_lost", step=job["step"], reason=reason)

    def _pause(self, until: float) -> None:
        """Wait, unless the trainer has something newer."""
        while True:
            left = max(0.0, until - time.monotonic())
            if self._inbox.is_closed:
                time.sleep(left)
                return
            request = self._inbox.next(timeout=left)
            if request is not None:
                raise _CancelledError
            if not self._inbox.is_closed:
                return

    def _note_failure(
        self, job: dict[str, Any], error: OSError | InputError, *, before: int | None
    ) -> None:
        """Say why an attempt failed, and when the next one is: later and later.

        ``before`` are the last attempts that were made, where the number of them is bounded.
        """
        room = ""
        if isinstance(error, OSError):
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(Path(job["final"]).parents[1]).free
                needed = len(self._memory) * self.world_size
                room = f" ({size_words(free)} are free there, {size_words(needed)} are needed)"
        self._reason = reason_of(error) + room
        pause = min(_LONGEST_PAUSE, 2.0 ** min(self._failures if before is None else before, 10))
        self._failures += 1
        self._next_attempt = time.monotonic() + pause
        goes_on = before is None or before + 1 < LAST_ATTEMPTS
        again = {"pause": pause} if goes_on else {}
        self._tell("failed", reason=self._reason, failures=self._failures, **again)

    def _write_share(self, job: dict[str, Any]) -> None:
        """Write the file of this process, read it back, and put the entry beside it."""
        aside = Path(job["aside"])
        # never the folder of the run: where it is gone, what it is mounted on is not the place
        aside.parent.mkdir(exist_ok=True)
        aside.mkdir(exist_ok=True)
        path = aside / job["file"]
        try:
            digests = self._copy_to(path)
            self._read_back(path)
            self._put_entry(job, {"name": path.name, "tensors": job["tensors"], **digests})
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise

    def _copy_to(self, path: Path) -> dict[str, Any]:
        digests = Digests()
        with path.open("wb", buffering=0) as file:
            whole = memoryview(self._memory)
            for start in range(0, len(whole), _AT_ONCE):
                block = whole[start : start + _AT_ONCE]
                digests.update(block)
                while block:
                    block = block[file.write(block) :]
                if start % _SYNCED == 0:
                    os.fdatasync(file.fileno())
            os.fsync(file.fileno())
            # what is compared next should come from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return digests.to_json()

    def _read_back(self, path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            for start in range(0, len(self._memory), _AT_ONCE):
                block = self._memory[start : start + _AT_ONCE]
                if os.pread(file.fileno(), len(block), start) != block:
                    raise OSError(errno.EIO, f"{path.name} reads back differently")
                if start % _SYNCED == 0:
                    os.utime(path)  # a sign of life

    def _put_entry(self, job: dict[str, Any], entry: dict[str, Any]) -> None:
        write_file(Path(job["aside"]) / _entry_name(self.rank), json.dumps(entry))

    def _complete(self, job: dict[str, Any]) -> None:
        """Wait for the files of all processes, and make the checkpoint the newest one."""
        aside, final = Path(job["aside"]), Path(job["final"])
        if self._entries is None:
            self._entries = [self._entry_of(rank, aside) for rank in range(self.world_size)]
        for rank in range(self.world_size):
            (aside / _entry_name(rank)).unlink(missing_ok=True)
        if not self._is_renamed:
            make_whole(aside, final, job["state"], self._entries, job["about"])
            self._is_renamed = True
        count_as_newest(final)
        remove_old(final, keep=job["keep"])

    def _entry_of(self, rank: int, aside: Path) -> dict[str, Any]:
        path = aside / _entry_name(rank)
        sign, seen = sign_of_life(aside), time.monotonic()
        while not path.exists():
            self._pause(time.monotonic() + 0.05)
            if sign != (sign := sign_of_life(aside)):
                seen = time.monotonic()
            if time.monotonic() - seen > _STALLED:
                raise _HopelessError(
                    f"process {rank} wrote nothing for {_STALLED:.0f} seconds, or its machine is "
                    "gone"
                )
        entry: dict[str, Any] = parse_json(path.read_bytes())
        if "failure" in entry:
            raise _HopelessError(entry["failure"])
        return entry

    def _discard(self, job: dict[str, Any]) -> None:
        aside = Path(job["aside"])
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                (aside / job["file"]).unlink(missing_ok=True)

    def _tell(self, event: str, **facts: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(sys.stdout.fileno(), json.dumps({"event": event, **facts}).encode() + b"\n")


def _entry_name(rank: int) -> str:
    return f"entry-{rank:05d}.json"


def sign_of_life(folder: Path) -> list[tuple[str, int, int]]:
    """What changes while any writer works in a folder."""
    found = []
    with contextlib.suppress(OSError):
        for file in sorted(folder.iterdir()):
            status = file.stat()
            found.append((file.name, status.st_size, status.st_mtime_ns))
    return found


def main() -> None:
    """The body of ``python -m frugal.common.checkpoint.writer``."""
    for number in (signal.SIGXFSZ, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # they come as errors of what was tried
    os.nice(10)
    memory, rank, world_size = map(int, sys.argv[1:])
    Writer(memory, rank, world_size, requests=sys.stdin.fileno()).serve()


if __name__ == "__main__":
    main()
