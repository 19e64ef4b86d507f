"""Checkpoints that are written beside training, by processes that outlive it.

Every process of a run copies its share into memory that it has in common with a writer of its own
(``writer.py``), and trains on. One checkpoint is written at a time; the next one waits for it. What
cannot be written is tried again, while training goes on, until as many attempts in a row failed as
the run allows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from frugal.common.checkpoint.commit import aside_of, checkpoint_name
from frugal.common.checkpoint.host_copy import HostCopy
from frugal.common.checkpoint.store import CheckpointStore, not_written
from frugal.common.checkpoint.writer import sign_of_life
from frugal.common.distributed import gather_objects
from frugal.common.errors import InputError
from frugal.common.files import reason_of
from frugal.common.installed import source_folders

_NOT_FOR_WRITERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What launchers and schedulers send to all processes to make a run save and end."""
Fill = Callable[[Mapping[str, Tensor]], None]
"""Copies what is to be saved into tensors of these names."""


_ENDS = ("complete", "cancelled", "gave_up")
"""States of a writer that has nothing more to do."""
_LOOK = 5.0
"""Seconds between two looks at a writer that is waited for, at most."""
_LONGEST = 1e6
"""Seconds to wait at most, where nothing else bounds them."""
_UNTIL_GONE = 5.0
"""Seconds that one is waited for that was killed."""


class _WriterProcess:
    """The writer of one process of a run, and what it has told of what it writes."""

    def __init__(self, copy: HostCopy, rank: int, world_size: int, lock: int | None) -> None:
        # beside training it must start at once: without what site-packages bring along
        folders = os.pathsep.join(str(part.parents[1]) for part in source_folders())
        # blocked signals stay so in what is started: the trainer alone decides when to end
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WRITERS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-m", "frugal.common.checkpoint.writer",
                 str(copy.descriptor), str(rank), str(world_size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": folders},
                pass_fds=(copy.descriptor,) if lock is None else (copy.descriptor, lock),
                start_new_session=True,  # what is sent to the trainer's group is not for it
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        _WRITERS.add(self)
        self._buffer = b""
        self.is_gone = False
        """It was killed: nothing else ends it before its input does."""
        self.state = ""
        self.is_complete = False
        self.reason = ""
        """Why the newest attempt failed."""
        self.failures = 0
        """Attempts in a row."""

    def begin(self, request: dict[str, Any]) -> None:
        """Tell of a checkpoint that is to be copied."""
        self.state, self.is_complete, self.reason, self.failures = "", False, "", 0
        self.send({"do": "begin", **request})

    def send(self, request: dict[str, Any]) -> None:
        """Ask for something."""
        try:
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.flush()
        except OSError:
            self._end()

    def poll(self, timeout: float | None = 0.0) -> dict[str, Any] | None:
        """The next event; None if there is none within some seconds, or none ever."""
        while b"\n" not in self._buffer:
            if self.is_gone or not select.select([self._output], [], [], timeout)[0]:
                return None
            block = os.read(self._output.fileno(), 1 << 16)
            if not block:
                self._end()
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        self.state = event["event"]
        self.is_complete |= self.state == "complete"
        self.reason = event.get("reason", self.reason)
        self.failures = event.get("failures", self.failures)
        return event

    def _end(self) -> None:
        self._lose(f"ended (exit code {self._process.wait()})")

    def kill(self, seconds: float) -> None:
        """End one that has done nothing for so long; a disk that hangs may keep it for longer."""
        self._process.kill()
        self._lose(f"stood still for {seconds:.0f} seconds and was ended")

    def _lose(self, what: str) -> None:
        self.is_gone = True
        if self.state not in _ENDS:
            self.state = "gave_up"
            self.reason = f"the process that writes it {what}"
            self.failures += 1

    def let_go(self) -> None:
        """Hold its input no longer, in a fork of the trainer, for which it would wait too."""
        with contextlib.suppress(ValueError), Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), self._input.fileno(), inheritable=False)

    def let_end(self) -> None:
        """Ask for nothing more: it finishes what it writes, with a last few attempts."""
        with contextlib.suppress(OSError):
            self._input.close()

    def close(self, seconds: float) -> None:
        """Wait until it has ended that was let; one that still has not after some is killed."""
        for patience in (_UNTIL_GONE if self.is_gone else min(seconds, _LONGEST), _UNTIL_GONE):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                break
            self._process.kill()  # a disk that hangs may keep it
        self._output.close()


_WRITERS = weakref.WeakSet[_WriterProcess]()
"""Those of this process, of whose inputs every fork has a copy: loader processes are forks."""


def _let_go() -> None:
    for writer in _WRITERS:
        writer.let_go()


