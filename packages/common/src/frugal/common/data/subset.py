"""Training on some of the samples of a data set: a list of them, or the first ones.

A list has one sample per line, as the log and ``frugal.clipa.prune_pairs`` name them:
``00012.tar/000120034``, the shard from the folder on that all shards of an entry of ``data.train``
lie in (or its whole path), and the key of the sample. Of folders and CSV files the key is the path
of the image as it stands there: ``classes/cats/1.jpg``, ``pairs.csv/images/1.jpg``. A line that
stands there twice is a sample that an epoch has twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from frugal.common.data.contents import below_common_folder
from frugal.common.data.order import Order
from frugal.common.data.samples import Fields, Shard
from frugal.common.data.sources import Source
from frugal.common.data.stores.folder import FileList
from frugal.common.errors import InputError
from frugal.common.files import read_lines

_SHOWN = 3
"""Lines that a sentence names."""


class SubsetOrder:
    """An order of some samples, located among all samples of their shards."""

    def __init__(self, order: Order, indices: Sequence[np.ndarray]) -> None:
        """Look up what another order locates.

        Args:
            order: of as many samples of every shard.
            indices: of every shard, (n,) int64: the samples that are read.
        """
        self._order = order
        self._chosen = np.concatenate(indices) if indices else np.zeros(0, np.int64)
        self._first = np.cumsum([0, *(len(each) for each in indices)])

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self._order.samples

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers (n,): their shards (n,) and their indices within them (n,)."""
        shards, places = self._order.locate(numbers)
        return shards, self._chosen[self._first[shards] + places]


def first_of(counts: Iterable[int], most: int) -> list[np.ndarray]:
    """The places of the first ``most`` samples of shards with so many: of every shard, (n,) int64.

    No more are made: a trial on a large set is to cost little.
    """
    kept, left = [], most
    for count in counts:
        kept.append(np.arange(min(count, left)))
        left -= len(kept[-1])
    return kept


def key_within(shard: Shard, key: str) -> str:
    """What stands behind the name of a shard in a list, of the key that its reader gives."""
    return key.removeprefix(f"{shard.base if isinstance(shard, FileList) else shard.name}/")


def read_subset(path: Path, sources: Sequence[Source], fields: Fields) -> list[np.ndarray]:
    """The samples that a list names, shard by shard.

    Args:
        path: the list.
        sources: of the entries of ``data.train``.
        fields: what is read of a sample.

    Returns:
        Of every shard of every source, in order, (n,) int64.

    Raises:
        InputError: if the list cannot be read or is empty, or names a sample that is not there or
            that is there twice.
    """
    lines = [line for line in read_lines(path) if line]
    if not lines:
        raise InputError(f"data.subset {path} names no sample; write it anew, or leave it out")
    shards = [shard for source in sources for shard in source.shards]
    wanted = _by_shard(lines, _names(sources))
    kept: list[np.ndarray] = []
    found = 0
    for number, shard in enumerate(shards):
        asked = wanted.pop(number, [])
        kept.append(_indices(shard, asked, fields, path))
        found += len(asked)
    if missing := wanted.pop(-1, []):
        raise _not_there(path, [lines[place] for place, _ in missing], len(lines))
    assert found == len(lines)
    return kept


def _names(sources: Sequence[Source]) -> dict[str, int]:
    """The number of every shard by the names that it may have in a list.

    A short name that two shards have is none of either.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    first = 0
    for source in sources:
        whole = [shard.name for shard in source.shards]
        for place, (short, shard) in enumerate(
            zip(below_common_folder(whole), source.shards, strict=True), start=first
        ):
            own = (str(shard.base),) if isinstance(shard, FileList) else ()
            for name in (short, shard.name, *own):
                numbers[name].add(place)
        first += len(whole)
    return {name: found.pop() for name, found in numbers.items() if len(found) == 1}


def _by_shard(lines: Sequence[str], names: dict[str, int]) -> dict[int, list[tuple[int, str]]]:
    """Place in the list and key of the samples of every shard; -1 has those of none."""
    found: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for place, line in enumerate(lines):
        number, key = next(
            ((names[head], tail) for head, tail in _splits(line) if head in names), (-1, line)
        )
        found[number].append((place, key))
    return found


def _splits(line: str) -> Iterator[tuple[str, str]]:
    """A line cut at each of its slashes, the last one first."""
    end = len(line)
    while (end := line.rfind("/", 0, end)) > 0:
        yield line[:end], line[end + 1 :]


def _indices(
    shard: Shard, asked: Sequence[tuple[int, str]], fields: Fields, path: Path
) -> np.ndarray:
    """The numbers of the samples of a shard that are asked for by their keys."""
    if not asked:
        return np.zeros(0, np.int64)
    reader = shard.open(fields)
    numbers: dict[str, int] = {}
    twice: set[str] = set()
    for number in range(shard.num_samples):
        key = key_within(shard, reader.key(number))
        if numbers.setdefault(key, number) != number:
            twice.add(key)
    reader.close()
    keys = [key for _, key in asked]
    if missing := [f"{shard.name}/{key}" for key in keys if key not in numbers]:
        raise _not_there(path, missing, len(keys))
    if unclear := next((key for key in keys if key in twice), None):
        raise InputError(
            f"data.subset {path} names {unclear}, of which {shard.name} has several; a list can "
            "only name samples by keys of their own"
        )
    return np.array([numbers[key] for key in keys], np.int64)


def _not_there(path: Path, missing: Sequence[str], of: int) -> InputError:
    shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    return InputError(
        f"data.subset {path} names {len(missing):,} of {of:,} samples that data.train does not "
        f"have ({shown}); a line is a shard, a slash and the key of a sample, as in "
        "00012.tar/000120034; of a folder of images or a CSV file its name and the path in it, as "
        "in folder/cats/1.jpg or pairs.csv/images/1.jpg; of TFRecords the number of the record "
        "from 0, as in 00000.tfrecord/16"
    )
