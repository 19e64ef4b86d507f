"""From what a user calls data to shards: patterns, folders, lists; and their indexes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from frugal.common.data.image_walk import KNOWN_FILES, has_image, subfolders
from frugal.common.data.index import (
    SUFFIX,
    ShardSummary,
    find_earlier_index,
    find_index,
    load_earlier_index,
    read_summary,
    write_index,
)
from frugal.common.data.passed_over import PassedOver
from frugal.common.data.patterns import expand_braces, matching_paths, natural_key
from frugal.common.data.samples import Fields, Shard
from frugal.common.data.stores.csv import open_list
from frugal.common.data.stores.folder import FileList, Log, open_image_folder, tell_classes
from frugal.common.data.stores.tar import TarShard, index_tar
from frugal.common.data.stores.tfrecord import RecordShard, index_records
from frugal.common.distributed import launcher_ranks
from frugal.common.errors import InputError
from frugal.common.files import is_system_name, reason_of

_STREAM = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_KIND_OF_NAME = {
    "tar": re.compile(r".*\.tar", re.IGNORECASE | re.DOTALL),
    "tfrecord": re.compile(
        r".*\.tfrec(ords?)?(-\d+-of-\d+)?|.*\.tfrec(ords?)?-\d+", re.IGNORECASE | re.DOTALL
    ),
    "list": re.compile(r".*\.[ct]sv", re.IGNORECASE | re.DOTALL),
}
"""What a file holds, by its name; TensorFlow's data sets end in ``.tfrecord-00000-of-00010``."""
_LIKE_SHARDS = re.compile(r"\.(tar|tgz|tfrecords?)(\.|$)", re.IGNORECASE)
"""Shards that were compressed, or whose download was not finished."""
EMPTY = "shards or lists hold no sample"
_SPLITS = ("train", "val", "validation", "test")
_KINDS = "tars, TFRecords, CSV files, or folders of one of these or of class folders with images"


def kind_of(path: Path) -> str | None:
    """What a file holds, by its name: "tar", "tfrecord" or "list"; None if it is none of them."""
    name = path.name
    return next((kind for kind, form in _KIND_OF_NAME.items() if form.fullmatch(name)), None)


def is_stream(pattern: str) -> bool:
    """Whether a pattern names something that can only be read from its beginning on."""
    return _STREAM.match(pattern) is not None


def find_files(
    pattern: str,
    *,
    fields: Fields | None = None,
    without_classes: bool = False,
    passed_over: PassedOver | None = None,
) -> list[Path]:
    """The shards, lists or class folders that a pattern stands for, in order.

    A pattern is a path, a path with braces as in webdataset, a glob, or a folder. Shards of a glob
    or a folder come in natural order: 2.tar before 10.tar.

    Args:
        pattern: what a user calls data.
        fields: which files of a folder are images.
        without_classes: take a folder of images that has no class folders too.
        passed_over: counts what lies beside the shards of a folder.

    Raises:
        InputError: if there is nothing, something of no known kind, or a folder of two kinds.
    """
    files: list[Path] = []
    for path in matching_paths(pattern):
        if path.is_dir():
            extensions = (fields or Fields()).image
            files += _files_of_folder(path, extensions, without_classes, passed_over)
        elif path.name.endswith(SUFFIX):
            continue  # the index of a shard that a glob matches too
        else:
            files.append(_known(path))
    if not files:
        raise InputError(f"the data pattern {pattern!r} matches nothing; check the path")
    return files


def find_streams(pattern: str, passed_over: PassedOver | None = None) -> list[str]:
    """The tars that a pattern stands for, as URLs and paths that can be read as streams.

    Args:
        pattern: what a user calls data.
        passed_over: counts what lies beside the tars of a folder.

    Raises:
        InputError: if there is none.
    """
    if is_stream(pattern):
        return expand_braces(pattern)
    files = find_files(pattern, passed_over=passed_over)
    other = next((path for path in files if kind_of(path) != "tar"), None)
    if other is not None:
        raise InputError(
            f"{other} is no tar, and data.resampled_samples reads tars only; leave it out"
        )
    return [str(path) for path in files]


def _known(path: Path) -> Path:
    if kind_of(path) is None:
        raise InputError(
            f"{path} is of no known kind; data may be {_KINDS} (compressed shards must be unpacked)"
        )
    return path


