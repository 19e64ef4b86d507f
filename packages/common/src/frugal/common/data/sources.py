"""From what a user calls data to shards: patterns, folders, lists; and their indexes."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from frugal.common.data.folders import class_folders, image_files, open_csv, open_image_folder
from frugal.common.data.index import ShardIndex, find_index, read_summary, write_index
from frugal.common.data.records import RecordShard, index_records
from frugal.common.data.samples import Fields, Shard
from frugal.common.data.tars import TarShard, index_tar
from frugal.common.errors import InputError
from frugal.common.launchers import launcher_ranks

_STREAM = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_RECORDS = (".tfrecord", ".tfrecords")
_LISTS = (".csv", ".tsv")
_SPLITS = ("train", "val", "validation", "test")
_INDEXED: dict[str, Callable[[Path], ShardIndex]] = {
    ".tar": index_tar,
    **dict.fromkeys(_RECORDS, index_records),
}
_KINDS = "tars, TFRecords, CSV files, or folders of one of these or of class folders with images"


def is_stream(pattern: str) -> bool:
    """Whether a pattern names something that can only be read from its beginning on."""
    return _STREAM.match(pattern) is not None


def expand_braces(pattern: str) -> list[str]:
    """Every string that ``{00000..41407}`` and ``{a,b}`` in a pattern stand for.

    Raises:
        InputError: if a brace is not closed.
    """
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise InputError(
            f"the data pattern {pattern!r} has an unbalanced brace; write {{00000..00010}}"
        ) from None


def find_files(
    pattern: str, *, fields: Fields | None = None, without_classes: bool = False
) -> list[Path]:
    """The shards, lists or class folders that a pattern stands for, in order.

    A pattern is a path, a path with braces as in webdataset, a glob, or a folder.

    Args:
        pattern: what a user calls data.
        fields: which files of a folder are images.
        without_classes: take a folder of images that has no class folders too.

    Raises:
        InputError: if there is nothing, or something of no known kind.
    """
    places = expand_braces(pattern)
    missing = [place for place in places if not _is_glob(place) and not Path(place).exists()]
    if missing:
        of_many = f" ({len(missing)} of {len(places)} are missing)" if len(places) > 1 else ""
        raise InputError(
            f"the data pattern {pattern!r} names {missing[0]}, which does not exist{of_many}; "
            "check the path"
        )
    files: list[Path] = []
    for place in places:
        paths = [Path(place)]
        if _is_glob(place):
            paths = [Path(found) for found in sorted(glob.glob(place))]  # noqa: PTH207
        for path in paths:
            if path.is_dir():
                extensions = (fields or Fields()).image
                files += _files_of_folder(path, extensions, without_classes=without_classes)
            else:
                files.append(_known(path))
    if not files:
        raise InputError(f"the data pattern {pattern!r} matches nothing; check the path")
    return files


def find_streams(pattern: str) -> list[str]:
    """The tars that a pattern stands for, as URLs and paths that can be read as streams.

    Raises:
        InputError: if there is none.
    """
    if is_stream(pattern):
        return expand_braces(pattern)
    files = find_files(pattern)
    other = next((path for path in files if path.suffix != ".tar"), None)
    if other is not None:
        raise InputError(
            f"{other} is no tar, and data.resampled_samples reads tars only; leave it out"
        )
    return [str(path) for path in files]


def _is_glob(place: str) -> bool:
    return glob.has_magic(place) and not Path(place).exists()


def _known(path: Path) -> Path:
    if path.suffix not in (*_INDEXED, *_LISTS):
        raise InputError(
            f"{path} is of no known kind; data may be {_KINDS} (compressed shards must be unpacked)"
        )
    return path


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Sorts 2.tar before 10.tar."""
    return [(int(digits or -1), text) for text, digits in re.findall(r"(\D*)(\d*)", path.name)]


def _is_data_set(folder: Path) -> bool:
    """Whether a sub-folder is a split or a set of shards rather than a class."""
    return folder.name in _SPLITS or any(path.suffix in _INDEXED for path in folder.iterdir())


