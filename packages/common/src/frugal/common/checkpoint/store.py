"""One checkpoint format, whatever the engine: safetensors by parameter name and one JSON file.

``checkpoints/step_000001000/``
    ``tensors-00000-of-00002.safetensors``  float32 ``weight/<name>``, ``exp_avg/<name>``,
    ``exp_avg_sq/<name>`` (LARS, matrices of Muon: ``momentum/<name>``), ``ema/<name>`` of the
    parameters this writer owns, and ``buffer/<name>`` of buffers and frozen parameters;
    ``state.json``  everything else, with size and checksum of every file;
    ``manifest.json``  the SHA-256 of every file, and of what the run is made of (``manifest.py``).
``checkpoints/latest``  the name of the newest whole checkpoint.
``checkpoints/best.json``  the name of the one with the highest number of an evaluation, if wanted.

A checkpoint is written aside, read back, renamed when complete, and only then pointed at. The
writing is spread over the processes, so that none ever holds all moments of a large model.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.checkpoint.commit import (
    BEST,
    FORMAT,
    aside_of,
    checkpoint_folders,
    checkpoint_name,
    count_as_newest,
    make_anew,
    make_whole,
    point_at,
    read_best,
    remove,
    remove_old,
    step_of,
    sync_file,
    whole_checkpoints,
)
from frugal.common.checkpoint.manifest import (
    ALTERED,
    DamagedError,
    check_manifest,
    check_size,
    digest_file,
    file_checksum,
)
from frugal.common.checkpoint.manifest import FILE as MANIFEST
from frugal.common.checkpoint.state import TO_CONTINUE, refuse_strange
from frugal.common.checkpoint.tensor_bytes import TensorBytes, copy_tensors, find_tensors
from frugal.common.distributed import gather_objects
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, reason_of, write_file
from frugal.common.models.finite import refuse_not_finite, refuse_not_finite_parts
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import from_json, load_recipe
from frugal.common.run import Run

_LOG = logging.getLogger("frugal")
MODEL_FILE = "model.json"
"""In a run directory: what of its model is no weight."""
_READ_BACK = 1 << 24
"""Bytes of a file that was written that are compared at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken, skipped ones included."""
        return self.state["step"]

    @property
    def run_dir(self) -> Path:
        """Of the run that wrote it."""
        return self.folder.parent.parent

    def recipe(self) -> Recipe:
        """The recipe that was trained up to here.

        Raises:
            InputError: if it holds none, or none that can be read.
        """
        source = str(self.folder / "state.json")
        found = from_json(self.state.get("recipe"), source=source)
        if not isinstance(found, Recipe):
            raise InputError(f"{source} does not hold a recipe; use an older checkpoint")
        return found

    def refuse_to_continue(self) -> None:
        """Refuse a checkpoint that lacks what a run goes on with.

        Raises:
            InputError: naming what is not there.
        """
        if lacking := [name for name in TO_CONTINUE if name not in self.state]:
            raise InputError(
                f"{self.folder / 'state.json'} has no {lacking[0]}, without which no run can go "
                "on; use an older checkpoint, or give it with --run.start-from"
            )

    def names(self) -> set[str]:
        """``kind/name`` of every tensor."""
        return {name for file in self.state["files"] for name in file["tensors"]}

    def reader(self) -> Callable[[str], Tensor]:
        """A function from ``kind/name`` to the tensor, mapped from the file when asked for."""
        owner = {name: file["name"] for file in self.state["files"] for name in file["tensors"]}
        handles = {file["name"]: self._open(file["name"]) for file in self.state["files"]}
        for name, file in owner.items():
            if name not in handles[file].keys():  # noqa: SIM118 - it is no mapping
                raise InputError(
                    f"{self.folder / file} lacks {name}, which state.json says it holds; use an "
                    "older checkpoint"
                )
        return lambda name: handles[owner[name]].get_tensor(name)

    def _open(self, name: str) -> Any:
        """A file of it; raises ``InputError`` where it is no safetensors."""
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.folder / name} cannot be read ({reason_of(error)}); use an older checkpoint"
            ) from None

    def weights(self, *, average: bool = True) -> dict[str, str]:
        """``kind/name`` of every weight and buffer by its name, for :meth:`reader`.

        That of its moving average where the run kept one, or with ``average=False`` never.
        """
        names = self.names()
        chosen = {}
        for kind in ("weight", "buffer"):
            for stored in sorted(name for name in names if name.startswith(f"{kind}/")):
                name = stored.partition("/")[2]
                moved = average and kind == "weight" and f"ema/{name}" in names
                chosen[name] = f"ema/{name}" if moved else stored
        return chosen

    def tensor_bytes(self) -> dict[str, TensorBytes]:
        """Where every tensor lies, by ``kind/name``; none is read."""
        found: dict[str, TensorBytes] = {}
        self.reader()  # which refuses what is not there
        for file in self.state["files"]:
            found |= find_tensors(self.folder / file["name"])
        return found


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by name, mapped from the files; their moving average where the run kept one.

    Raises:
        InputError: if a number is not finite.
    """
    read = checkpoint.reader()
    weights = {name: read(stored) for name, stored in checkpoint.weights().items()}
    refuse_not_finite(weights, source=str(checkpoint.folder))
    return weights