def _find_data_set(folder: Path, below: list[str], extensions: tuple[str, ...]) -> str | None:
    """A sub-folder that is a split or a set of shards rather than a class; None if none is.

    CIFAR-100 and COCO have a class "train": beside other classes it holds images and no folders.
    """
    others = [name for name in below if name.lower() not in _SPLITS]
    for name in below:
        if any(map(_is_shard, _inside(folder / name))):
            return name
        if name in others:
            continue
        is_flat = not subfolders(folder / name)
        if not is_flat or not any(has_image(folder / other, extensions) for other in others):
            return name
    return None


def _inside(folder: Path) -> list[Path]:
    """What a folder holds, in order.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be read ({reason_of(error)}); make it readable, or move "
            "it away"
        ) from None


def _is_shard(path: Path) -> bool:
    return needs_index(path) and not is_system_name(path.name)


def _files_of_folder(
    folder: Path,
    extensions: tuple[str, ...],
    without_classes: bool,
    passed_over: PassedOver | None,
) -> list[Path]:
    below = subfolders(folder)
    files = sorted(
        (path for path in _inside(folder) if path.is_file() and not is_system_name(path.name)),
        key=lambda path: natural_key(path.name),
    )
    kinds = {
        "tars": [path for path in files if kind_of(path) == "tar"],
        "TFRecords": [path for path in files if kind_of(path) == "tfrecord"],
    }
    shards = {kind: paths for kind, paths in kinds.items() if paths}
    if len(shards) > 1:
        _refuse_two_kinds(folder, shards)
    for kind, paths in shards.items():
        _refuse_class_folders_beside(folder, kind, paths, below, extensions)
        _pass_over(folder, kind, paths, passed_over)
        return paths
    if split := _find_data_set(folder, below, extensions):
        raise InputError(
            f"{folder} holds data sets in folders of their own; give one of them, such as {split}"
        )
    if any(has_image(folder / name, extensions) for name in below):
        return [folder]
    if has_image(folder, extensions):
        if without_classes:
            return [folder]
        raise InputError(
            f"the folder {folder} holds images but no class folders; put the images of every class "
            "into a folder of their own"
        )
    if lists := [path for path in files if kind_of(path) == "list"]:
        return lists
    raise InputError(f"the folder {folder} holds no data; it may hold {_KINDS}")


def _refuse_two_kinds(folder: Path, kinds: dict[str, list[Path]]) -> None:
    named = " and ".join(f"{kind} ({paths[0].name})" for kind, paths in kinds.items())
    ways = " or ".join(f"'{folder}/*{paths[0].suffix}'" for paths in kinds.values())
    raise InputError(
        f"{folder} holds data of two kinds, {named}; choose one with {ways}, or move the other out "
        "of the folder"
    )


def _refuse_class_folders_beside(
    folder: Path, kind: str, shards: list[Path], below: list[str], extensions: tuple[str, ...]
) -> None:
    """Refuse shards beside class folders, of which only one could be read."""
    found = next((name for name in below if has_image(folder / name, extensions)), None)
    if found is not None:
        raise InputError(
            f"{folder} holds data of two kinds, {kind} ({shards[0].name}) and folders of images "
            f"({found}); move one kind out of the folder, or name the {kind} with "
            f"'{folder}/*{shards[0].suffix}'"
        )


def _pass_over(folder: Path, kind: str, shards: list[Path], passed_over: PassedOver | None) -> None:
    """Count what else lies in a folder of shards, and is no file that belongs to one of them."""
    if passed_over is None:
        return
    own = {path.stem for path in shards}
    for path in _inside(folder):
        if path.is_dir():
            if any(map(_is_shard, _inside(path))):
                passed_over.add(f"folders with shards beside {kind}", str(path))
            elif needs_index(path):
                passed_over.add("folders that are called as shards", str(path))
        elif is_system_name(path.name):
            if needs_index(path):
                passed_over.add("hidden files", str(path))
        elif path in shards or path.name.endswith(SUFFIX) or path.name in KNOWN_FILES:
            continue
        elif not any(path.name.startswith(f"{stem}{mark}") for stem in own for mark in "._") or (
            _LIKE_SHARDS.search(path.name)
        ):
            passed_over.add(f"files that are no {kind} ({path.suffix or 'no ending'})", str(path))


def needs_index(path: Path) -> bool:
    """Whether samples of this file are found by a side-car index."""
    return kind_of(path) in ("tar", "tfrecord")


def build_index(path: Path, *, rebuild: bool = False) -> Path:
    """Index a shard; where the index was written.

    Args:
        path: the shard.
        rebuild: believe nothing of an index that an earlier version wrote. Otherwise of a tar only
            the headers are read again where there is one; of TFRecords everything, since earlier
            versions did not compare their checksums.

    Raises:
        InputError: if the shard cannot be read, or the index not be written.
    """
    if kind_of(path) == "tfrecord":
        return write_index(path, index_records(path))
    return write_index(path, index_tar(path, None if rebuild else load_earlier_index(path)))


def index_missing(paths: Sequence[Path], log: Log) -> None:
    """Index every shard that is not indexed yet.

    Where ``torch.distributed`` runs, its processes share the work, and all of them must call this.

    Raises:
        InputError: if a shard cannot be read, or its index not be written.
    """
    wanted = [path for path in paths if needs_index(path)]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(find_index, wanted))
        missing = [path for path, place in zip(wanted, found, strict=True) if place is None]
        earlier = list(threads.map(find_earlier_index, missing))
    if missing:
        renewed = sum(place is not None for place in earlier)
        log.info(
            "indexing %d shards%s; for large sets run `python -m frugal.common.shards index` first",
            len(missing),
            f" ({renewed} of them have an index of an earlier version, which is renewed)"
            if renewed
            else "",
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
    digests: list[str] = field(default_factory=list)
    """What tells the samples of a shard from others; empty for lists and folders."""
    behind: list[str] = field(default_factory=list)
    """What lies behind the end of shards, one line each."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    """What belongs to no sample."""
    remarks: PassedOver = field(default_factory=PassedOver)
    """What was done to samples that are not laid out as usual."""

    @property
    def counts(self) -> list[int]:
        """Samples of every shard."""
        return [shard.num_samples for shard in self.shards]

    def tell(self, log: Log) -> None:
        """Say once what is odd, and what is left out."""
        for note in self.notes:
            log.warning("%s; what is missing there is lost", note)
        for line in [*self.behind, *self.remarks.lines(""), *self.passed_over.lines()]:
            log.warning("%s", line)
        for listed in self.lists:
            tell_classes(listed, log)
            if listed.counted:
                log.info("%s: %s", listed.name, listed.counted)
            for line in listed.told():
                log.warning("%s", line)

    @property
    def lists(self) -> list[FileList]:
        """The lists and class folders among the shards."""
        return [shard for shard in self.shards if isinstance(shard, FileList)]


def open_source(pattern: str, fields: Fields, files: Sequence[Path] | None = None) -> Source:
    """The shards of a pattern, all of them indexed already where they need an index.

    Raises:
        InputError: if a shard is missing, altered, or not indexed; or there is no sample at all.
    """
    files = find_files(pattern) if files is None else files
    # opening tens of thousands of small files on a network file system is a matter of latency
    with ThreadPoolExecutor(16) as threads:
        opened = list(threads.map(lambda path: open_shard(path, fields), files))
    source = Source(shards=[shard for shard, _ in opened], notes=[])
    for shard, summary in opened:
        if summary.note:
            source.notes.append(f"{shard.name} is {summary.note}")
        if summary.behind:
            source.behind.append(f"{shard.name}: {summary.behind}")
        if not summary.num_samples:
            source.remarks.add(EMPTY, shard.name)
        source.digests.append(summary.digest)
        source.passed_over.update(summary.passed_over)
        source.remarks.update(summary.remarks)
    if not sum(source.counts):
        lines = source.passed_over.lines()
        found = f" ({'; '.join(lines)})" if lines else ""
        raise InputError(f"the data pattern {pattern!r} holds no sample{found}; check the path")
    return source


def open_shard(path: Path, fields: Fields) -> tuple[Shard, ShardSummary]:
    """What lies at a path that :func:`find_files` found, and what was found when it was indexed.

    Raises:
        InputError: if it is not indexed, was altered since, or cannot be read.
    """
    if path.is_dir() or kind_of(path) == "list":
        files = open_image_folder(path, fields) if path.is_dir() else open_list(path, fields)
        return files, ShardSummary(files.num_samples, "")
    summary = read_summary(path)
    if kind_of(path) == "tar":
        return TarShard(path, summary.num_samples), summary
    return RecordShard(path, summary.num_samples), summary