os.register_at_fork(after_in_child=_let_go)


class BackgroundSaves:
    """The checkpoints of a run while it trains; every process calls the same methods."""

    def __init__(
        self, store: CheckpointStore, *, max_failures: int, stall_minutes: float | None = None
    ) -> None:
        """Begin; nothing is written yet.

        Args:
            store: of the run.
            max_failures: attempts in a row that may fail.
            stall_minutes: for which a writer may do nothing; None waits for ever.
        """
        self._stall = math.inf if stall_minutes is None else 60 * stall_minutes
        self._store = store
        self._run = store.run
        self._max_failures = max_failures
        self._copy: HostCopy | None = None
        self._writer: _WriterProcess | None = None
        self._is_possible = True
        """Whether there is memory that can be handed over."""
        self._lost_writers = 0
        """Checkpoints in a row for which a writer, on whichever process, ended by itself."""
        self._failed_saves = 0
        """In a row, where they are written by the trainer itself."""
        self._pending: Path | None = None
        """The folder of what is being written."""
        self._aside = Path()
        """Where it is written before it is whole."""
        self._is_last = False
        """Whether no other checkpoint follows that one."""
        self.lock: int | None = None
        """Descriptor of what keeps other runs out of the directory while anything is written."""

    def prepare(self, layout: Mapping[str, Tensor]) -> bool:
        """Have memory and a writer, so that the first checkpoint need not wait for them.

        Args:
            layout: tensors of the names, types and shapes of this process's share.

        Returns:
            False, on all processes, where one of them cannot; then training waits for checkpoints.
        """
        if not self._is_possible:
            return False
        problem = ""
        try:
            if self._copy is None or not self._copy.fits(layout):
                self.close()
                self._copy = HostCopy(layout)
            if self._writer is None or self._writer.is_gone:
                rank, world_size = self._run.rank, self._run.world_size
                self._writer = _WriterProcess(self._copy, rank, world_size, self.lock)
        except (OSError, MemoryError) as error:
            problem = reason_of(error)
        problems = [problem for problem in gather_objects(problem) if problem]
        if problems:
            self._is_possible = False
            self.close()
            self._run.log.warning("checkpoints are written while training waits: %s", problems[0])
        return self._is_possible

    def save(
        self, layout: Mapping[str, Tensor], fill: Fill, state: dict[str, Any], *, is_last: bool
    ) -> None:
        """Copy one checkpoint, and have it written; the one before is waited for.

        Args:
            layout: tensors of the names, types and shapes of this process's share.
            fill: copies the share.
            state: JSON-ready; holds ``step``.
            is_last: no other follows: wait until it is written.

        Raises:
            InputError: if too many attempts in a row failed; with ``is_last`` also if it cannot be
                written within a few attempts. Older checkpoints are untouched.
        """
        before = self._pending
        if (reason := self._settle()) and before is not None:
            words = not_written(before, reason)
            self._run.log.warning("%s; that of step %d takes its place", words, state["step"])
        if not self.prepare(layout):
            self._save_here(layout, fill, state, is_last=is_last)
            return
        assert self._copy is not None and self._writer is not None
        run, final = self._run, self._store.folder / checkpoint_name(state["step"])
        attempt = gather_objects(uuid.uuid4().hex[:8] if run.is_main else "")[0]
        self._pending, self._is_last = final, is_last
        self._aside = aside_of(final, f".{attempt}").absolute()
        self._writer.begin(
            {
                "aside": str(self._aside),
                "final": str(final.absolute()),
                "file": f"tensors-{run.rank:05d}-of-{run.world_size:05d}.safetensors",
                "step": state["step"],
                "tensors": sorted(layout),
                "keep": self._store.keep,
                "is_last": is_last,
            }
        )
        fill(self._copy.tensors)
        # only the first writer needs to know what is the same for all
        common = {"state": state, "about": self._store.about} if run.is_main else {}
        self._writer.send({"do": "write", **common})
        if is_last and (reason := self._settle(is_last=True)):
            if self._lost_writers:  # what ended them need not keep the trainer from writing
                self._run.log.warning(
                    "%s; it is written while training waits", not_written(final, reason)
                )
                self._save_here(layout, fill, state, is_last=True)
                return
            raise InputError(f"{not_written(final, reason)}; older checkpoints are untouched")

    def poll(self) -> None:
        """Tell of attempts that failed since anybody looked; never waits."""
        if self._writer is not None:
            while (event := self._writer.poll()) is not None:
                self._tell(event)

    def settle(self) -> bool:
        """Wait until what is being written is whole, or has failed once.

        Only this process waits. Returns whether the checkpoint that was asked for last is there;
        the first process knows.
        """
        self._wait_for("complete", "failed", "gave_up")
        return self._pending is None or self._writer is None or self._writer.is_complete

    def finish(self) -> None:
        """Wait until nothing is being written; every process calls this.

        Raises:
            InputError: if too many attempts in a row failed.
        """
        final = self._pending
        if (reason := self._settle()) and final is not None:
            self._run.log.warning("%s", not_written(final, reason))

    def close(self) -> None:
        """Let the writer end; it finishes what it writes."""
        if self._writer is not None:
            self._writer.let_end()
            self._wait_for(*_ENDS)
            if self._pending is not None and not self._writer.is_complete:
                words = not_written(self._pending, self._writer.reason or "a process ended")
                self._run.log.warning("%s; older checkpoints are untouched", words)
            self._pending = None
            self._writer.close(self._stall)
            self._writer = None
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def _wait_for(self, *states: str) -> None:
        writer = self._writer
        self.poll()
        if self._pending is not None and writer is not None:
            self._hear(writer, states)

    def _hear(self, writer: _WriterProcess, states: Container[str]) -> None:
        """Wait for a writer to come to some state; one that stands still is ended."""
        sign, seen, pause = sign_of_life(self._aside), time.monotonic(), 0.0
        while writer.state not in states and not writer.is_gone:
            event = writer.poll(timeout=min(_LOOK, self._stall / 5))
            if event is not None:
                self._tell(event)
                pause = event.get("pause", 0.0)
            if event is not None or sign != (sign := sign_of_life(self._aside)):
                seen = time.monotonic()
            elif time.monotonic() - seen > self._stall + pause:
                writer.kill(time.monotonic() - seen)

    def _tell(self, event: dict[str, Any]) -> None:
        """Log that an attempt failed."""
        if event["event"] == "failed" and "pause" in event and self._pending is not None:
            self._run.log.warning(
                "%s; %solder checkpoints are untouched, and it is tried again in %.0f s",
                not_written(self._pending, event["reason"]),
                "" if self._is_last else "training goes on, ",
                event["pause"],
            )

    def _settle(self, *, is_last: bool = False) -> str:
        """Wait until nothing is being written; why the checkpoint is not there, or nothing.

        A checkpoint that has failed once is given up for what is to be written next; with
        ``is_last`` the writers have a few attempts.

        Raises:
            InputError: if too many attempts in a row failed.
        """
        final, writer = self._pending, self._writer
        if final is None or writer is None:
            return ""
        stopped = ("gave_up",) if is_last else ("failed", "gave_up")
        self._wait_for("written", "complete", *stopped)
        # where one has failed, the first process waits for its file in vain
        if any(gather_objects(writer.state in stopped)):
            self._cancel(writer)
        elif self._run.is_main:
            self._wait_for("complete", *stopped)
            self._cancel(writer)
        told = gather_objects((writer.is_complete, writer.reason, writer.failures, writer.is_gone))
        self._pending = None
        is_lost = any(is_gone for *_, is_gone in told)
        self._lost_writers = self._lost_writers + 1 if is_lost else 0
        if self._lost_writers > 1:
            self._is_possible = False
            self._run.log.warning(
                "checkpoints are written while training waits: processes that write them end"
            )
        if told[0][0]:
            return ""
        reason = next((reason for _, reason, *_ in told if reason), "a process ended")
        failures = max(failures for _, _, failures, _ in told)
        if failures >= self._max_failures and not is_last:
            raise InputError(self._too_many(final, reason, failures))
        return reason

    def _cancel(self, writer: _WriterProcess) -> None:
        """Have it do nothing."""
        if writer.state not in ("complete", "gave_up"):
            writer.send({"do": "cancel"})
            self._hear(writer, ("cancelled",))

    def _too_many(self, final: Path, reason: str, failures: int) -> str:
        return (
            f"{not_written(final, reason)}; older checkpoints are untouched. {failures} attempts "
            f"in a row failed, and run.max_failed_saves is {self._max_failures}: make room or the "
            "folder writable, and the same command goes on from the newest checkpoint"
        )

    def _save_here(
        self, layout: Mapping[str, Tensor], fill: Fill, state: dict[str, Any], *, is_last: bool
    ) -> None:
        """Write a checkpoint while training waits."""
        tensors = {
            name: tensor.new_empty(tensor.shape, device="cpu") for name, tensor in layout.items()
        }
        fill(tensors)
        try:
            self._store.save(tensors, state)
        except InputError as error:
            self._failed_saves += 1
            if is_last or self._failed_saves >= self._max_failures:
                raise
            self._run.log.warning("%s; training goes on", error)
        else:
            self._failed_saves = 0
