"""What the ``demo`` recipe of every contrastive method starts from: a small CLIP on scenes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, Reductions, RunOptions
from frugal.common.reduction.image import ImageReduction
from frugal.common.reduction.text import Truncate


def small_encoder(*, patch_size: int, image_size: int, text_length: int) -> DualEncoderConfig:
    """Ordinary CLIP towers of 4.1 million parameters, most of them CLIP's token table."""
    model = clip_encoder(f"S/{patch_size}", image_size=image_size, text_length=text_length)
    image: dict[str, Any] = {"width": 128, "depth": 4, "heads": 4, "mlp_width": 512}
    text: dict[str, Any] = {"width": 64, "depth": 2, "heads": 2, "mlp_width": 256}
    return replace(
        model,
        image=replace(model.image, **image),
        text=replace(model.text, **text, packed=True),
        embed_dim=64,
    )


def scenes_recipe(model: DualEncoderConfig, *, image: ImageReduction) -> Recipe:
    """Minutes of training on two cores.

    Args:
        model: from :func:`small_encoder`.
        image: which patches stay.
    """
    return Recipe(
        model=model,
        data=PairData(
            train=("data/scenes/train",),
            tokenizer=ClipBpe(),
            augmentation=RandomResizedCrop(scale=(0.8, 1.0), flip=0.0),
            workers=0,  # two training processes keep two cores busy
        ),
        reduction=Reductions(image=image, text=Truncate()),
        objective=Contrastive(),
        optimizer=AdamW(
            learning_rate=2e-3,
            betas=(0.9, 0.98),
            weight_decay=0.1,
            no_decay=("bias", "norm", "position", "class_token", "logit_scale"),
            clip_norm=1.0,
        ),
        schedule=WarmupCosine(samples=280_000, warmup_samples=15_000),
        batch_size=256,
        run=RunOptions(log_every=20, save_every=400, picture_every=400),
        evaluation=(ZeroShot(), Retrieval(), Compositional()),
    )
