"""What a run is trained on, shard by shard: kept in its directory, and compared.

Processes of a run compare it with one another, and a run that goes on with what it began with.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from frugal.common.contracts import Part
from frugal.common.data.damage import shortened
from frugal.common.data.samples import StringTable
from frugal.common.data.sources import Source
from frugal.common.data.stores.folder import FileList
from frugal.common.data.stores.index import count_altered
from frugal.common.distributed import gather_objects, place_in_world, require_same
from frugal.common.errors import InputError
from frugal.common.files import read_json_object, write_json
from frugal.common.run import Run

FILE = "data.json"
_SIZES = 1_000
"""Images of a list or folder whose sizes are compared."""
_READ_AGAIN = 16 << 30
"""Bytes of shards at most that are read again because they were touched, before a run goes on."""

Contents = Sequence[Sequence[Part]]
"""The parts of every entry of ``data.train``, in order."""


def contents_of(sources: Iterable[Source]) -> Contents:
    """The shards of sources with their samples; of folders of images, the class folders."""
    return [_parts_of(source) for source in sources]


def _parts_of(source: Source) -> list[Part]:
    names = below_common_folder([shard.name for shard in source.shards])
    parts: list[Part] = []
    listed = zip(names, source.shards, source.digests, source.stamps, strict=True)
    for name, shard, digest, stamp in listed:
        if isinstance(shard, FileList):
            parts += _parts_of_list(name, shard)
        else:
            parts.append(Part(name, shard.num_samples, digest, stamp, shard.name))
    return parts


def _parts_of_list(name: str, files: FileList) -> list[Part]:
    """A list as it is, or the class folders of a folder."""
    if files.labels is None or not files.class_folders:
        is_folder = Path(files.name).is_dir()
        digest, stamp = digest_of(files.files, files.texts), _sizes(files, 0, len(files.files))
        return [Part("." if is_folder else name, files.num_samples, digest, stamp)]
    ends = np.searchsorted(files.labels, np.arange(len(files.class_folders)), side="right").tolist()
    starts = [0, *ends[:-1]]
    return [
        Part(
            f"{folder}/",
            end - start,
            digest_of(_rows(files.files, start, end)),
            _sizes(files, start, end),
        )
        for folder, start, end in zip(files.class_folders, starts, ends, strict=True)
    ]


def _sizes(files: FileList, start: int, end: int) -> str:
    """Of the files of a class folder, in proportion to its part of the list."""
    most = max(1, _SIZES * (end - start) // max(1, len(files.files)))
    return digest_of_sizes(
        (lambda place: Path(files.base, files.files[place])), start, end, most=most
    )


def digest_of_sizes(
    path_of: Callable[[int], Path], start: int, end: int, *, most: int = _SIZES
) -> str:
    """A digest of the sizes of some files, evenly spread: all of them would take long.

    Args:
        path_of: where a file lies, by its number.
        start: the first number.
        end: behind the last one.
        most: files that are looked at.
    """
    step = max(1, -(-(end - start) // most))
    found = hashlib.blake2b(digest_size=8)
    for place in range(start, end, step):
        try:
            size = path_of(place).stat().st_size
        except (OSError, ValueError):  # the latter for a NUL in its name
            size = -1
        found.update(f"{size} ".encode())
    return found.hexdigest()


def shard_digests(source: Source) -> list[str]:
    """What tells the samples of every shard of a source from others, lists and folders included."""
    found = []
    for shard, digest in zip(source.shards, source.digests, strict=True):
        if isinstance(shard, FileList):  # which has no index that would tell
            parts = [(part.digest, part.stamp) for part in _parts_of_list("", shard)]
            digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        found.append(digest)
    return found


def _rows(table: StringTable, start: int, end: int) -> StringTable:
    first = int(table.ends[start - 1]) if start else 0
    last = int(table.ends[end - 1]) if end else 0
    return StringTable(table.blob[first:last], table.ends[start:end] - first)


def digest_of(*tables: StringTable) -> str:
    """What tells some strings from others."""
    found = hashlib.blake2b(digest_size=8)
    for table in tables:
        found.update(table.blob.tobytes())
        found.update(table.ends.tobytes())
    return found.hexdigest()


def streamed_contents(urls: Iterable[Sequence[str]]) -> Contents:
    """The shards of every entry of ``data.train`` that are known by their names alone."""
    return [[Part(name, None, "") for name in below_common_folder(of_entry)] for of_entry in urls]


def below_common_folder(names: Sequence[str]) -> list[str]:
    """Paths or URLs without the folder that all of them lie in."""
    folders = [name[: name.rfind("/") + 1] for name in names]
    first, last = min(folders, default=""), max(folders, default="")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = first[: len(list(alike))]
    return [name[shared.rfind("/") + 1 :] for name in names]


@dataclass(frozen=True)
class _Kept:
    """What the file of a run says of its data."""

    contents: Contents
    also: Mapping[str, str]
    """Digests of what else decides about samples."""


def check_contents(
    run: Run,
    contents: Contents,
    *,
    told: Mapping[str, Any] | None,
    allowed: bool,
    also: Mapping[str, str] | None = None,
    changes: Sequence[str] = (),
) -> list[str]:
    """Refuse to go on with something else than a run was trained on.

    Every process of a run must call this.

    Args:
        run: whose directory says what it was trained on.
        contents: what there is now.
        told: what the checkpoint says that the run goes on from, for where the directory is silent.
        allowed: go on nevertheless, and say what has changed.
        also: digests of what else decides about samples, by what it is called; asked of the first
            process alone.
        changes: what is known to have changed besides, one phrase each; of the first process.

    Returns:
        What has changed and was allowed, one phrase each.

    Raises:
        InputError: if something was added, removed, renamed, replaced or put in another order
            since the run began, and that is not allowed.
    """
    before = _before(run.dir, told, run.log)
    # as the first process sees it, and after all have looked: it writes the file before long
    if gather_objects(before is None)[0]:
        run.log.info("%s does not say what it was trained on; it is noted from now on", run.dir)
        before = None
    before = before or _Kept(contents, {})
    found = _differences(before.contents, contents)
    # files are read again by one process, while the others wait
    more = [*_touched(before.contents, contents, run), *changes] if run.is_main else []
    more += changed_besides(before.also, also or {})
    found += gather_objects(more)[0]
    if found and not allowed:
        raise InputError(
            f"the data of the run in {run.dir} have changed since it began ("
            f"{'; '.join(found)}); restore them, choose another --run.dir, or go on with what "
            "there is now with --run.allow-changed-data: samples then come in another order, "
            "some of them again"
        )
    if found:
        run.log.warning("the data have changed since the run began: %s", "; ".join(found))
    return found


def note_contents(run: Run, contents: Contents, also: Mapping[str, str]) -> None:
    """Note in the directory of a run what it is trained on; the first process calls this.

    Raises:
        InputError: if it cannot be written.
    """
    write_json(run.dir / FILE, noted(contents, also))


def is_known_by_content(run_dir: Path, told: Mapping[str, Any] | None) -> bool:
    """Whether a run noted of all its data what tells them from others wherever they lie.

    Args:
        run_dir: of the run.
        told: as in :func:`check_contents`.
    """
    try:
        before = _before(run_dir, told)
    except InputError:  # told by who compares
        return False
    parts = [part for entry in before.contents for part in entry] if before else []
    return bool(parts) and all(part.digest and part.stamp for part in parts)


def _before(
    run_dir: Path, told: Mapping[str, Any] | None, log: logging.Logger | None = None
) -> _Kept | None:
    """What a run was trained on, as its directory says, or else its checkpoint."""
    path = run_dir / FILE
    if path.is_dir():  # which no file would take the place of
        raise InputError(f"{path} is a folder, where a file belongs; remove it")
    try:
        if path.exists():
            return _read(path)
        problem = f"{path} is not there"
    except InputError as error:
        if told is None:
            raise
        problem = str(error)
    if told is None:
        return None
    if log is not None:
        log.warning("%s: taking what the checkpoint says of the data", problem)
    return _parse(told, path)


def also_noted(run_dir: Path, told: Mapping[str, Any] | None = None) -> Mapping[str, str]:
    """Digests of what else decides about a run, by what it is called, as the run noted them."""
    before = _before(run_dir, told)
    return before.also if before else {}


def noted(contents: Contents, also: Mapping[str, str]) -> dict[str, Any]:
    """What the file of a run says of its data."""
    return {
        "train": [[[p.name, p.samples, p.digest] for p in parts] for parts in contents],
        "stamps": [[part.stamp for part in parts] for parts in contents],
        "also": dict(also),
    }


def differences_since(
    folder: Path, contents: Contents, run: Run, told: Mapping[str, Any] | None
) -> list[str] | None:
    """What has changed of the data since a run began, one phrase each; None where nothing tells.

    Args:
        folder: the run directory.
        contents: what there is now.
        run: this process; only the first one of a run reads again what was touched.
        told: as in :func:`check_contents`.
    """
    try:
        before = _before(folder, told, run.log)
    except InputError as error:
        run.log.warning("%s", error)
        return None
    if before is None:
        return None
    touched = _touched(before.contents, contents, run) if run.is_main else []
    return [*_differences(before.contents, contents), *touched]


def changed_besides(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What else decides about a run and has another digest than before, one phrase each."""
    return [
        f"what {name} names has changed"
        for name, digest in now.items()
        if before.get(name, digest) != digest
    ]


