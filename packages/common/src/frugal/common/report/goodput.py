"""Where the time of a run went, from its history and its log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frugal.common.history import read_history
from frugal.common.report.collect import read_metrics

NAMES = {
    "steps": "steps",
    "waiting": "waiting for data",
    "checkpoint": "saving",
    "evaluation": "evaluating",
    "starting": "starting",
    "again": "steps that were done again",
    "between": "between the end of a process and the start of the next",
    "other": "everything else",
}
"""What time is spent on, in the order of the page."""


def time_spent(run_dir: Path) -> dict[str, float] | None:
    """Seconds of a run by what they were spent on, all of :data:`NAMES`.

    They add up to the time from the start of its first process to what was last seen of it. What
    the last log line of a killed process does not tell is ``between``. None where the run, of an
    earlier version, has no history.
    """
    sessions = _sessions(read_history(run_dir))
    if not sessions:
        return None
    lines = read_metrics(run_dir)
    spent = dict.fromkeys(NAMES, 0.0)
    for number, events in enumerate(sessions):
        following = sessions[number + 1][0] if number + 1 < len(sessions) else None
        seen, seconds = _last_seen(events, following, lines)
        _add_session(spent, events, following, seen - events[0]["since"], seconds)
        if following is not None:
            # another machine, or a clock that was set, may tell an earlier time
            spent["between"] += max(following["since"] - seen, 0.0)
    return spent


def _sessions(history: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of every process that trained, one after the other, each from its start on.

    A run that began anew forgets what was in its directory before, and a branch its run.
    """
    sessions: list[list[Mapping[str, Any]]] = []
    for event in history:
        if event["event"] in ("began", "continued") and "since" in event:
            sessions = [[event]] if event["event"] == "began" else [*sessions, [event]]
        elif event["event"] == "branched":
            sessions = []
        elif sessions:
            sessions[-1].append(event)
    return sessions


def _last_seen(
    events: Sequence[Mapping[str, Any]],
    following: Mapping[str, Any] | None,
    lines: Sequence[Mapping[str, Any]],
) -> tuple[float, Mapping[str, float]]:
    """When a process was last heard of, and what it had spent its time on until then."""
    start = events[0]
    told = [event for event in events if event["event"] == "ended"]
    told += [following["before"]] if following is not None else list(lines[-1:])
    for line in told:
        if "session_seconds" in line and line["time"] >= start["time"]:
            return line["time"], line["session_seconds"]
    return start["time"], {"starting": start["time"] - start["since"]}


def _add_session(
    spent: dict[str, float],
    events: Sequence[Mapping[str, Any]],
    following: Mapping[str, Any] | None,
    wall: float,
    seconds: Mapping[str, float],
) -> None:
    """Add what one process did in ``wall`` seconds."""
    working = seconds.get("steps", 0.0) + seconds.get("waiting", 0.0)
    again = sum(event.get("lost_seconds", 0.0) for event in events[1:])
    if following is not None:  # it continues from a checkpoint, which tells the seconds before it
        behind = max(events[0]["seconds"] + working - following["seconds"], 0.0)
        # some of what was lost by going back is behind it too, and to be told once
        before = following.get("lost_seconds", again) - events[0].get("lost_seconds", 0.0)
        again = behind + max(before, 0.0)
    again = min(again, working)
    kept = 1 - again / working if working else 1.0
    known = {name: seconds.get(name, 0.0) for name in ("checkpoint", "evaluation", "starting")}
    known |= {name: kept * seconds.get(name, 0.0) for name in ("steps", "waiting")}
    known["again"] = again
    for name, share in known.items():
        spent[name] += share
    spent["other"] += max(wall - sum(known.values()), 0.0)
