"""When to stop early: signals, the end of the launcher, and that all processes agree."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from frugal.common.run import LauncherChain, Run


class Termination:
    """Turns SIGTERM, the first SIGINT and the loss of the launcher into a wish of the loop."""

    def __init__(self) -> None:
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

    def __enter__(self) -> Termination:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Agreement:
    """Whether any process was asked to stop, known to all of them after the same step.

    The hosts tell each other without waiting, neither for the device nor for the slowest process:
    what is said before one step is heard before the next.
    """

    def __init__(self, run: Run) -> None:
        """Every process calls this."""
        self._alone = run.world_size == 1
        self._group: Any = None
        if not self._alone and run.device.type == "cuda":
            # the group that exchanges gradients works in the order of the device
            self._group = dist.new_group(backend="gloo")
        self._said: tuple[dist.Work, torch.Tensor] | None = None

    def reached(self, *, asked: bool) -> bool:
        """Say whether this process was asked to stop; every process calls this before a step.

        Returns:
            True on all processes alike, once one of them was asked; alone, without delay.
        """
        if self._alone:
            return asked
        heard = False
        if self._said is not None:
            work, votes = self._said
            work.wait()
            heard = votes.item() > 0
        votes = torch.tensor(int(asked))
        work = dist.all_reduce(votes, group=self._group, async_op=True)
        assert work is not None
        self._said = work, votes
        return heard
