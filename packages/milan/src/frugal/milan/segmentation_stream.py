"""The stream of training batches of pictures with a class for every pixel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from frugal.common.contracts import DamageNote, Stream
from frugal.common.data.agreement import check_same_data
from frugal.common.data.contents import Part, digest_of
from frugal.common.data.damage import Damaged, note_of
from frugal.common.data.order import GlobalOrder
from frugal.common.data.stream import IndexedStream, Share
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.recipe import Recipe
from frugal.common.run import Run
from frugal.milan.masked_folder import (
    IGNORED,
    MaskedFolder,
    class_names,
    open_masked_folder,
)
from frugal.milan.segmentation_data import ScaledCrop, SegmentationData


def build_stream(data: SegmentationData, recipe: Recipe, run: Run, *, first_sample: int) -> Stream:
    """See :meth:`frugal.milan.segmentation_data.SegmentationData.build`."""
    folders = open_folders(data, num_classes=recipe.model.num_classes)
    counts = [len(folder) for folder in folders]
    contents = [[Part(".", len(folder), digest_of(folder.names))] for folder in folders]
    check_same_data(contents, run)
    order = GlobalOrder(counts, seed=recipe.run.seed, window=len(counts))
    run.log.info("data: %s pictures with masks", f"{order.samples:,}")
    samples = MaskedCrops(
        folders,
        order,
        data.augmentation,
        size=recipe.model.image.height_width,
        num_classes=recipe.model.num_classes,
        seed=recipe.run.seed,
    )
    share = Share(
        first_sample=first_sample,
        micro_batch=recipe.batch_size // recipe.engine.accumulate,
        rank=run.rank,
        world_size=run.world_size,
    )
    return IndexedStream(
        samples,
        share,
        epoch_samples=order.samples,
        workers=data.workers,
        pin_memory=run.device.type == "cuda",
        contents=contents,
    )


def open_folders(data: SegmentationData, *, num_classes: int) -> list[MaskedFolder]:
    """The folders of a recipe, each looked at.

    Raises:
        InputError: if there is none, one is named twice, or a model of so many classes cannot be
            trained on one.
    """
    if not data.train:
        raise InputError(
            "data.train is empty; say where the pictures and their masks are, such as --data.train "
            "path/to/ADEChallengeData2016"
        )
    twice = next((name for name, count in Counter(data.train).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"data.train names {twice} more than once; name every folder once")
    folders = []
    for name in data.train:
        class_names(Path(name), num_classes)
        folder = open_masked_folder(Path(name), data.split, data.image_extensions)
        folder.look(num_classes)
        folders.append(folder)
    return folders


class MaskedCrops(Dataset[dict[str, Any]]):
    """The endless run of crops that an order makes of pictures with masks."""

    def __init__(
        self,
        folders: list[MaskedFolder],
        order: GlobalOrder,
        augmentation: ScaledCrop,
        *,
        size: tuple[int, int],
        num_classes: int,
        seed: int,
    ) -> None:
        """Take pictures; every draw belongs to the number of its sample.

        Args:
            folders: one shard of the order each.
            order: which picture is which sample.
            augmentation: what is cut out of it.
            size: (height, width) of the crops.
            num_classes: of the model.
            seed: the run's.
        """
        self._folders = folders
        self._order = order
        self._augmentation = augmentation
        self._size = size
        self._num_classes = num_classes
        self._seed = seed

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Any]:
        """The fields of the ``Batch`` of some sample numbers (B,), damaged samples included.

        Its ``labels`` are (B, H, W) uint8, one per pixel.
        """
        images = np.zeros((len(numbers), 3, *self._size), np.uint8)
        labels = np.full((len(numbers), *self._size), IGNORED, np.uint8)
        valid = np.zeros(len(numbers), np.bool_)
        keys: list[str] = []
        damage: Counter[str] = Counter()
        notes: list[DamageNote] = []
        sources: Counter[int] = Counter()
        places = zip(*(found.tolist() for found in self._order.locate(numbers)), strict=True)
        for slot, (shard, index) in enumerate(places):
            folder = self._folders[shard]
            keys.append(str(folder.image_path(index)))
            try:
                images[slot], labels[slot] = self._crop(folder, index, int(numbers[slot]))
                valid[slot] = True
                sources[shard] += 1
            except Damaged as damaged:
                damage[damaged.kind] += 1
                notes.append(note_of(keys[-1], damaged, source=shard))
        return {
            "images": torch.from_numpy(images),
            "labels": torch.from_numpy(labels),
            "sample_numbers": torch.from_numpy(numbers),
            "valid": torch.from_numpy(valid),
            "keys": keys,
            "damage": dict(damage),
            "damage_notes": notes,
            "sources": dict(sources),
        }

    def _crop(self, folder: MaskedFolder, index: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        image, labels = folder.read(index, self._num_classes)
        generator = sample_generator(self._seed, "crop", number)
        return self._augmentation.apply(image, labels, size=self._size, generator=generator)