def _files_of_folder(
    folder: Path, extensions: tuple[str, ...], *, without_classes: bool
) -> list[Path]:
    for suffixes in ((".tar",), _RECORDS):
        shards = [path for path in folder.iterdir() if path.suffix in suffixes]
        if shards:
            return sorted(shards, key=_by_numbers)
    below = class_folders(folder)
    if split := next((name for name in below if _is_data_set(folder / name)), None):
        raise InputError(f"{folder} holds several data sets; give one of them, such as {split}")
    if any(image_files(folder / name, extensions) for name in below):
        return [folder]
    if image_files(folder, extensions):
        if without_classes:
            return [folder]
        raise InputError(
            f"the folder {folder} holds images but no class folders; put the images of every class "
            "into a folder of their own"
        )
    raise InputError(f"the folder {folder} holds no data; it may hold {_KINDS}")


def needs_index(path: Path) -> bool:
    """Whether samples of this file are found by a side-car index."""
    return path.suffix in _INDEXED


def build_index(path: Path) -> Path:
    """Index a shard; where the index was written.

    Raises:
        InputError: if the shard cannot be read, or the index not be written.
    """
    return write_index(path, _INDEXED[path.suffix](path))


def index_missing(paths: Sequence[Path], log: logging.Logger) -> None:
    """Index every shard that is not indexed yet.

    Where ``torch.distributed`` runs, its processes share the work, and all of them must call this.

    Raises:
        InputError: if a shard cannot be read, or its index not be written.
    """
    missing = [path for path in paths if needs_index(path) and find_index(path) is None]
    if missing:
        log.info(
            "indexing %d shards; for large sets run `python -m frugal.common.shards index` first",
            len(missing),
        )
    rank, world_size, local_rank = _processes()
    _wait(world_size)  # until all have looked: every process divides the same list
    for path in missing[rank::world_size]:
        build_index(path)
    _wait(world_size)
    # other machines may have written where this one cannot see it
    for path in missing if local_rank == 0 else ():
        if find_index(path) is None:
            build_index(path)
    _wait(world_size)


def _processes() -> tuple[int, int, int]:
    # imported here: the command line of frugal.common.shards answers without torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1, 0
    return dist.get_rank(), dist.get_world_size(), launcher_ranks().local_rank


def _wait(world_size: int) -> None:
    if world_size > 1:
        import torch.distributed as dist

        dist.barrier()


@dataclass(frozen=True)
class Source:
    """What one pattern stands for."""

    shards: list[Shard]
    notes: list[str]
    """What is wrong with shards as a whole, one line each."""

    @property
    def counts(self) -> list[int]:
        """Samples of every shard."""
        return [shard.num_samples for shard in self.shards]


def open_source(pattern: str, fields: Fields, files: Sequence[Path] | None = None) -> Source:
    """The shards of a pattern, all of them indexed already where they need an index.

    Raises:
        InputError: if a shard is missing, altered, or not indexed; or there is no sample at all.
    """
    files = find_files(pattern) if files is None else files
    # opening tens of thousands of small files on a network file system is a matter of latency
    with ThreadPoolExecutor(16) as threads:
        opened = list(threads.map(lambda path: open_shard(path, fields), files))
    source = Source(
        shards=[shard for shard, _ in opened],
        notes=[f"{shard.name} is {note}" for shard, note in opened if note],
    )
    if not sum(source.counts):
        raise InputError(f"the data pattern {pattern!r} holds no sample; check the path")
    return source


def open_shard(path: Path, fields: Fields) -> tuple[Shard, str]:
    """What lies at a path that :func:`find_files` found, and what is wrong with it as a whole.

    Raises:
        InputError: if it is not indexed, was altered since, or cannot be read.
    """
    if path.is_dir():
        return open_image_folder(path, fields), ""
    if path.suffix in _LISTS:
        return open_csv(path, fields), ""
    summary = read_summary(path)
    kind = TarShard if path.suffix == ".tar" else RecordShard
    return kind(path, summary.num_samples), summary.note