def owners(sizes: Iterable[tuple[str, int]], world_size: int) -> dict[str, int]:
    """Which process writes which parameter: the largest first, each to the least loaded."""
    load = [0] * world_size
    owner = {}
    for name, size in sorted(sizes, key=lambda item: (-item[1], item[0])):
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += size
    return owner


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, run: Run, *, keep: int) -> None:
        self.run = run
        self.keep = keep
        self.folder = run.dir / "checkpoints"
        self.about: dict[str, Any] = {}
        """What manifests tell of the run."""

    def save(
        self,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        *,
        gather: Callable[[Any], list[Any]] = gather_objects,
    ) -> Path:
        """Write one checkpoint; every process calls this with the tensors it owns.

        Args:
            tensors: ``kind/name`` to CPU tensors of this process's share.
            state: JSON-ready; must hold ``step``.
            gather: collects one JSON-ready value of every process, in rank order, on all of them.
        """
        rank, world_size = self.run.rank, self.run.world_size
        final = self.folder / checkpoint_name(state["step"])
        aside = aside_of(final)
        path = aside / f"tensors-{rank:05d}-of-{world_size:05d}.safetensors"
        try:
            # nobody writes before the folder is there
            _refuse(gather(_attempt(make_anew, aside) if self.run.is_main else ""), final)
            files = gather(_write_file(path, tensors))
            _refuse_failures(files, final)
            failure = ""
            if self.run.is_main:
                failure = _attempt(_complete, aside, final, state, files, self.about)
            _refuse(gather(failure), final)  # nobody trains on before the checkpoint counts
        except InputError:
            if self.run.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        if self.run.is_main:
            remove_old(final, keep=self.keep)
        return final

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of a step is there, and complete."""
        return any(folder.name == checkpoint_name(step) for folder in self.whole())

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a run that goes back takes once more.

        If the best one is among them, the best is found anew: a later checkpoint of that name
        holds other weights. Nothing may be being written.
        """
        point_at(self.folder / checkpoint_name(step))
        if read_best(self.folder).get("checkpoint", "") > checkpoint_name(step):
            (self.folder / BEST).unlink(missing_ok=True)
        for folder in self.whole():
            if folder.name > checkpoint_name(step):
                remove(folder)

    def note_best(self, step: int, number: str, value: float) -> bool:
        """Make the checkpoint of a step the best one if its value is higher than any before.

        Returns:
            Whether it is. One that another number chose gives way.
        """
        before = read_best(self.folder)
        beaten = before.get("number") != number or value > before["value"]
        if math.isnan(value) or not beaten:
            return False
        best = {"checkpoint": checkpoint_name(step), "number": number, "value": value}
        write_file(self.folder / BEST, json.dumps(best) + "\n")
        return True

    def whole(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return whole_checkpoints(self.folder)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None where the run has none yet.

        Raises:
            InputError: if it holds weights alone, so that no run can go on from it.
        """
        checkpoint = newest_checkpoint(self.folder)
        if checkpoint is not None and checkpoint.state.get("weights_only"):
            raise InputError(
                f"{self.run.dir} holds weights without optimizer state, which no run can continue; "
                "give it with --run.start-from and choose another --run.dir"
            )
        return checkpoint


def save_weights(folder: Path, weights: Mapping[str, Tensor], *, step: int) -> Path:
    """Write a checkpoint of weights alone: for evaluation, export and ``--run.start-from``.

    Args:
        folder: ``checkpoints`` of a run directory; made if missing.
        weights: float32 CPU tensors by the objective's names.
        step: optimizer steps they were trained for.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: if it cannot be written; the folder holds nothing new then.
    """
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
    return _save_alone(folder, step, tensors, lambda path: _write_tensors(path, tensors))


def copy_weights(checkpoint: Checkpoint, folder: Path, names: Mapping[str, str]) -> Path:
    """What :func:`save_weights` writes, of a checkpoint, a few MiB in memory at a time.

    Args:
        checkpoint: of any engine, written by any number of processes.
        folder: ``checkpoints`` of a run directory; made if missing.
        names: of the weights to take, as :meth:`Checkpoint.weights` has them.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: if a number is not finite, or it cannot be written; the folder holds nothing
            new then.
    """
    stored = checkpoint.tensor_bytes()
    tensors = {f"weight/{name}": stored[source] for name, source in names.items()}
    for name, source in names.items():
        refuse_not_finite_parts(stored[source].parts(), name, source=str(checkpoint.folder))
    return _save_alone(folder, checkpoint.step, tensors, lambda path: copy_tensors(tensors, path))


def _save_alone(
    folder: Path, step: int, names: Iterable[str], write: Callable[[Path], str]
) -> Path:
    """A checkpoint of one file without optimizer state; ``write`` says what went wrong."""
    final = folder / checkpoint_name(step)
    aside = aside_of(final)
    path = aside / "tensors-00000-of-00001.safetensors"
    state = {"step": step, "weights_only": True}
    try:
        _refuse([_attempt(make_anew, aside)], final)
        files = [_entry(path, names, failure=write(path))]
        _refuse_failures(files, final)
        _refuse([_attempt(_complete, aside, final, state, files, {})], final)
    except InputError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def _attempt(action: Callable[..., None], *arguments: Any) -> str:
    """Do something with files; what went wrong, or nothing."""
    try:
        action(*arguments)
    except (OSError, InputError) as error:
        return reason_of(error)
    return ""


def _write_file(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write one file of a checkpoint; its entry in ``state.json``, or what went wrong."""
    return _entry(path, tensors, failure=_write_tensors(path, tensors))


def _entry(path: Path, names: Iterable[str], *, failure: str) -> dict[str, Any]:
    digests = {} if failure else digest_file(path)
    return {"name": path.name, "tensors": sorted(names), "failure": failure, **digests}


def _refuse_failures(files: list[dict[str, Any]], final: Path) -> None:
    _refuse([file.pop("failure") for file in files], final)


def _refuse(failures: Iterable[str], final: Path) -> None:
    """Stop, on every process alike, if any of them failed."""
    if failed := [failure for failure in failures if failure]:
        raise InputError(f"{not_written(final, failed[0])}; older checkpoints are untouched")


def not_written(final: Path, reason: str) -> str:
    """The first half of a sentence about a checkpoint that failed."""
    step = step_of(final.name)
    return f"the checkpoint of step {step} could not be written to {final.parent}: {reason}"


def _complete(
    aside: Path,
    final: Path,
    state: dict[str, Any],
    files: list[dict[str, Any]],
    about: dict[str, Any],
) -> None:
    """Make a checkpoint whose files are written the newest one."""
    make_whole(aside, final, state, files, about)
    count_as_newest(final)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write and read back; what went wrong, or nothing."""
    try:
        save_file(tensors, path)
        sync_file(path)
        for portion in _portions(tensors):
            # opened anew each time: what is read stays in memory until the file is closed
            with safe_open(path, framework="pt") as written:
                for name, part in portion:
                    found, expected = written.get_slice(name)[part], tensors[name][part]
                    if not found.equal(expected) and not expected.isnan().any():
                        return f"{path.name}: {name} reads back differently"
    except (OSError, SafetensorError) as error:
        return f"{path.name}: {reason_of(error)}"
    return ""


def _portions(tensors: Mapping[str, Tensor]) -> Iterator[list[tuple[str, Any]]]:
    """Names and indices that cover all tensors, a few MiB at a time."""
    portion: list[tuple[str, Any]] = []
    size = 0
    for name, tensor in tensors.items():
        for part in _parts(tensor):
            nbytes = tensor[part].nbytes
            if portion and size + nbytes > _READ_BACK:
                yield portion
                portion, size = [], 0
            portion.append((name, part))
            size += nbytes
    if portion:
        yield portion


def _parts(tensor: Tensor) -> list[Any]:
    """Indices of a tensor's rows, a few MiB at a time."""
    if tensor.nbytes <= _READ_BACK:
        return [...]
    rows = max(1, _READ_BACK * len(tensor) // tensor.nbytes)
    return [slice(first, first + rows) for first in range(0, len(tensor), rows)]


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that ``latest`` points at, or the newest whole one.

    One that is damaged is passed over, and that is said.

    Raises:
        InputError: naming each, if all are damaged.
    """
    names = [f.name for f in reversed(checkpoint_folders(folder))]
    pointed = _pointed(folder)
    if pointed is not None and names and pointed not in names:
        _LOG.warning(
            "%s names %r, which is no checkpoint that is there; the newest one is taken",
            folder / "latest", pointed[:40],
        )  # fmt: skip
    names.sort(key=lambda name: name != pointed)
    found, damage = _first_whole(folder / name for name in names)
    if damage and found is None:
        raise InputError(
            f"no checkpoint in {folder} is whole: {'; '.join(damage)}; restore one, or begin anew "
            "in another folder"
        )
    return found


def first_whole(folders: Iterable[Path], *, otherwise: str) -> Checkpoint | None:
    """The first of some checkpoints that is not damaged; what is passed over is told.

    Args:
        folders: of checkpoints.
        otherwise: what is done where all are damaged, in words.
    """
    found, damage = _first_whole(folders)
    for what in [] if found else damage:
        _LOG.warning("%s: %s", what, otherwise)
    return found


def _first_whole(folders: Iterable[Path]) -> tuple[Checkpoint | None, list[str]]:
    """As :func:`first_whole`, with what is told if there is one: what is damaged before it."""
    damage: list[str] = []
    for folder in folders:
        try:
            found = open_checkpoint(folder)
        except DamagedError as error:
            damage.append(error.what)
            continue
        for what in damage:
            _LOG.warning("%s: taking %s", what, folder)
        return found, damage
    return None, damage


def _pointed(folder: Path) -> str | None:
    """What ``latest`` says; None where there is none, or, which is said, it cannot be read."""
    path = folder / "latest"
    try:
        return read_bytes(path).strip().decode("utf-8", "replace")
    except FileNotFoundError as error:
        if not path.is_symlink():
            return None
        reason = reason_of(error)
    except OSError as error:
        reason = reason_of(error)
    _LOG.warning("%s cannot be read (%s); the newest checkpoint is taken", path, reason)
    return None


def recipe_of_run(folder: Path) -> Recipe | None:
    """The recipe that the run in a directory was trained with; None before its first checkpoint.

    Where ``recipe.json`` is gone or damaged it is that of the newest checkpoint, and that is said.

    Raises:
        InputError: if no recipe can be read.
    """
    if not checkpoint_folders(folder / "checkpoints"):
        return None
    path = folder / "recipe.json"
    try:
        return load_recipe(path)
    except InputError as error:
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is None or "recipe" not in newest.state:
            raise
        _LOG.warning("%s: taking the recipe of %s", error, newest.folder)
        return newest.recipe()


def run_directory(path: Path) -> Path:
    """The run directory of what :func:`find_checkpoint` takes, without opening a checkpoint."""
    path = _named(path)
    if (path / "state.json").exists() or path.name == BEST:
        return path.parent.parent
    return path.parent if path.name == "checkpoints" else path


def _named(path: Path) -> Path:
    """The same path with a name of its own, which ``.`` and ``..`` have not."""
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))  # noqa: PTH100


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint a user means by a run directory, its ``checkpoints`` or one step's folder.

    ``checkpoints/best.json`` stands for the best one. It is read whole, to see that it is.

    Raises:
        InputError: if there is none.
    """
    path = _named(path)
    if path.name == BEST and path.is_file():
        path = path.parent / read_best(path.parent).get("checkpoint", BEST)
    if (path / "state.json").exists():
        return open_checkpoint(path)
    for folder in (path / "checkpoints", path):
        checkpoint = newest_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is not None:
            return checkpoint
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run directory or one of its checkpoints")
    raise InputError(
        f"there is no checkpoint in {path}; give a run directory or a folder checkpoints/step_..."
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, with the presence, size and checksum of every file verified.

    Raises:
        DamagedError: naming the file that is missing, truncated or altered.
    """
    try:
        state = parse_json(read_bytes(folder / "state.json"))
        files = state["files"]
        refuse_strange(state, files)
    except FileNotFoundError:
        raise DamagedError(
            f"{folder / 'state.json'} is not there, which is written last, so that this is no "
            "whole checkpoint"
        ) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else reason_of(error)
        raise DamagedError(f"{folder / 'state.json'} is damaged ({reason})") from None
    if state.get("format") != FORMAT:
        raise DamagedError(
            f"{folder / 'state.json'} is of checkpoint format {state.get('format')}, this version "
            f"reads {FORMAT}"
        )
    try:
        if "manifest" in state or (folder / MANIFEST).exists():
            check_manifest(folder, files=["state.json", *(file["name"] for file in files)])
        else:  # of an earlier version
            _check_files(folder, files)
    except OSError as error:
        where = error.filename or folder
        raise DamagedError(f"{where} cannot be read ({reason_of(error)})") from None
    return Checkpoint(folder, state)


def _check_files(folder: Path, files: list[dict[str, Any]]) -> None:
    """Compare the files of a checkpoint with what its ``state.json`` says of them."""
    for file in files:
        path = folder / file["name"]
        check_size(path, file["bytes"])
        if file_checksum(path) != file["crc32"]:
            raise DamagedError(f"{path} {ALTERED}")
