"""Whether the other processes of a run still live and go on, and what each did last.

A collective waits for whoever does not come, without a word of who that is. So every process tells
the others what it does, and a thread beside the training looks at what they tell. Where one gives
no sign of life, or stays behind the others, for longer than a run allows, every process names it
and ends; the same command then continues from the last checkpoint. So they do where all are in the
same step, and one does not leave its line of the program: somebody waits there for a process that
computes without end, and the lines of all of them tell which. Beside the steps, where one may
compute for hours while the others wait, they do so where none leaves its line, or computes there.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from frugal.common import distributed
from frugal.common.distributed import connect_to_store
from frugal.common.files import parse_json, reason_of
from frugal.common.run import Run

COMPUTING_THREAD = "frugal computes"
"""What the names of threads begin with that the main thread waits for while they compute."""
_BEAT = 5.0
"""Seconds between two looks, at most."""
_COMPUTING = "computing step"
_LISTED = 8
"""Processes whose lines are told."""
_LEAST_WORK = 0.002
"""Share of the time that who waits for nothing else computes at least; who sleeps does not."""
_EXCHANGES = (str(Path(torch.distributed.__file__).parent), distributed.__file__)
"""Where one process waits for others."""


@dataclass
class _Seen:
    """What was last heard of a process, and when it was news."""

    beats: int
    position: int
    doing: str
    line: str
    """Of the program, that it was in; "" while it may be there for as long as it takes."""
    waits: bool
    """Whether it waited for other processes there."""
    works: int
    """How often it was seen to compute; only counted beside the steps."""
    host: str
    alive_at: float
    moved_at: float
    """When its position was another."""
    left_line_at: float
    """When its line was another, or it was seen to compute."""


class _AwakeTime:
    """Seconds that this process was awake; threads may ask at once.

    A cluster suspends a run, and a shell stops it, with all of its processes. When they go on, none
    of them has told anything for as long, and none is at fault.
    """

    def __init__(self, most: float) -> None:
        """Begin; of the time between two calls of :meth:`now`, ``most`` seconds count at most."""
        self._most = most
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._seconds = 0.0

    def now(self) -> float:
        """Seconds since the beginning."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, self._most)
            self._last = now
            return self._seconds


