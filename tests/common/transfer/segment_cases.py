"""A small segmenter and small folders of pictures with masks."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from frugal.common.contracts import Batch
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import Recipe
from frugal.common.run import Run
from frugal.common.transfer.segmentation import Segmentation
from frugal.common.transfer.segmentation_data import SegmentationData
from frugal.common.transfer.segmenter import SegmenterConfig
from frugal.milan.segmentation_recipes import demo

TOWER = ImageTower(width=16, depth=4, heads=2, mlp_width=32, patch_size=8, image_size=(32, 48))
CONFIG = SegmenterConfig(
    image=TOWER, taps=(1, 2, 3, 4), num_classes=7, width=12, auxiliary_width=10, dropout=0.0
)
HERE = Run(Path("nowhere"), 0, 1, 0, torch.device("cpu"), logging.getLogger("frugal"))


def recipe(*, model: SegmenterConfig = CONFIG, folder: Path | None = None, **data) -> Recipe:
    """Segmentation of tiny pictures, without a pretrained encoder."""
    train = () if folder is None else (str(folder),)
    return replace(
        demo(),
        model=model,
        data=SegmentationData(train=train, workers=0, **data),
        objective=Segmentation(from_scratch=True),
        batch_size=4,
        evaluation=(),
        run=replace(demo().run, best=None),
    )


def batch(count: int = 3, *, seed: int = 0, model: SegmenterConfig = CONFIG) -> Batch:
    """Random pictures and classes, some pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    height, width = model.image.height_width
    labels = torch.randint(0, model.num_classes + 1, (count, height, width), generator=generator)
    return Batch(
        images=torch.randint(0, 256, (count, 3, height, width), generator=generator).byte(),
        labels=torch.where(labels == model.num_classes, 255, labels).byte(),
        sample_numbers=torch.arange(count),
        valid=torch.ones(count, dtype=torch.bool),
    )


def write_pair(
    root: Path,
    name: str,
    image: np.ndarray,
    mask: np.ndarray,
    *,
    split: str = "training",
    suffix: str = "png",
) -> None:
    """A picture (H, W, 3) and the numbers in its mask (H, W), in ADE20K's layout."""
    for kind, pixels, ending in (("images", image, suffix), ("annotations", mask, "png")):
        path = root / kind / split / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_folder(
    root: Path,
    sizes: list[tuple[int, int]],
    *,
    num_classes: int = 7,
    split: str = "training",
    suffix: str = "png",
) -> Path:
    """Noisy pictures whose classes lie in blocks of 8 pixels; the mask holds 0 too."""
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        blocks = generator.integers(0, num_classes + 1, (-(-height // 8), -(-width // 8)))
        mask = blocks.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
        image = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        write_pair(root, f"{number:03d}", image, mask, split=split, suffix=suffix)
    return root
