"""MILAN's named pretraining runs (arXiv:2208.06049), its ablations, and MAE's (arXiv:2111.06377).

Published runs read ImageNet-1k from eight GPUs. They counted epochs in whole micro-batches and
threw away the rest of an accumulation at the end of each; here steps go on across epochs, and
epochs are those of the published runs, so that the learning rate is the same after as many samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from frugal.common.data.config import ImageData
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import (
    EngineOptions,
    ObjectiveConfig,
    Recipe,
    Reductions,
    RunOptions,
    model_of,
)
from frugal.common.reduction.image import ImageReduction
from frugal.common.reduction.random_masking import RandomMasking
from frugal.milan.decoders import DecoderConfig
from frugal.milan.model import MaskedModel, encoder
from frugal.milan.objective import ReconstructFeatures, ReconstructPixels
from frugal.milan.semantic_sampling import SemanticSampling
from frugal.milan.teacher import Teacher

BATCH_SIZE = 4_096
WARMUP_EPOCHS = 40
NO_DECAY = ("vector", "bias")
"""As published: matrices decay, class and mask token among them, which have three dimensions."""
_CLIP = Teacher(source="ViT-B-16.pt")
"""As OpenAI's file is called; --objective.teacher.source says where it lies."""
_SEMANTIC = SemanticSampling(mask_ratio=0.75)
_UNIFORM = RandomMasking(mask_ratio=0.75)


@dataclass(frozen=True, kw_only=True)
class Micro:
    """How a published run divided its batch among eight GPUs."""

    per_gpu: int
    accumulate: int
    per_epoch: int
    """Micro-batches."""

    @property
    def epoch(self) -> int:
        """Samples."""
        return self.per_epoch * self.per_gpu * 8


_SMALL = Micro(per_gpu=256, accumulate=2, per_epoch=625)
"""Of ViT-S and B."""
_LARGE = Micro(per_gpu=128, accumulate=4, per_epoch=1_251)
"""Of ViT-L; ViT-H, which the published recipes leave open, has it too."""


def _published(
    name: str,
    micro: Micro,
    *,
    epochs: int = 400,
    objective: ObjectiveConfig | None = None,
    decoder: DecoderConfig | None = None,
    masking: ImageReduction = _SEMANTIC,
) -> Recipe:
    """A run on ImageNet-1k at a batch of 4,096.

    The published runs multiplied in float16 with loss scaling; ours take bfloat16 where there is
    hardware for it (``--engine.precision float16`` does as they did). The learning rate of the
    first step is 0, as published.

    Args:
        name: size and patch of the encoder.
        micro: how the batch is divided.
        epochs: of the whole run; 40 of them are the warm-up.
        objective: what is reconstructed; CLIP's features by default.
        decoder: the prompting one by default.
        masking: which patches are seen.
    """
    return Recipe(
        model=MaskedModel(image=encoder(name), decoder=decoder or DecoderConfig()),
        data=ImageData(
            train=(),
            augmentation=RandomResizedCrop(scale=(0.2, 1.0), fallback="clamp"),
            workers=16,
        ),
        reduction=Reductions(image=masking),
        objective=objective or ReconstructFeatures(teacher=_CLIP),
        optimizer=AdamW(
            learning_rate_per_256=1.5e-4,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            no_decay=NO_DECAY,
        ),
        schedule=WarmupCosine(
            samples=epochs * micro.epoch, warmup_samples=WARMUP_EPOCHS * micro.epoch
        ),
        batch_size=BATCH_SIZE,
        engine=EngineOptions(accumulate=micro.accumulate),
    )


# ------------------------------------------------------------------------------------------------
# MILAN


def vit_s16() -> Recipe:
    """ViT-S/16 towards the features of CLIP ViT-B/16, 400 epochs of ImageNet-1k."""
    return _published("S/16", _SMALL)


def vit_b16() -> Recipe:
    """ViT-B/16 towards the features of CLIP ViT-B/16, 400 epochs; 85.4 % after fine-tuning."""
    return _published("B/16", _SMALL)


def vit_l16() -> Recipe:
    """ViT-L/16 towards the features of CLIP ViT-B/16, 400 epochs of ImageNet-1k."""
    return _published("L/16", _LARGE)


def vit_h14() -> Recipe:
    """ViT-H/14, whose 16 by 16 patches the teacher sees as 256 pixels; no published run."""
    return _published(
        "H/14", _LARGE, objective=ReconstructFeatures(teacher=replace(_CLIP, image_size=256))
    )


# ------------------------------------------------------------------------------------------------
# Ablations of ViT-B/16


def vit_b16_plain_decoder() -> Recipe:
    """``vit-b16`` with MAE's decoder, in which seen patches change too."""
    return _published("B/16", _SMALL, decoder=DecoderConfig(kind="plain"))


def vit_b16_uniform() -> Recipe:
    """``vit-b16`` with every patch as likely to be seen as any other."""
    return _published("B/16", _SMALL, masking=_UNIFORM)


def vit_b16_plain_uniform() -> Recipe:
    """``vit-b16`` with MAE's decoder and uniform masking: CLIP's features are all that is new."""
    return _published("B/16", _SMALL, decoder=DecoderConfig(kind="plain"), masking=_UNIFORM)


def vit_b16_pixels() -> Recipe:
    """``vit-b16`` towards pixels, with the prompting decoder; masking is uniform."""
    return _published("B/16", _SMALL, objective=ReconstructPixels(), masking=_UNIFORM)


def vit_b16_slip() -> Recipe:
    """``vit-b16`` towards the features of SLIP ViT-B/16."""
    teacher = Teacher(source="slip_base_100ep.pt")
    return _published("B/16", _SMALL, objective=ReconstructFeatures(teacher=teacher))


def vit_b16_dino() -> Recipe:
    """``vit-b16`` towards the features of DINO ViT-B/16, which have 768 numbers."""
    teacher = Teacher(source="dino_vitbase16_pretrain.pth")
    return _published("B/16", _SMALL, objective=ReconstructFeatures(teacher=teacher))


# ------------------------------------------------------------------------------------------------
# MAE, for comparison


def _mae(name: str, micro: Micro, *, epochs: int) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return _published(
            name,
            micro,
            epochs=epochs,
            objective=ReconstructPixels(),
            decoder=DecoderConfig(kind="plain"),
            masking=_UNIFORM,
        )

    recipe.__doc__ = f"MAE's ViT-{name}: normalized pixels, {epochs:,} epochs of ImageNet-1k."
    return recipe


# ------------------------------------------------------------------------------------------------
# A small model for two cores


def demo() -> Recipe:
    """A small encoder on scenes towards the features of a CLIP model trained on them; minutes.

    Give the run of FLIP's demo, or of any model with patches of 8 on images of 32 pixels, with
    ``--objective.teacher.source``.
    """
    return Recipe(
        model=MaskedModel(
            image=encoder("S/8", image_size=32, width=128, depth=4, heads=4, mlp_width=512),
            decoder=DecoderConfig(width=64, depth=2, heads=4),
        ),
        data=ImageData(
            train=("data/scenes/train",),
            augmentation=RandomResizedCrop(scale=(0.5, 1.0), flip=0.0),
            workers=0,  # two training processes keep two cores busy
        ),
        reduction=Reductions(image=_SEMANTIC),
        objective=ReconstructFeatures(teacher=Teacher(normalization="own")),
        optimizer=AdamW(
            learning_rate=2e-3,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            no_decay=NO_DECAY,
            clip_norm=1.0,
        ),
        schedule=WarmupCosine(samples=400_000, warmup_samples=40_000),
        batch_size=256,
        run=RunOptions(log_every=20, save_every=400, picture_every=400),
    )


def demo_pixels() -> Recipe:
    """``demo`` towards normalized pixels with MAE's decoder and uniform masking; no teacher."""
    features = demo()
    model = model_of(MaskedModel, features.model)
    return replace(
        features,
        model=replace(model, decoder=replace(model.decoder, kind="plain")),
        reduction=Reductions(image=_UNIFORM),
        objective=ReconstructPixels(),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "demo-pixels": demo_pixels,
    "vit-s16": vit_s16,
    "vit-b16": vit_b16,
    "vit-l16": vit_l16,
    "vit-h14": vit_h14,
    "vit-b16-plain-decoder": vit_b16_plain_decoder,
    "vit-b16-uniform": vit_b16_uniform,
    "vit-b16-plain-uniform": vit_b16_plain_uniform,
    "vit-b16-pixels": vit_b16_pixels,
    "vit-b16-slip": vit_b16_slip,
    "vit-b16-dino": vit_b16_dino,
    **{
        f"mae-{size[0].lower()}{size[2:]}-{epochs}ep": _mae(size, micro, epochs=epochs)
        for size, micro in (("B/16", _SMALL), ("L/16", _LARGE), ("H/14", _LARGE))
        for epochs in (800, 1_600)
    },
}