class Watchdog:
    """Tells what this process does, and ends it where another one is gone or stuck."""

    def __init__(self, run: Run, *, minutes: float | None, remedy: str) -> None:
        """Begin, where there are other processes.

        Args:
            run: this process.
            minutes: without a sign of life, behind the others, or in one line; None never ends
                anything.
            remedy: what to do where it ends, in words.
        """
        self._run = run
        self._remedy = remedy
        self._limit = 0.0 if minutes is None else 60 * minutes
        self._doing = "starting"
        self._may_stand = False
        self._position = 0
        self._closed = threading.Event()
        self._seen: dict[int, _Seen] = {}
        self._behind: dict[int, tuple[int, float]] = {}
        """Positions that others have left, by process, and since when that is known."""
        self._clock = _AwakeTime(2 * self._pause)
        self._begun = self._answered_at = self._clock.now()
        if minutes is not None and run.world_size > 1:
            # apart: what talks to a process that stands still hangs
            for work in (self._talk, self._judge):
                threading.Thread(target=work, daemon=True).start()

    def wait_for_data(self, step: int) -> None:
        """Note that the data of a step are waited for."""
        self._position, self._doing = 2 * step, f"waiting for the data of step {step}"
        self._may_stand = False

    def compute(self, step: int) -> None:
        """Note that a step is computed."""
        self._position, self._doing = 2 * step + 1, f"{_COMPUTING} {step}"

    def note(self, doing: str, *, may_stand: bool = False) -> None:
        """Note what is done beside the steps; it may take as long as it takes.

        Args:
            doing: in words.
            may_stand: whether all processes may be in one line of the program meanwhile, as where
                they wait for another program.
        """
        self._doing, self._may_stand = doing, may_stand

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    @property
    def _pause(self) -> float:
        return min(_BEAT, self._limit / 5)

    def _talk(self) -> None:
        """Tell what this process does, and hear what the others do."""
        try:
            store = connect_to_store(timeout=self._limit)
        except Exception as error:  # noqa: BLE001 - a run goes on without
            self._run.log.warning("no process is watched for standing still: %s", reason_of(error))
            self.close()
            return
        beats = works = 0
        before = 0.0
        while not self._closed.is_set():
            beats += 1
            line, waits, computed = ("", False, 0.0) if self._may_stand else _place()
            if not _is_step(self._doing) and abs(computed - before) > _LEAST_WORK * self._pause:
                works += 1
            before = computed
            told = [beats, self._position, self._doing, line, waits, works, socket.gethostname()]
            try:
                store.set(f"alive/{self._run.rank}", json.dumps(told))
                for rank in range(self._run.world_size):
                    if store.check([f"alive/{rank}"]):
                        self._hear(rank, *parse_json(store.get(f"alive/{rank}")))
                self._answered_at = self._clock.now()
            except Exception:  # noqa: BLE001 - its keeper is gone: see _fault
                pass
            self._closed.wait(self._pause)

    def _hear(
        self,
        rank: int,
        beats: int,
        position: int,
        doing: str,
        line: str,
        waits: bool,
        works: int,
        host: str,
    ) -> None:
        now, last = self._clock.now(), self._seen.get(rank)
        alive_at = now if last is None or last.beats != beats else last.alive_at
        moved_at = now if last is None or last.position != position else last.moved_at
        left_line_at = now
        if last is not None and (last.doing, last.line, last.works) == (doing, line, works):
            left_line_at = last.left_line_at
        self._seen[rank] = _Seen(
            beats, position, doing, line, waits, works, host, alive_at, moved_at, left_line_at
        )

    def _judge(self) -> None:
        """End this process where another one is gone or stuck."""
        while not self._closed.wait(self._pause):
            fault = self._fault()
            if fault and not self._closed.is_set():
                self._end(fault)

    def _fault(self) -> str:
        """Which process is gone or stuck, in words; "" where none is."""
        now, seen = self._clock.now(), dict(self._seen)
        here = f"; this process is {self._doing}"
        if now - self._answered_at > self._limit:
            last = f"; {self._told_last(seen[0])}" if 0 in seen else ""
            return f"process 0, which keeps the meeting place, does not answer{last}{here}"
        first = max((one.position for one in seen.values()), default=0)
        for rank in range(self._run.world_size):
            one, named = seen.get(rank), f"process {rank} of {self._run.world_size}"
            if one is None:
                if now - self._begun > self._limit:
                    return f"{named} has told nothing since this one began to train{here}"
                continue
            named += f" (on {one.host})"
            if now - one.alive_at > self._limit:
                return (
                    f"{named} has given no sign of life for {now - one.alive_at:.0f} seconds; "
                    f"{self._told_last(one)}{here}"
                )
            if self._stayed_behind(rank, one, first, now) > self._limit:
                return (
                    f"{named} has been {one.doing} for {now - one.moved_at:.0f} seconds, while "
                    f"others wait for it{here}"
                )
        return self._standstill(seen, now)

    def _told_last(self, one: _Seen) -> str:
        """What a process did, as far as it could tell: it may have come further after that."""
        return f"when it told last, as every {self._pause:.2g} seconds, it was {one.doing}"

    def _stayed_behind(self, rank: int, one: _Seen, first: int, now: float) -> float:
        """Seconds for which others have been further than a process that did not move.

        What it did before, as an evaluation, may have taken all of them as long as it takes.
        """
        if one.position == first:
            self._behind.pop(rank, None)
            return 0.0
        if self._behind.get(rank, (None, now))[0] != one.position:
            self._behind[rank] = one.position, now
        return now - self._behind[rank][1]

    def _standstill(self, seen: dict[int, _Seen], now: float) -> str:
        """That nobody gets out of a step, in words, and where they are; "" where it goes on."""
        everybody = [seen[rank] for rank in sorted(seen)]
        if len(everybody) < self._run.world_size or len({one.position for one in everybody}) > 1:
            return ""
        stood = [now - one.left_line_at if one.line else 0.0 for one in everybody]
        # a step may be long, and goes from line to line then; beside them one may compute for all
        is_step = _is_step(everybody[0].doing)
        waited = max(stood) if is_step else min(stood)
        # beside them all may wait for something else, such as a disk that hangs
        if waited <= self._limit or not (is_step or any(one.waits for one in everybody)):
            return ""
        lines = [
            f"process {rank} (on {one.host}) {'waits for others ' if one.waits else ''}in "
            f"{one.line or one.doing}"
            for rank, one in enumerate(everybody[:_LISTED])
        ]
        more = ", and others" if len(everybody) > _LISTED else ""
        return (
            f"no process has come further than {everybody[0].doing} for {waited:.0f} seconds: "
            f"{', '.join(lines)}{more}"
        )

    def _end(self, fault: str) -> NoReturn:
        self._run.log.error("%s; this process ends (%s)", fault, self._remedy)
        # the main thread waits in a collective, which nothing else can end
        os._exit(1)


def _is_step(doing: str) -> bool:
    return doing.startswith(_COMPUTING)


def _innermost() -> tuple[FrameType | None, float]:
    """Of the main thread, or of the one that computes while that waits for it; its CPU seconds."""
    frames = sys._current_frames()
    threads = [threading.main_thread()]
    threads += [one for one in threading.enumerate() if one.name.startswith(COMPUTING_THREAD)]
    found = [(frames[one.ident], one.ident) for one in threads if one.ident in frames]
    working = [each for each in found if each[0].f_code.co_filename != threading.__file__]
    frame, ident = next(iter(working or found), (None, 0))
    try:
        return frame, time.clock_gettime(time.pthread_getcpuclockid(ident)) if ident else 0.0
    except OSError:  # it has ended meanwhile
        return None, 0.0


def _place() -> tuple[str, bool, float]:
    """The line that this process is in, whether it waits for others there, and its CPU seconds."""
    frame, computed = _innermost()
    waits = False
    while frame is not None and frame.f_code.co_filename.startswith(_EXCHANGES):
        frame, waits = frame.f_back, True
    if frame is None:
        return "", False, computed
    path = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"line {frame.f_lineno} of {path} ({frame.f_code.co_name})", waits, computed
