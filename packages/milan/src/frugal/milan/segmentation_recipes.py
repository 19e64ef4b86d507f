"""Named runs of semantic segmentation: UperNet on an encoder after masked pretraining.

The recipe is the one that masked encoders are compared by on ADE20K (MAE, arXiv:2111.06377,
appendix A.4, and BEiT, arXiv:2106.08254, in mmsegmentation's form). MILAN (arXiv:2208.06049)
publishes 52.7 mIoU with ViT-B/16, but neither its learning rate nor its layer decay: those here
are from the middle of the ranges in use, worth a small sweep. All start from ``--run.start-from``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from frugal.common.models.vit import ImageTower
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupLinear
from frugal.common.recipe import Recipe, Reductions, RunOptions, model_of
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.mean_iou import MeanIoU
from frugal.common.transfer.photometric import PhotometricDistortion
from frugal.common.transfer.segmentation import Segmentation
from frugal.common.transfer.segmentation_data import SegmentationData
from frugal.common.transfer.segmenter import SegmenterConfig, even_taps
from frugal.common.transfer.tasks import TransferTask, masked_split
from frugal.milan.model import MaskedModel, encoder
from frugal.milan.recipes import demo as pretraining_demo

_BATCH = 16
_STEPS = 160_000
_WARMUP_STEPS = 1_500


def _segmentation(
    name: str,
    *,
    learning_rate: float,
    layer_decay: float,
    drop_path: float,
    crop: int = 512,
) -> Recipe:
    """UperNet as wide as the tower, on ADE20K's 150 classes, for 160,000 steps of 16 crops.

    Args:
        name: of the tower.
        learning_rate: peak, of what stands behind the blocks.
        layer_decay: learning rate of a block over that of the next.
        drop_path: of the last block.
        crop: side of what is trained on, in pixels.
    """
    tower = encoder(name, image_size=crop, positions="learned", drop_path=drop_path)
    return Recipe(
        model=_model(tower),
        data=SegmentationData(train=()),
        reduction=Reductions(image=KeepAll()),
        objective=Segmentation(),
        optimizer=AdamW(
            learning_rate=learning_rate,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            no_decay=("vector", "position", "class_token"),
            layer_decay=layer_decay,
        ),
        schedule=WarmupLinear(
            samples=_STEPS * _BATCH,
            warmup_samples=_WARMUP_STEPS * _BATCH,
            start=1e-6 * learning_rate,
        ),
        batch_size=_BATCH,
        run=RunOptions(
            log_every=50,
            save_every=4_000,
            evaluate_every=16_000,
            best="segmentation_miou",
            interpolate=True,
        ),
        evaluation=(MeanIoU(),),
    )


def _model(tower: ImageTower) -> SegmenterConfig:
    return SegmenterConfig(image=tower, taps=even_taps(tower.depth))


def vit_s16() -> Recipe:
    """ViT-S/16 after MILAN's pretraining, with the settings of B/16."""
    return _segmentation("S/16", learning_rate=1e-4, layer_decay=0.65, drop_path=0.1)


def vit_b16() -> Recipe:
    """ViT-B/16 after MILAN's pretraining; published: 52.7 mIoU on ADE20K (MAE: 48.1)."""
    return _segmentation("B/16", learning_rate=1e-4, layer_decay=0.65, drop_path=0.1)


def vit_l16() -> Recipe:
    """ViT-L/16 after MILAN's pretraining."""
    return _segmentation("L/16", learning_rate=5e-5, layer_decay=0.8, drop_path=0.2)


def vit_h14() -> Recipe:
    """ViT-H/14 after MILAN's pretraining, with the settings of L/16 and MAE's drop path."""
    return _segmentation("H/14", learning_rate=5e-5, layer_decay=0.8, drop_path=0.3, crop=518)


def demo() -> Recipe:
    """A small tower on scenes: which of 56 things of a color and a shape lies where?"""
    recipe = vit_b16()
    scenes, images, batch_size, epochs = Path("data/scenes"), 2_000, 16, 6
    pretrained = model_of(MaskedModel, pretraining_demo().model).image
    tower = replace(pretrained, image_size=64, positions="learned", drop_path=0.1)
    return replace(
        recipe,
        model=replace(_model(tower), num_classes=65, width=64, auxiliary_width=64),
        data=SegmentationData(train=(str(scenes),), workers=0),
        # colors make classes here
        objective=Segmentation(distortion=PhotometricDistortion(hue=0.0)),
        optimizer=replace(recipe.optimizer, learning_rate=1e-3),
        schedule=WarmupLinear(samples=epochs * images, warmup_samples=images, start=1e-9),
        batch_size=batch_size,
        run=RunOptions(
            log_every=25, save_every=250, evaluate_every=250, picture_every=250,
            best="segmentation_miou", interpolate=True,
        ),
        evaluation=(MeanIoU(data=scenes),),
    )  # fmt: skip


SEGMENTATION: dict[str, Callable[[], Recipe]] = {
    "vit-s16": vit_s16,
    "vit-b16": vit_b16,
    "vit-l16": vit_l16,
    "vit-h14": vit_h14,
    "demo": demo,
}
SEGMENTATION_TASK = TransferTask(SEGMENTATION, "segmentation", masked_split)
