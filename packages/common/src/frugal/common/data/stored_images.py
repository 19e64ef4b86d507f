"""The images of a data set by their place in all its shards, each handed out exactly once."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from frugal.common.data.benchmark_layout import check_number_of_shards
from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.decoding import as_bytes
from frugal.common.data.loader import Loader
from frugal.common.data.patterns import find_files
from frugal.common.data.samples import Fields, RawSample, Reader
from frugal.common.data.sources import index_missing, open_source
from frugal.common.data.stores.folder import FileList
from frugal.common.data.stores.index import load_index
from frugal.common.data.stores.tar import TarReader
from frugal.common.data.stream import ReaderCache
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError

GROUP = 64
"""Images that stay together on one process, so that a model can take the same ones at a time
whatever the number of processes: what it computes depends on them in the last bits."""
IMAGE = 4
"""Integers of the SHA-256 of an image."""
_CONTENT = 2 * IMAGE
"""With those of what is said of it."""
_SAMPLED = 64
"""Images that stand for all others where processes compare their data at once."""


class _Once(logging.LoggerAdapter[logging.Logger]):
    """Says nothing twice: a run opens the data of its evaluations at every one of them."""

    def __init__(self) -> None:
        super().__init__(logging.getLogger("frugal"))
        self._told: set[tuple[object, ...]] = set()

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        """See :meth:`logging.Logger.log`."""
        if (msg, *args) not in self._told:
            self._told.add((msg, *args))
            super().log(level, msg, *args, **options)


_LOG = _Once()


class StoredImages(Dataset[dict[str, Any]]):
    """Samples by their place in all shards; a damaged one is a mistake, because counts matter."""

    def __init__(
        self, folder: Path, fields: Fields, *, size: tuple[int, int], crop: CenterCrop
    ) -> None:
        self.passed_over = PassedOver()
        files = find_files(str(folder), passed_over=self.passed_over)
        check_number_of_shards(folder, files)
        index_missing(files, _LOG)
        self.source = open_source(str(folder), fields, files)
        if self.source.notes:
            raise InputError(
                f"{self.source.notes[0]}, and an evaluation needs every image; copy the shard again"
            )
        self.class_folders = next(iter(self.source.lists), None)
        """The folder of images, where it is one."""
        for line in self.passed_over.lines():
            _LOG.warning("%s: %s", folder, line)
        self.source.tell(_LOG)
        self.passed_over.update(self.source.passed_over)
        if self.class_folders is not None:
            self.passed_over.update(self.class_folders.passed_over)
        self._readers = ReaderCache(self.source.shards, fields)
        self._ends = np.cumsum(self.source.counts)
        self._size = size
        self._crop = crop
        self._contents = torch.zeros(len(self), _CONTENT, dtype=torch.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, place: int) -> tuple[Reader, int]:
        """The reader of the shard that holds an image, and the place within it."""
        shard = int(np.searchsorted(self._ends, place, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return self._readers.reader(shard), place - first

    def __getitem__(self, places: Sequence[int]) -> dict[str, Any]:
        """Images (b, 3, H, W), labels (b,) with -1 for none, places (b,) and contents (b, 8).

        Or a mistake, which loaders pass on whole.
        """
        images: list[np.ndarray] = []
        contents: list[np.ndarray] = []
        labels = np.full(len(places), -1, np.int64)
        for row, place in enumerate(places):
            key = f"image {place}"
            try:
                reader, index = self.locate(place)
                key = reader.key(index)
                raw = reader.read(index)
                images.append(self._crop.gray_levels(raw.image, size=self._size))
                contents.append(_content(raw))
            except (Damaged, InputError) as error:
                return {"mistake": _mistake(key, error)}
            labels[row] = -1 if raw.label is None else raw.label
        return {
            "images": torch.from_numpy(np.stack(images)),
            "labels": torch.from_numpy(labels),
            "places": torch.tensor(places),
            "contents": torch.from_numpy(np.stack(contents)),
        }

    def member(self, place: int, extension: str) -> bytes | None:
        """The bytes of a member of a sample in a tar; None where there is none."""
        reader, index = self.locate(place)
        members = reader.members(index) if isinstance(reader, TarReader) else {}
        if extension not in members:
            return None
        assert isinstance(reader, TarReader)
        return reader.content(members[extension])

    def contents(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """(N, 8) int64: the SHA-256 of every image, and of its label and captions, as stored.

        Of the images of this process; zeros elsewhere. What was handed out is known from then, the
        rest is read now, without decoding it.

        Raises:
            InputError: if a sample is damaged.
        """
        for place in self._part(rank, world_size):
            if not self._contents[place].any():
                self._contents[place] = torch.from_numpy(_content(self._stored(place)))
        return self._contents.clone()

    def listing(self) -> str:
        """SHA-256 of what can be told of the data at once, so that processes can compare it.

        Number, names, labels and checksums of all samples, and what 64 of them hold.
        """
        found = hashlib.sha256(str(len(self)).encode())
        for shard in self.source.shards:
            if isinstance(shard, FileList):
                parts = [shard.files.blob, shard.texts.blob, shard.labels]
            else:
                index = load_index(Path(shard.name))
                parts = [index.names.blob, index.checksums, index.first_member]
            for part in parts:
                found.update(b"none" if part is None else part.tobytes())
        for place in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(int)).tolist():
            try:
                found.update(_content(self._stored(place)).tobytes())
            except InputError:
                found.update(b"damaged")  # refused when it is evaluated
        return found.hexdigest()

    def _stored(self, place: int) -> RawSample:
        """A sample as it is stored.

        Raises:
            InputError: if it is damaged.
        """
        key = f"image {place}"
        try:
            reader, index = self.locate(place)
            key = reader.key(index)
            return reader.read(index)
        except Damaged as damaged:
            raise InputError(_mistake(key, damaged)) from None

    def pictures(self, places: Sequence[int]) -> np.ndarray:
        """(b, 3, H, W) uint8: some of the images as the model sees them, for people."""
        fields = self[places]
        if "mistake" in fields:
            raise InputError(fields["mistake"])
        return as_bytes(fields["images"].numpy())

    def batches(
        self, rank: int, world_size: int, batch_size: int, workers: int
    ) -> Iterator[dict[str, Any]]:
        """This process's contiguous part of the images, in order: whole groups of 64."""
        part = self._part(rank, world_size)
        places = [
            range(start, min(start + batch_size, part.stop))
            for start in range(part.start, part.stop, batch_size)
        ]
        for fields in Loader(self, sampler=places, workers=workers):
            self._contents[fields["places"]] = fields["contents"]
            yield fields

    def _part(self, rank: int, world_size: int) -> range:
        """The places of the images of one process: whole groups of 64."""
        groups = math.ceil(len(self) / GROUP)
        start, stop = (
            min(groups * part // world_size * GROUP, len(self)) for part in (rank, rank + 1)
        )
        return range(start, stop)


def _content(raw: RawSample) -> np.ndarray:
    """(8,) int64: the SHA-256 of an image, then that of its label and captions."""
    texts = repr((raw.label, list(raw.captions))).encode("utf-8", "surrogatepass")
    both = hashlib.sha256(raw.image).digest() + hashlib.sha256(texts).digest()
    return np.frombuffer(bytearray(both), np.int64)


def digest_of(contents: Tensor) -> str:
    """SHA-256 that tells data from any other: its bytes in their order, wherever they lie.

    Args:
        contents: (N, K) int64, those of all processes.
    """
    return hashlib.sha256(contents.numpy().tobytes()).hexdigest()


def num_repeated(contents: Tensor) -> int:
    """Images that are byte for byte as one before them; from (N, 8) contents."""
    return len(contents) - len(contents[:, :IMAGE].unique(dim=0))


def _mistake(key: str, reason: Exception) -> str:
    return f"{key} cannot be evaluated ({reason}); repair or remove it"
