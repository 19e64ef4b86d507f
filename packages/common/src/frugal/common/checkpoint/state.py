"""What ``state.json`` of a checkpoint may hold: whatever reads it may rely on these kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST = 1 << 62
_COUNTS = ("step", "samples", "updates", "skipped_steps", "skipped_in_row", "world_size")
_OBJECTS = ("damage", "loss_scale", "recipe")
TO_CONTINUE = ("updates", "loss_scale", "recipe")
"""What a run cannot go on without, beside its tensors."""


def refuse_strange(state: Mapping[str, Any], files: Any) -> None:
    """Refuse a ``state.json`` whose parts are of other kinds than are written.

    Raises:
        ValueError, KeyError, TypeError: with what is wrong.
    """
    if "step" not in state:
        raise KeyError("step")
    for name in state.keys() & {*_COUNTS, *_OBJECTS, "seconds", "stream", "engine"}:
        if not _is_of_its_kind(name, state[name]):
            raise ValueError(f"its {name} is {str(state[name])[:40]!r}")
    for file in files:
        name, tensors = file["name"], file["tensors"]
        if Path(name).name != name:
            raise ValueError(f"it names the file {name!r}, which does not lie beside it")
        if type(file["bytes"]) is not int or type(file["crc32"]) is not int:
            raise ValueError(f"it does not say how long {name} is")
        if not (isinstance(tensors, list) and all(isinstance(each, str) for each in tensors)):
            raise ValueError(f"it does not say what {name} holds")
    if not any(name.startswith("weight/") for file in files for name in file["tensors"]):
        raise ValueError("it names no weights")


def _is_of_its_kind(name: str, value: Any) -> bool:
    if name in _COUNTS:
        return _is_count(value)
    if name == "seconds":
        return type(value) in (int, float) and 0 <= value < _LARGEST
    if name == "engine":
        return isinstance(value, str)
    if name == "stream":  # what is in them, the data knows
        return isinstance(value, list) and all(isinstance(each, dict) for each in value)
    if not isinstance(value, dict):
        return False
    if name == "damage":
        return all(_is_tally(what, counted) for what, counted in value.items())
    if name == "loss_scale":
        return all(type(number) in (int, float) for number in value.values())
    return True


def _is_tally(name: str, value: Any) -> bool:
    """Whether this is a count, or counts by name; by the numbers of sources where it is ``_of``."""
    if not isinstance(value, dict):
        return _is_count(value)
    known = all(key.isdecimal() and len(key) < 19 for key in value) or not name.endswith("_of")
    return known and all(_is_count(count) for count in value.values())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST
