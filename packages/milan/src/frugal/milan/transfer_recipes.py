"""Named runs of fine-tuning and linear probing.

MILAN's (arXiv:2208.06049, appendix, and the released settings), MAE's for comparison
(arXiv:2111.06377, appendix A), and a well-tuned fine-tuning of the plain CLIP tower
(arXiv:2212.06138), the baseline that a CLIP teacher sets. All start from ``--run.start-from``.

ImageNet-1k counts 1,281,167 training images; the published runs cut every epoch down to whole
batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from frugal.common.data.config import ImageData
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.demo import small_encoder
from frugal.common.models.named import clip_encoder
from frugal.common.models.vit import ImageTower
from frugal.common.optim.optimizers import LARS, AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import EngineOptions, Recipe, Reductions, RunOptions, model_of
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.accuracy import Accuracy
from frugal.common.transfer.augmentation import RandAugmentedCrop, SingleDrawCrop
from frugal.common.transfer.classification import Classification
from frugal.common.transfer.classifier import ClassifierConfig, pooled
from frugal.common.transfer.linear_probing import LinearProbing
from frugal.common.transfer.mixing import Mixing, RandomErasing
from frugal.common.transfer.tasks import TransferTask, class_folder_split
from frugal.milan.model import MaskedModel, encoder
from frugal.milan.recipes import demo

IMAGENET_IMAGES = 1_281_167
_NO_DECAY = ("vector", "position", "class_token")


def _epochs(count: int, *, batch_size: int) -> int:
    """Samples of some epochs of ImageNet-1k, each cut down to whole batches."""
    return count * (IMAGENET_IMAGES // batch_size * batch_size)


def _each_epoch(batch_size: int) -> RunOptions:
    """Saved and measured after every epoch; the best checkpoint stays."""
    steps = IMAGENET_IMAGES // batch_size
    return RunOptions(save_every=steps, evaluate_every=steps, best="accuracy_top1")


# ------------------------------------------------------------------------------------------------
# Fine-tuning


def _fine_tuning(
    tower: ImageTower,
    *,
    epochs: int,
    optimizer: AdamW,
    drop_path: float,
    warmup_epochs: int = 5,
    batch_size: int = 1024,
    accumulate: int = 1,
    augmentation: RandAugmentedCrop,
    mixing: Mixing,
    ema_decay: float | None = None,
) -> Recipe:
    """A tower whose weights, positions included, are all trained."""
    return Recipe(
        model=ClassifierConfig(image=replace(tower, positions="learned", drop_path=drop_path)),
        data=ImageData(train=(), augmentation=augmentation, workers=16),
        reduction=Reductions(image=KeepAll()),
        objective=Classification(smoothing=0.1, erasing=RandomErasing(), mixing=mixing),
        optimizer=optimizer,
        schedule=WarmupCosine(
            samples=_epochs(epochs, batch_size=batch_size),
            warmup_samples=_epochs(warmup_epochs, batch_size=batch_size),
            floor=1e-6,
        ),
        batch_size=batch_size,
        engine=EngineOptions(accumulate=accumulate, ema_decay=ema_decay),
        run=_each_epoch(batch_size),
        evaluation=(Accuracy(),),
    )


def _masked_fine_tuning(
    name: str,
    *,
    epochs: int,
    learning_rate_per_256: float,
    layer_decay: float,
    drop_path: float,
    accumulate: int = 1,
) -> Recipe:
    """What follows masked pretraining: pooled patches, everything that keeps from overfitting.

    Args:
        name: of the tower.
        epochs: of ImageNet-1k.
        learning_rate_per_256: peak for a batch of 256.
        layer_decay: learning rate of a block over that of the next.
        drop_path: of the last block.
        accumulate: micro-batches per step.
    """
    return _fine_tuning(
        pooled(encoder(name), "mean"),
        epochs=epochs,
        optimizer=AdamW(
            learning_rate_per_256=learning_rate_per_256,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            no_decay=_NO_DECAY,
            layer_decay=layer_decay,
        ),
        drop_path=drop_path,
        accumulate=accumulate,
        augmentation=RandAugmentedCrop(),
        mixing=Mixing(together=128 // accumulate),
    )


def vit_s16() -> Recipe:
    """ViT-S/16 after MILAN's pretraining, with the settings of B/16."""
    return _masked_fine_tuning(
        "S/16", epochs=100, learning_rate_per_256=1e-4, layer_decay=0.65, drop_path=0.1
    )


def vit_b16() -> Recipe:
    """ViT-B/16 after MILAN's pretraining; published: 85.4 % on ImageNet-1k."""
    return _masked_fine_tuning(
        "B/16", epochs=100, learning_rate_per_256=1e-4, layer_decay=0.65, drop_path=0.1
    )


def vit_l16() -> Recipe:
    """ViT-L/16 after MILAN's pretraining."""
    return _masked_fine_tuning(
        "L/16",
        epochs=100,
        learning_rate_per_256=1e-4,
        layer_decay=0.75,
        drop_path=0.2,
        accumulate=2,
    )


def vit_h14() -> Recipe:
    """ViT-H/14 after MILAN's pretraining, with the settings of L/16 and MAE's drop path."""
    return _masked_fine_tuning(
        "H/14",
        epochs=100,
        learning_rate_per_256=1e-4,
        layer_decay=0.75,
        drop_path=0.3,
        accumulate=2,
    )


def mae_b16() -> Recipe:
    """ViT-B/16 after MAE's pretraining, as MAE fine-tunes; published: 83.66 %."""
    return _masked_fine_tuning(
        "B/16", epochs=100, learning_rate_per_256=5e-4, layer_decay=0.65, drop_path=0.1
    )


def mae_l16() -> Recipe:
    """ViT-L/16 after MAE's pretraining, as MAE fine-tunes; published: 85.95 %."""
    return _masked_fine_tuning(
        "L/16", epochs=50, learning_rate_per_256=1e-3, layer_decay=0.75, drop_path=0.2
    )


def mae_h14() -> Recipe:
    """ViT-H/14 after MAE's pretraining, as MAE fine-tunes; published: 86.93 %."""
    return _masked_fine_tuning(
        "H/14", epochs=50, learning_rate_per_256=1e-3, layer_decay=0.75, drop_path=0.3
    )


def _clip_fine_tuning(
    name: str, *, epochs: int, warmup_epochs: int, learning_rate: float, layer_decay: float
) -> Recipe:
    """OpenAI's image tower, from its file: small steps, an average of the weights, no mixing."""
    return _fine_tuning(
        clip_encoder(name, quick_gelu=True).image,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        optimizer=AdamW(
            learning_rate=learning_rate,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            no_decay=_NO_DECAY,
            layer_decay=layer_decay,
        ),
        drop_path=0.0,
        batch_size=2048,
        augmentation=RandAugmentedCrop(fill=(123, 117, 104)),
        mixing=Mixing(mixup=0.0, cutmix=0.0),
        ema_decay=0.9998,
    )


def clip_b16() -> Recipe:
    """OpenAI's ViT-B/16 itself, MILAN's teacher: the baseline; published: 85.7 % on ImageNet-1k."""
    return _clip_fine_tuning(
        "B/16", epochs=50, warmup_epochs=10, learning_rate=6e-4, layer_decay=0.6
    )


def clip_l14() -> Recipe:
    """OpenAI's ViT-L/14 itself; published: 88.0 % on ImageNet-1k."""
    return _clip_fine_tuning(
        "L/14", epochs=30, warmup_epochs=5, learning_rate=4e-4, layer_decay=0.65
    )


# ------------------------------------------------------------------------------------------------
# Linear probing


def _probing(name: str, *, epochs: int, learning_rate_per_256: float) -> Recipe:
    """A batch norm and a linear layer on the class token of a frozen tower."""
    batch_size = 16_384
    return Recipe(
        model=ClassifierConfig(image=encoder(name, positions="learned"), head_init_std=0.01),
        data=ImageData(train=(), augmentation=SingleDrawCrop(), workers=10),
        reduction=Reductions(image=KeepAll()),
        objective=LinearProbing(),
        optimizer=LARS(learning_rate_per_256=learning_rate_per_256),
        schedule=WarmupCosine(
            samples=_epochs(epochs, batch_size=batch_size),
            warmup_samples=_epochs(10, batch_size=batch_size),
        ),
        batch_size=batch_size,
        run=_each_epoch(batch_size),
        evaluation=(Accuracy(),),
    )


def probe_vit_s16() -> Recipe:
    """ViT-S/16 after MILAN's pretraining, with the settings of B/16."""
    return _probing("S/16", epochs=100, learning_rate_per_256=0.05)


def probe_vit_b16() -> Recipe:
    """ViT-B/16 after MILAN's pretraining; 78.9 % on ImageNet-1k in a public port."""
    return _probing("B/16", epochs=100, learning_rate_per_256=0.05)


def probe_vit_l16() -> Recipe:
    """ViT-L/16 after MILAN's pretraining."""
    return _probing("L/16", epochs=100, learning_rate_per_256=0.02)


def probe_vit_h14() -> Recipe:
    """ViT-H/14 after MILAN's pretraining, with the settings of L/16."""
    return _probing("H/14", epochs=100, learning_rate_per_256=0.02)


