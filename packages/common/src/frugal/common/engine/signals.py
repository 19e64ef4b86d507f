"""When to stop early: signals, the end of the launcher, and that all processes agree."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from frugal.common.run import LauncherChain

_POLL = 1.0
"""Seconds of waiting after which a process looks again whether it is to stop."""


class WaitInterrupted(BaseException):
    """This process was told to stop while it waited for data; no library catches this one."""


class StopSignal:
    """Turns SIGTERM, the first SIGINT and the loss of the launcher into a wish of the loop."""

    def __init__(self, *, grace: float = 0.0) -> None:
        """Nothing is asked yet.

        Args:
            grace: seconds that data may still come in after this process was asked to stop, so
                that all processes stop after the same step.
        """
        self._grace = grace
        self._asked_at: float | None = None
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._launchers = LauncherChain()

    @property
    def asked(self) -> bool:
        """True once this process is to stop."""
        return self._signal is not None or self._launchers.is_broken

    @property
    def name(self) -> str:
        """The signal seen here; another process may have seen it instead."""
        if self._signal is None and self._launchers.is_broken:
            return "the end of its launcher"
        return signal.Signals(self._signal or signal.SIGTERM).name

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended by this signal."""
        return 128 + (self._signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        # a second Ctrl-C means it
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Around waiting for data, which may never come.

        Raises:
            WaitInterrupted: if this process was asked to stop and nothing came in the grace.
        """
        signal.setitimer(signal.ITIMER_REAL, _POLL, _POLL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _check_grace(self, number: int, frame: FrameType | None) -> None:
        """Every second of waiting."""
        del number, frame
        if not self.asked:
            return
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        if now - self._asked_at >= self._grace:
            raise WaitInterrupted

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._check_grace)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
