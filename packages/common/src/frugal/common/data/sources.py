"""From what a user calls data to shards: patterns, folders, lists; and their indexes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from frugal.common.data.damage import PassedOver
from frugal.common.data.patterns import find_files, kind_of, needs_index
from frugal.common.data.samples import Fields, Shard
from frugal.common.data.stores.csv import open_list
from frugal.common.data.stores.folder import FileList, Log, open_image_folder, tell_classes
from frugal.common.data.stores.index import (
    IndexedShard,
    ShardSummary,
    find_earlier_index,
    find_index,
    load_earlier_index,
    read_summary,
    write_index,
)
from frugal.common.data.stores.tar import TarReader, index_tar
from frugal.common.data.stores.tfrecord import RecordReader, index_records
from frugal.common.distributed import Ranks, barrier
from frugal.common.errors import InputError

EMPTY = "shards or lists hold no sample"


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
    indexed = [path for path in paths if needs_index(path)]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(find_index, indexed))
        missing = [path for path, place in zip(indexed, found, strict=True) if place is None]
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
    rank, world_size, local_rank = Ranks.current()
    barrier()  # until all have looked: every process divides the same list
    for path in missing[rank::world_size]:
        build_index(path)
    barrier()
    # other machines may have written where this one cannot see it
    for path in missing if local_rank == 0 else ():
        if find_index(path) is None:
            build_index(path)
    barrier()


@dataclass(frozen=True)
class Source:
    """What one pattern stands for."""

    shards: list[Shard]
    notes: list[str]
    """What is wrong with shards as a whole, one line each."""
    digests: list[str] = field(default_factory=list)
    """What tells the samples of a shard from others; empty for lists and folders."""
    stamps: list[str] = field(default_factory=list)
    """Of every shard as it lies on the disk; empty for lists and folders."""
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
            for line in listed.warnings():
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
        source.stamps.append(summary.stamp)
        source.passed_over.update(summary.passed_over)
        source.remarks.update(summary.remarks)
    if not sum(source.counts):
        lines = source.passed_over.lines()
        found = f" ({'; '.join(lines)})" if lines else ""
        raise InputError(f"the data pattern {pattern!r} holds no sample{found}; check the path")
    return source


def ensure_index(path: Path) -> None:
    """Index a shard that needs an index and has none; raises ``InputError`` if it cannot be."""
    if needs_index(path) and find_index(path) is None:
        build_index(path)


def open_indexed(path: Path, fields: Fields) -> tuple[Shard, ShardSummary]:
    """As :func:`open_shard`, of what may have no index yet; for commands of one process."""
    ensure_index(path)
    return open_shard(path, fields)


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
        return IndexedShard(path, summary.num_samples, TarReader), summary
    return IndexedShard(path, summary.num_samples, RecordReader), summary