def probe_mae_b16() -> Recipe:
    """ViT-B/16 after MAE's pretraining, as MAE probes; published: 67.8 %."""
    return _probing("B/16", epochs=90, learning_rate_per_256=0.1)


def probe_mae_l16() -> Recipe:
    """ViT-L/16 after MAE's pretraining, as MAE probes; published: 76.0 %."""
    return _probing("L/16", epochs=50, learning_rate_per_256=0.1)


def probe_mae_h14() -> Recipe:
    """ViT-H/14 after MAE's pretraining, as MAE probes; published: 77.2 %."""
    return _probing("H/14", epochs=50, learning_rate_per_256=0.1)


# ------------------------------------------------------------------------------------------------
# Scenes

_SCENES_CLASSES = 64
"""Eight of them are held out of training, and are not measured."""


def _on_scenes(recipe: Recipe, tower: ImageTower, *, learning_rate: float) -> Recipe:
    """A recipe in minutes on two cores.

    Colors are what the classes are told by, so nothing that changes them is left of a recipe.
    """
    epoch = 17 * 128  # in whole batches
    assert isinstance(recipe.schedule, WarmupCosine)
    return replace(
        recipe,
        model=replace(
            model_of(ClassifierConfig, recipe.model),
            image=replace(tower, positions="learned"),
            num_classes=_SCENES_CLASSES,
        ),
        data=ImageData(
            train=("data/scenes/zero_shot/train",),
            augmentation=RandomResizedCrop(scale=(0.5, 1.0), flip=0.0),
            workers=0,  # two training processes keep two cores busy
        ),
        optimizer=replace(
            recipe.optimizer, learning_rate=learning_rate, learning_rate_per_256=None
        ),
        schedule=replace(recipe.schedule, samples=30 * epoch, warmup_samples=2 * epoch),
        batch_size=128,
        engine=EngineOptions(),
        run=RunOptions(
            log_every=17, save_every=85, evaluate_every=85, picture_every=255, best="accuracy_top1"
        ),
        evaluation=(Accuracy(data=Path("data/scenes")),),
    )


def _tuned_on_scenes(tower: ImageTower, *, learning_rate: float) -> Recipe:
    recipe = _on_scenes(vit_b16(), replace(tower, drop_path=0.1), learning_rate=learning_rate)
    return replace(recipe, objective=Classification(smoothing=0.1))


def demo_fine_tuning() -> Recipe:
    """The encoder of MILAN's demo on scenes: 56 kinds of things, 40 pictures of each; minutes."""
    encoder = model_of(MaskedModel, demo().model).image
    return _tuned_on_scenes(pooled(encoder, "mean"), learning_rate=3e-3)


def demo_clip_fine_tuning() -> Recipe:
    """The teacher of MILAN's demo itself, the image tower of FLIP's demo: the baseline."""
    return _tuned_on_scenes(_teacher_of_demo(), learning_rate=3e-3)


def demo_probing() -> Recipe:
    """A linear layer on the frozen encoder of MILAN's demo, on scenes; a minute."""
    return _on_scenes(probe_vit_b16(), model_of(MaskedModel, demo().model).image, learning_rate=4.0)


def demo_clip_probing() -> Recipe:
    """A linear layer on the frozen teacher of MILAN's demo: the baseline."""
    return _on_scenes(probe_vit_b16(), _teacher_of_demo(), learning_rate=4.0)


def _teacher_of_demo() -> ImageTower:
    return small_encoder(patch_size=8, image_size=32, text_length=32).image


FINE_TUNING: dict[str, Callable[[], Recipe]] = {
    "vit-s16": vit_s16,
    "vit-b16": vit_b16,
    "vit-l16": vit_l16,
    "vit-h14": vit_h14,
    "mae-b16": mae_b16,
    "mae-l16": mae_l16,
    "mae-h14": mae_h14,
    "clip-b16": clip_b16,
    "clip-l14": clip_l14,
    "demo": demo_fine_tuning,
    "demo-clip": demo_clip_fine_tuning,
}
LINEAR_PROBING: dict[str, Callable[[], Recipe]] = {
    "vit-s16": probe_vit_s16,
    "vit-b16": probe_vit_b16,
    "vit-l16": probe_vit_l16,
    "vit-h14": probe_vit_h14,
    "mae-b16": probe_mae_b16,
    "mae-l16": probe_mae_l16,
    "mae-h14": probe_mae_h14,
    "demo": demo_probing,
    "demo-clip": demo_clip_probing,
}
FINE_TUNING_TASK = TransferTask(FINE_TUNING, "accuracy", class_folder_split)
LINEAR_PROBING_TASK = TransferTask(LINEAR_PROBING, "accuracy", class_folder_split)
