"""What is done where a run has diverged: stop, go on, or go back and leave samples out.

A step without a finite gradient changes nothing. Where many come in a row, the weights were led
astray before. A run that goes back takes up the last good checkpoint, and does not train on the
samples of the steps that were not finite; if it then diverges once more, on none of the samples
since that checkpoint. The steps keep their numbers, so that all others see the samples and the
learning rate that they would have seen. What was decided stands in the history of the run: whoever
continues it leaves out the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frugal.common.checkpoint.commit import step_of
from frugal.common.checkpoint.store import Checkpoint, CheckpointStore, first_whole, open_checkpoint
from frugal.common.distributed import gather_objects

REWIND = "rewind"
"""The event in the history of a run; see :mod:`frugal.common.history`."""


class Diverged(Exception):  # noqa: N818 - a turn, not an error
    """Too many steps in a row had no finite gradient; raised on all processes after the same."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        """The last of them."""


def _rewinds(history: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the run that is there; one that began anew in its directory knows none."""
    found: list[Mapping[str, Any]] = []
    for event in history:
        if event["event"] == "began":
            found = []
        elif event["event"] == REWIND:
            found.append(event)
    return found


def left_out_steps(history: Iterable[Mapping[str, Any]]) -> set[int]:
    """The steps of a run, counted from 1, whose samples are read and not trained on."""
    return {step for event in _rewinds(history) for step in event["left_out"]}


def left_out_before(history: Iterable[Mapping[str, Any]], step: int) -> tuple[set[int], bool]:
    """The steps that were left out when some step was taken, and whether that one is now.

    Of a step that was taken more than once it is the first time.
    """
    left_out: set[int] = set()
    for event in _rewinds(history):
        if step in event["left_out"]:
            return left_out, True
        left_out |= set(event["left_out"])
    return left_out, False


def steps_in_row(last: int, count: int, left_out: set[int]) -> list[int]:
    """The last ``count`` steps up to one that were taken, in order."""
    found: list[int] = []
    while len(found) < count and last > 0:
        if last not in left_out:
            found.append(last)
        last -= 1
    return found[::-1]


def steps_to_leave_out(
    history: Sequence[Mapping[str, Any]], *, to: int, not_finite: Sequence[int]
) -> list[int]:
    """What a run leaves out that goes back to the checkpoint of a step.

    Args:
        history: of the run.
        to: the step of the checkpoint.
        not_finite: the steps in a row, in order.
    """
    if all(event["to"] != to for event in _rewinds(history)):
        return list(not_finite)
    return list(range(to + 1, not_finite[-1] + 1))


def last_good(
    store: CheckpointStore,
    *,
    before: int,
    left_out: set[int],
    history: Iterable[Mapping[str, Any]],
) -> Checkpoint | None:
    """The newest checkpoint whose weights are known to be sound; every process calls this.

    They are where a step behind it had a finite gradient, and where going back to it twice, the
    second time without all samples since, was not in vain.

    Args:
        store: of the run.
        before: the first step in a row that had none.
        left_out: steps that were not taken.
        history: of the run, as the first process knows it.
    """
    found = _newest_sound(store, before, left_out, history) if store.run.is_main else None
    name = gather_objects(found.folder.name if found else None)[0]
    if name is None:
        return None
    return found or open_checkpoint(store.folder / name)


def _newest_sound(
    store: CheckpointStore,
    before: int,
    left_out: set[int],
    history: Iterable[Mapping[str, Any]],
) -> Checkpoint | None:
    """As :func:`last_good`, of the first process; one that is damaged is passed over."""
    times = Counter(event["to"] for event in _rewinds(history))

    def is_sound(folder: Path) -> bool:
        first = step_of(folder.name) + 1
        steps = range(first, before)
        return times[first - 1] < 2 and any(step not in left_out for step in steps)

    sound = filter(is_sound, reversed(store.whole()))
    return first_whole(sound, otherwise="there is none before it to go back to")