def _read(path: Path) -> _Kept:
    return _parse(read_json_object(path), path)


def _parse(kept: Mapping[str, Any], path: Path) -> _Kept:
    rows: Any = kept.get("train")
    also: Any = kept.get("also", {})
    try:
        stamps = kept.get("stamps") or [[""] * len(parts) for parts in rows]
        contents = [
            [
                Part(name, samples, digest, stamp)
                for (name, samples, digest), stamp in zip(parts, stamps_of_entry, strict=True)
            ]
            for parts, stamps_of_entry in zip(rows, stamps, strict=True)
        ]
        if not all(_is_part(part) for parts in contents for part in parts):
            raise ValueError
        if not all(isinstance(each, str) for each in also.values()):
            raise ValueError
        return _Kept(contents, dict(also))
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"{path} does not say what the run was trained on; remove it to go on without it"
        ) from None


def _is_part(part: Part) -> bool:
    """Whether what was read of a file is of the kinds that were written."""
    is_count = part.samples is None or type(part.samples) is int
    return is_count and all(isinstance(each, str) for each in (part.name, part.digest, part.stamp))


def _touched(before: Contents, now: Contents, run: Run) -> list[str]:
    """What has changed in files that are called and indexed as before, one phrase each."""
    stamps = {
        (entry, part): part.stamp
        for entry, parts in enumerate(before)
        for part in parts
        if part.stamp
    }
    touched = [
        part
        for entry, parts in enumerate(now)
        for part in parts
        if part.stamp and stamps.get((entry, part), part.stamp) != part.stamp
    ]
    images = [f"{part.name} holds other images" for part in touched if not part.path]
    shards = [part for part in touched if part.path]
    size = sum(Path(part.path).stat().st_size for part in shards)
    if size > _READ_AGAIN:
        run.log.info(
            "%d shards (%.0f GiB) were copied or touched since the run began: too much to be read "
            "again now; a sample that is not the one that was indexed is left out when it comes",
            len(shards),
            size / 2**30,
        )
        return images
    if shards:
        run.log.info("reading %d shards again, which were touched since the run began", len(shards))
    altered = {part.name: count_altered(Path(part.path)) for part in shards}
    found = [f"{name} has {count} altered samples" for name, count in altered.items() if count]
    return [f"{len(names)} changed ({shortened(names, 3)})" for names in (found, images) if names]


