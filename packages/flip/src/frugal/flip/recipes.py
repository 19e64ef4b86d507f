"""FLIP's named runs (arXiv:2212.00794): masked pre-training and unmasked tuning.

Durations are counted in samples. The reference counted in virtual epochs of 1,281,167 samples,
each cut down to whole steps; :func:`_reference_samples` repeats its arithmetic, so that step
counts and learning rates are the published ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe, WordPiece
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.evaluation.config import Retrieval, ZeroShot
from frugal.common.models.config import DualEncoderConfig, clip_encoder, flip_encoder
from frugal.common.objectives.config import Contrastive
from frugal.common.recipe import AdamW, Recipe, Reductions, RunOptions, WarmupCosine
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate

BATCH_SIZE = 65_536
VIRTUAL_EPOCH = 1_281_167
"""Samples after which the reference counts an epoch, whatever the data: ImageNet-1k's size."""


def _reference_samples(epochs: int) -> int:
    """Samples in the reference's epochs: 19 whole steps each at its batch size."""
    return epochs * (VIRTUAL_EPOCH // BATCH_SIZE) * BATCH_SIZE


def _published(model: DualEncoderConfig, *, warmup_epochs: int) -> Recipe:
    """Masked pre-training on LAION-400M for 32 epochs of it (12.45 billion samples)."""
    return Recipe(
        model=model,
        data=PairData(
            train=(),
            tokenizer=WordPiece(),
            augmentation=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5),
        ),
        reduction=Reductions(image=RandomMasking(mask_ratio=0.5), text=Truncate()),
        objective=Contrastive(clamp="forward"),
        optimiser=AdamW(
            learning_rate_per_256=4e-6,
            betas=(0.9, 0.95),
            weight_decay=0.2,
            no_decay=("bias", "norm", "position"),
        ),
        schedule=WarmupCosine(
            samples=_reference_samples(10_000), warmup_samples=_reference_samples(warmup_epochs)
        ),
        batch_size=BATCH_SIZE,
        evaluation=(ZeroShot(crop=CenterCrop(order="crop_first")), Retrieval()),
    )


def base() -> Recipe:
    """ViT-B/16 on LAION-400M, half of the patches removed; 68.0 % on ImageNet after tuning."""
    return _published(flip_encoder("B/16"), warmup_epochs=40)


def large() -> Recipe:
    """ViT-L/16 on LAION-400M, half of the patches removed; 74.3 % on ImageNet after tuning."""
    return _published(flip_encoder("L/16"), warmup_epochs=40)


def huge14() -> Recipe:
    """ViT-H/14 on LAION-400M, half of the patches removed; 75.5 % on ImageNet after tuning."""
    return _published(flip_encoder("H/14"), warmup_epochs=200)


def unmasked_tuning(pretrained: Recipe) -> Recipe:
    """The short stage on whole images that follows a masked recipe (0.32 epochs of LAION-400M)."""
    return replace(
        pretrained,
        reduction=replace(pretrained.reduction, image=KeepAll()),
        optimiser=replace(pretrained.optimiser, learning_rate_per_256=4e-8),
        schedule=WarmupCosine(
            samples=_reference_samples(100), warmup_samples=_reference_samples(20)
        ),
    )


def base_tuning() -> Recipe:
    """Unmasked tuning of ``base``; give its run with --run.start-from."""
    return unmasked_tuning(base())


def large_tuning() -> Recipe:
    """Unmasked tuning of ``large``; give its run with --run.start-from."""
    return unmasked_tuning(large())


def huge14_tuning() -> Recipe:
    """Unmasked tuning of ``huge14``; give its run with --run.start-from."""
    return unmasked_tuning(huge14())


def demo() -> Recipe:
    """A small CLIP on the scenes data set, half of the patches removed; minutes on two cores."""
    model = clip_encoder("S/8", image_size=32, text_length=24)
    image: dict[str, Any] = {"width": 128, "depth": 4, "heads": 4, "mlp_width": 512}
    text: dict[str, Any] = {"width": 64, "depth": 2, "heads": 2, "mlp_width": 256}
    return Recipe(
        model=replace(
            model,
            image=replace(model.image, **image),
            text=replace(model.text, **text, packed=True),
            embed_dim=64,
        ),
        data=PairData(
            train=("data/scenes/train",),
            tokenizer=ClipBpe(),
            augmentation=RandomResizedCrop(scale=(0.8, 1.0), flip=0.0),
            workers=0,  # two training processes keep two cores busy
        ),
        reduction=Reductions(image=RandomMasking(mask_ratio=0.5), text=Truncate()),
        objective=Contrastive(),
        optimiser=AdamW(
            learning_rate=2e-3,
            betas=(0.9, 0.98),
            weight_decay=0.1,
            no_decay=("bias", "norm", "position", "class_token", "logit_scale"),
            clip_norm=1.0,
        ),
        schedule=WarmupCosine(samples=280_000, warmup_samples=15_000),
        batch_size=256,
        run=RunOptions(log_every=20, save_every=400, picture_every=400),
        evaluation=(ZeroShot(), Retrieval()),
    )


def demo_tuning() -> Recipe:
    """The short unmasked stage after ``demo``; give its run with --run.start-from."""
    masked = demo()
    return replace(
        masked,
        reduction=replace(masked.reduction, image=KeepAll()),
        optimiser=replace(masked.optimiser, learning_rate=1e-3),
        schedule=WarmupCosine(samples=160_000, warmup_samples=5_000),
    )


RECIPES = {
    "demo": demo,
    "demo-tuning": demo_tuning,
    "base": base,
    "base-tuning": base_tuning,
    "large": large,
    "large-tuning": large_tuning,
    "huge14": huge14,
    "huge14-tuning": huge14_tuning,
    # the same by model and data
    "vit-b16-laion400m": base,
    "vit-b16-laion400m-tuning": base_tuning,
    "vit-l16-laion400m": large,
    "vit-l16-laion400m-tuning": large_tuning,
    "vit-h14-laion400m": huge14,
    "vit-h14-laion400m-tuning": huge14_tuning,
}
