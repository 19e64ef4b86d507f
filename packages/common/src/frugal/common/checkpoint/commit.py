"""From files that are written to the newest checkpoint of a run: nothing here needs torch.

A checkpoint is written into a hidden folder; when every file is whole, ``state.json`` and the
manifest are added, the folder is renamed, and only then ``latest`` points at it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frugal.common.checkpoint.manifest import FILE as MANIFEST
from frugal.common.checkpoint.manifest import digest_file, digest_json, write_manifest
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, write_file
from frugal.common.history import SAVED, note, saved_step

FORMAT = 1
BEST = "best.json"
"""Beside the checkpoints, names the one with the highest number of an evaluation."""


def checkpoint_name(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"step_{step:09d}"


def step_of(name: str) -> int:
    """Of the folder of a checkpoint, by its name."""
    return int(name.removeprefix("step_"))


def aside_of(final: Path, attempt: str = "") -> Path:
    """Where a checkpoint is written before it is whole, perhaps by one of several attempts."""
    return final.with_name(f".{final.name}{attempt}.writing")


def make_anew(folder: Path) -> None:
    """An empty folder; what was in it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def make_whole(
    aside: Path,
    final: Path,
    state: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> None:
    """Make a checkpoint of files that are written, under its own name.

    Args:
        aside: the folder that they were written into.
        final: the folder that they are to be found in.
        state: everything that is no tensor.
        files: name, tensors, bytes, crc32 and sha256 of every file.
        about: what the manifest tells of the run.

    Raises:
        InputError: if a file cannot be written.
        OSError: if a folder cannot be written.
    """
    whole = {**state, "format": FORMAT, "manifest": MANIFEST, "files": files}
    write_file(aside / "state.json", json.dumps(whole, indent=1))
    sha256 = {file["name"]: file["sha256"] for file in files}
    sha256["state.json"] = digest_file(aside / "state.json")["sha256"]
    recipe = {"recipe": digest_json(state["recipe"])} if "recipe" in state else {}
    write_manifest(aside, sha256, {"format": FORMAT, **recipe, **about})
    sync_folder(aside)
    # what a run that went on from an earlier checkpoint takes once more; removing it takes long
    replaced = _put_aside(final)
    aside.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def count_as_newest(final: Path) -> None:
    """Make a whole checkpoint the newest of its run, and have the history tell that there is one.

    Who finds the history and no checkpoint knows then that something was lost.

    Raises:
        InputError: if that cannot be written.
    """
    point_at(final)
    run_dir = final.parents[1]
    with contextlib.suppress(
        InputError
    ):  # one that was altered meanwhile is told at the next start
        if saved_step(run_dir):
            return
    note(run_dir, SAVED, step=step_of(final.name))


def point_at(final: Path) -> None:
    """Make a whole checkpoint the newest one; raises ``InputError`` if that cannot be written."""
    write_file(final.parent / "latest", final.name + "\n")


def sync_file(path: Path) -> None:
    """Have the disk hold the bytes of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the disk hold the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return [f for f in checkpoint_folders(folder) if (f / "state.json").exists()]


def checkpoint_folders(folder: Path) -> list[Path]:
    """Those that are called as checkpoints are and hold something, oldest first.

    A copy that somebody keeps beside them, such as ``step_000000010_backup``, is none of them.
    """
    named = [f for f in folder.glob("step_*") if f.name.removeprefix("step_").isdecimal()]
    return sorted(f for f in named if f.is_dir() and any(f.iterdir()))


def read_best(folder: Path) -> dict[str, Any]:
    """What ``best.json`` says of a checkpoint that is still there; {} otherwise."""
    try:
        best = parse_json(read_bytes(folder / BEST))
        name, value = best["checkpoint"], float(best["value"])
        is_there = Path(name).name == name and (folder / name / "state.json").exists()
        return best | {"value": value} if is_there and math.isfinite(value) else {}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return {}


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; who is killed meanwhile leaves no half of it under its name."""
    with contextlib.suppress(OSError):
        shutil.rmtree(_put_aside(checkpoint))


def _put_aside(checkpoint: Path) -> Path:
    """Take a checkpoint's name away, if it is there; :func:`remove_old` removes the rest."""
    old = aside_of(checkpoint, ".old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        checkpoint.rename(old)
    if old.is_symlink():  # what is elsewhere is not ours to remove
        old.unlink()
    return old


def remove_old(newest: Path, *, keep: int) -> None:
    """Remove what stands before a checkpoint that was written, and what was left half written.

    The last ``keep`` of those up to it stay, and the best one. Later ones stay too: they are
    damaged, or a run went on from an earlier one, and will take them once more.
    """
    folder = newest.parent
    best = read_best(folder)
    before = [found for found in whole_checkpoints(folder) if found.name <= newest.name]
    for old in before[:-keep]:
        if old.name != best.get("checkpoint"):
            remove(old)
    for leftover in folder.glob(".*.writing"):
        shutil.rmtree(leftover, ignore_errors=True)
