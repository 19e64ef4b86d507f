"""What happened to a run: when it began and went on, and with what; one JSON object per line.

``history.jsonl`` of a run directory is only ever added to. Every line has ``time`` (seconds since
1970), ``event`` and ``step``; what else it has depends on the event:

``began``, ``continued``  ``world_size``, ``engine``, ``recipe`` (which may differ from start to
    start, as in engine and precision), ``code`` (the version and a digest of the sources),
    ``since`` (when the first process was started), ``seconds`` (of steps before), ``lost_seconds``
    (of these, of steps that were done again after going back), ``before`` (of the last log line of
    the process before: ``step``, ``time``, ``session_seconds``), ``environment`` (as in
    ``environment.json``), ``weights`` (a digest of those that a run with digests began with);
``saved``  when the first checkpoint of the run is there;
``ended``  ``session_seconds``: what the first process spent its time on, by name; a process that is
    killed has no such line;
``rewind``  ``to``, ``left_out``, ``lost_seconds``: the step of the checkpoint that the run went
    back to, the steps (counted from 1) whose samples it does not train on, what was spent on the
    steps that are done again;
``branched``  ``source``: the checkpoint of the other run that this one began with; lines before
    this one are of that run;
``data_changed``  ``changes``: what was another than when the run began, and was allowed;
``checkpoint_lost``  ``reason``: why it could not be written, as the process that writes tells.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError
from frugal.common.files import cannot_write, finite, read_json_lines

FILE = "history.jsonl"
SAVED = "saved"


def note(run_dir: Path, event: str, *, step: int, **facts: Any) -> None:
    """Add a line to the history of a run; it is on the disk when this returns.

    Args:
        run_dir: of the run.
        event: one word for what happened.
        step: optimizer steps that were done then.
        facts: what else is to be told (JSON).

    Raises:
        InputError: if it cannot be written.
    """
    line = finite({"time": round(time.time(), 3), "event": event, "step": step, **facts})
    path = run_dir / FILE
    try:
        with path.open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # a crash has cut the last line
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's history, oldest first; one that was cut by a crash is left out.

    Raises:
        InputError: if a line was altered so that it does not tell what it must.
    """
    lines, _ = read_json_lines(run_dir / FILE)
    lines = [line for line in lines if isinstance(line.get("event"), str)]
    for line in lines:
        facts = _FACTS.get(line["event"], {}) | ({"step": _is_step} if "step" in line else {})
        for name, is_right in facts.items():
            if not is_right(line.get(name)):
                raise InputError(
                    f"{run_dir / FILE} was altered: its line of {line['event']!r} has "
                    f"{line.get(name)!r} as {name}; restore it as it was written"
                )
    return lines


def saved_step(run_dir: Path) -> int:
    """The last step of which the history tells that a checkpoint was there; 0 where none was.

    Raises:
        InputError: as :func:`read_history`.
    """
    saved = 0
    for event in read_history(run_dir):
        if event["event"] == "began":
            saved = 0  # in the place of what a run left that saved nothing
        elif event["event"] == "branched":
            saved = event["step"]  # what stands before it is of another run
        elif event["event"] in (SAVED, "continued"):
            saved = max(saved, event.get("step", 0))
        elif event["event"] == "rewind":
            saved = max(saved, event["to"])
    return saved


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0


def _all_steps(value: Any) -> bool:
    return isinstance(value, list) and all(_is_step(step) for step in value)


def _all_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_FACTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    SAVED: {"step": _is_step},
    "branched": {"step": _is_step},
    "rewind": {"to": _is_step, "left_out": _all_steps},
    "data_changed": {"changes": _all_words},
}
"""What is computed with of an event, and how it is known to be what was written."""