def _differences(before: Contents, now: Contents) -> list[str]:
    """What has changed, one phrase each."""
    if len(before) != len(now):
        return [f"data.train had {len(before)} entries and has {len(now)}"]
    return [
        phrase
        for entry, (old, new) in enumerate(zip(before, now, strict=True))
        for phrase in _differences_of_entry(f"data.train[{entry}]: ", old, new)
    ]


def _differences_of_entry(entry: str, before: Sequence[Part], now: Sequence[Part]) -> list[str]:
    if list(before) == list(now):
        return []
    old, new = {part.name: part for part in before}, {part.name: part for part in now}
    gone = [part for part in before if part.name not in new]
    added = [part for part in now if part.name not in old]
    by_digest = {part.digest: part for part in added if part.digest}
    renamed = [(part, by_digest[part.digest]) for part in gone if part.digest in by_digest]
    moved = {part for pair in renamed for part in pair}
    phrases = [
        ("renamed", [f"{a.name} is now {b.name}" for a, b in renamed]),
        ("gone", [part.name for part in gone if part not in moved]),
        ("new", [part.name for part in added if part not in moved]),
        ("changed", [_change(old[n], new[n]) for n in old if n in new and old[n] != new[n]]),
    ]
    found = [
        f"{entry}{len(names)} {how} ({shortened(names, 3)})" for how, names in phrases if names
    ]
    return found or [f"{entry}in another order"]


def _change(old: Part, new: Part) -> str:
    if old.samples != new.samples:
        return f"{new.name} had {old.samples} samples and has {new.samples}"
    return f"{new.name} holds other samples"


def check_same_data(contents: Contents) -> None:
    """Refuse to train where a process sees another copy; every process of a run must call this.

    Nothing happens where ``torch.distributed`` does not run.

    Args:
        contents: what this process sees.

    Raises:
        InputError: as :func:`~frugal.common.distributed.require_same`.
    """
    if place_in_world()[1] == 1:
        return
    parts = [part for entry in contents for part in entry]
    digest = hashlib.sha256()
    for part in parts:
        line = f"{part.name}\0{part.samples}\0{part.digest}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    samples = sum(part.samples or 0 for part in parts)
    words = f"{samples:,} samples in {len(parts):,} shards or folders"
    require_same(digest.hexdigest(), "data that data.train names", words=words)
