"""CLIPA's named runs: pre-training on few tokens, fine-tuning on all of them.

Sources: "An Inverse Scaling Law for CLIP Training" (arXiv:2305.07017) for B/16 and L/16, "CLIPA-v2"
(arXiv:2306.15658) for the towers with patches of 14, and their published configurations. A name
says what the first stage sees: I50 is 49 patches and the class token, or patches alone where these
are what is pooled; T16 is 16 text tokens. A fine-tuning recipe starts from a finished run, which
--run.start-from names, and brings its position tables to the larger image and the longer text.

Where the published configurations disagree with one another, the numbers are those of the papers.
Accuracies are zero-shot top-1 on ImageNet-1k as published; none was reproduced here.
"""

from __future__ import annotations

from dataclasses import replace

from frugal.clipa.named_models import clipa_v1_encoder
from frugal.clipa.syntax_masking import SyntaxMasking
from frugal.common.data.color import NO_CHANGE, ColorJitter
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe, WordPiece
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.demo import scenes_recipe, small_encoder
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clipa_encoder
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import EngineOptions, Recipe, Reductions, RunOptions
from frugal.common.reduction.image import ImageReduction, KeepAll
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import TextReduction, Truncate

LAION_400M = 407_332_084
"""Pairs of LAION-400M that could still be downloaded."""
_TUNING_SAMPLES = 131_072_000
_RECOMPUTE = EngineOptions(checkpoint_activations=True)
_INTERPOLATE = RunOptions(interpolate=True)
_KEEP_ALL = KeepAll()
_TRUNCATE = Truncate()
_SYNTAX = SyntaxMasking()
_COLOR = ColorJitter()
_STRETCH = CenterCrop(order="stretch", interpolation="bilinear")

# ------------------------------------------------------------------------------------------------
# The first version: trained with PyTorch on LAION-400M


def _v1(
    model: DualEncoderConfig,
    *,
    learning_rate_per_256: float,
    batch_size: int,
    samples: int,
    warmup_steps: int,
    text: TextReduction = _TRUNCATE,
    color: ColorJitter = NO_CHANGE,
) -> Recipe:
    """One stage of the first version; ``warmup_steps`` are optimizer steps."""
    return Recipe(
        model=model,
        data=PairData(
            train=(),
            tokenizer=ClipBpe(),
            augmentation=RandomResizedCrop(scale=(0.4, 1.0), flip=0.0, fallback="clamp"),
            color=color,
        ),
        reduction=Reductions(image=_KEEP_ALL, text=text),
        objective=Contrastive(),
        optimizer=AdamW(
            learning_rate_per_256=learning_rate_per_256,
            epsilon=1e-6,
            no_decay=("vector", "class_token"),
        ),
        schedule=WarmupCosine(samples=samples, warmup_samples=warmup_steps * batch_size),
        batch_size=batch_size,
        engine=_RECOMPUTE,
        # the published evaluations of syntax-masked models mask their prompts too
        evaluation=(ZeroShot(templates="imagenet_80", reduce_prompts=text is _SYNTAX), Retrieval()),
    )


def _v1_tuning(
    model: DualEncoderConfig,
    *,
    batch_size: int,
    warmup_steps: int,
    color: ColorJitter = _COLOR,
) -> Recipe:
    """The second stage of the first version: whole images and captions, positions learned."""
    recipe = _v1(
        model,
        learning_rate_per_256=8e-7,
        batch_size=batch_size,
        samples=_TUNING_SAMPLES,
        warmup_steps=warmup_steps,
        color=color,
    )
    return replace(recipe, run=_INTERPOLATE)


def vit_b16_i50_t16() -> Recipe:
    """ViT-B/16 on 112-pixel images and 16 text tokens, LAION-400M; 59.7 % before fine-tuning."""
    model = clipa_v1_encoder("B/16", image_size=112, class_pooling=True, positions="sincos")
    return _v1(
        model,
        learning_rate_per_256=8e-6,
        batch_size=65_536,
        samples=6 * LAION_400M,
        warmup_steps=782,
    )


def vit_b16_i50_t16_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-b16-i50-t16`` at 224 pixels; 63.2 %."""
    model = clipa_v1_encoder("B/16", class_pooling=True)
    return _v1_tuning(model, batch_size=8_192, warmup_steps=3_072, color=NO_CHANGE)


def vit_l16_i17_t16() -> Recipe:
    """ViT-L/16 on 64-pixel images and 16 syntax-masked tokens; 60.3 % before fine-tuning."""
    return _l16(image_size=64, text_length=16)


def vit_l16_i17_t16_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-l16-i17-t16`` at 224 pixels; 67.8 %."""
    return _v1_tuning(clipa_v1_encoder("L/16"), batch_size=7_168, warmup_steps=3_571)


def vit_l16_i37_t8() -> Recipe:
    """ViT-L/16 on 96-pixel images and 8 syntax-masked tokens; 57.9 % before fine-tuning."""
    return _l16(image_size=96, text_length=8)


def vit_l16_i37_t8_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-l16-i37-t8`` at 224 pixels and 32 text tokens; 69.3 %."""
    model = clipa_v1_encoder("L/16", text_length=32)
    return _v1_tuning(model, batch_size=7_168, warmup_steps=3_571)


def _l16(*, image_size: int, text_length: int) -> Recipe:
    """Pre-training of ViT-L/16."""
    return _v1(
        clipa_v1_encoder(
            "L/16", image_size=image_size, text_length=text_length, positions="sincos"
        ),
        learning_rate_per_256=8e-6,
        batch_size=32_768,
        samples=6 * LAION_400M,
        warmup_steps=1_563,
        text=_SYNTAX,
        color=_COLOR,
    )


# ------------------------------------------------------------------------------------------------
# The second version: trained with JAX on DataComp-1B (or LAION-2B)


def _v2(
    model: DualEncoderConfig,
    *,
    learning_rate_per_256: float,
    batch_size: int,
    steps: int,
    warmup_steps: int,
    image: ImageReduction = _KEEP_ALL,
    text: TextReduction = _TRUNCATE,
    color: ColorJitter = _COLOR,
) -> Recipe:
    """One stage of the second version.

    The moments of the published runs were bfloat16 and their scale was never clamped; ours are
    float32 and clamped.
    """
    return Recipe(
        model=model,
        data=PairData(
            train=(),
            tokenizer=WordPiece(class_token=True),
            augmentation=RandomResizedCrop(
                scale=(0.4, 1.0),
                flip=0.0,
                tries=100,
                fallback="clamp",
                interpolation="bilinear",
            ),
            color=color,
        ),
        reduction=Reductions(image=image, text=text),
        objective=Contrastive(),
        optimizer=AdamW(
            learning_rate_per_256=learning_rate_per_256,
            no_decay=("vector", "position", "class_token", "embedding"),
        ),
        schedule=WarmupCosine(samples=steps * batch_size, warmup_samples=warmup_steps * batch_size),
        batch_size=batch_size,
        engine=_RECOMPUTE,
        evaluation=(
            ZeroShot(templates="imagenet_80", crop=_STRETCH, reduce_prompts=text is _SYNTAX),
            Retrieval(crop=_STRETCH),
        ),
    )


def _v2_pretraining(
    name: str,
    *,
    image_size: int = 84,
    learning_rate_per_256: float = 8e-6,
    warmup_steps: int = 3_200,
    color: ColorJitter = _COLOR,
) -> Recipe:
    """12.8 billion samples of small images and 8 syntax-masked tokens."""
    return _v2(
        clipa_encoder(name, image_size=image_size, text_length=8),
        learning_rate_per_256=learning_rate_per_256,
        batch_size=65_536,
        steps=195_490,
        warmup_steps=warmup_steps,
        text=_SYNTAX,
        color=color,
    )


def _v2_tuning_224(
    name: str,
    *,
    batch_size: int = 32_768,
    learning_rate_per_256: float = 4e-7,
    steps: int = 16_000,
    warmup_steps: int = 800,
    mask_ratio: float = 0.3,
    color: ColorJitter = _COLOR,
) -> Recipe:
    """224 pixels, of whose patches a part goes, and 32 text tokens."""
    recipe = _v2(
        clipa_encoder(name),
        learning_rate_per_256=learning_rate_per_256,
        batch_size=batch_size,
        steps=steps,
        warmup_steps=warmup_steps,
        image=RandomMasking(mask_ratio=mask_ratio) if mask_ratio else _KEEP_ALL,
        color=color,
    )
    return replace(recipe, run=_INTERPOLATE)


def _v2_tuning_336(name: str) -> Recipe:
    """336 pixels, of whose patches 40 % go."""
    recipe = _v2(
        clipa_encoder(name, image_size=336),
        learning_rate_per_256=1e-7,
        batch_size=16_384,
        steps=8_000,
        warmup_steps=1_600,
        image=RandomMasking(mask_ratio=0.4),
    )
    return replace(recipe, run=_INTERPOLATE)


def vit_l14_i36_t8() -> Recipe:
    """ViT-L/14 on 84-pixel images and 8 text tokens; 72.7 % on DataComp-1B before fine-tuning."""
    return _v2_pretraining("L/14", warmup_steps=800, color=NO_CHANGE)


def vit_l14_i36_t8_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-l14-i36-t8`` at 224 pixels, 30 % of the patches removed; 79.7 %."""
    return _v2_tuning_224("L/14")


def vit_l14_i36_t8_tuning_336() -> Recipe:
    """Fine-tuning of ``vit-l14-i36-t8-tuning-224`` at 336 pixels; 80.3 %."""
    return _v2_tuning_336("L/14")


def vit_h14_i36_t8() -> Recipe:
    """ViT-H/14 on 84-pixel images and 8 text tokens; 75.6 % on DataComp-1B before fine-tuning."""
    return _v2_pretraining("H/14")


def vit_h14_i25_t8() -> Recipe:
    """ViT-H/14 on 70-pixel images and 8 text tokens; 70.1 % on LAION-2B before fine-tuning."""
    return _v2_pretraining("H/14", image_size=70)


def vit_h14_i25_t8_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-h14-i25-t8`` at 224 pixels, 30 % of the patches removed; 81.1 %."""
    return _v2_tuning_224("H/14")


def vit_h14_i36_t8_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-h14-i36-t8`` at 224 pixels, 30 % of the patches removed; 81.5 %."""
    return _v2_tuning_224("H/14")


def vit_h14_i36_t8_plain_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-h14-i36-t8`` at 224 pixels on whole images."""
    return _v2_tuning_224(
        "H/14",
        batch_size=16_384,
        learning_rate_per_256=8e-7,
        steps=8_000,
        warmup_steps=1_600,
        mask_ratio=0.0,
        color=NO_CHANGE,
    )


def vit_h14_i36_t8_tuning_336() -> Recipe:
    """Fine-tuning of ``vit-h14-i36-t8-tuning-224`` at 336 pixels; 81.8 %."""
    return _v2_tuning_336("H/14")


def vit_bigg14_i36_t8() -> Recipe:
    """ViT-bigG/14 on 84-pixel images and 8 text tokens; 78.5 % before fine-tuning."""
    return _v2_pretraining("bigG/14", learning_rate_per_256=4e-6)


def vit_bigg14_i36_t8_tuning_224() -> Recipe:
    """Fine-tuning of ``vit-bigg14-i36-t8`` at 224 pixels, 40 % of the patches removed; 82.5 %."""
    return _v2_tuning_224(
        "bigG/14", batch_size=16_384, steps=32_000, warmup_steps=0, mask_ratio=0.4
    )


def vit_bigg14_i36_t8_tuning_336() -> Recipe:
    """Fine-tuning of ``vit-bigg14-i36-t8-tuning-224`` at 336 pixels; 83.0 %."""
    return _v2_tuning_336("bigG/14")


def released(model: DualEncoderConfig) -> Recipe:
    """The recipe that belongs to published weights: how their images and captions are read.

    The towers of the first version are told by the norm before their blocks.
    """
    if model.image.pre_norm:
        return replace(vit_b16_i50_t16_tuning_224(), model=model)
    return replace(vit_h14_i36_t8_plain_tuning_224(), model=model)


# ------------------------------------------------------------------------------------------------
# A small model for two cores


def demo() -> Recipe:
    """A small CLIP on scenes of 32 pixels: 16 of the 64 patches of whole images; minutes."""
    model = small_encoder(patch_size=8, image_size=32, text_length=16)
    return scenes_recipe(model, image=KeepAll())


def demo_tuning() -> Recipe:
    """The short stage on 64 pixels after ``demo``; give its run with --run.start-from."""
    small = demo()
    return replace(
        small,
        model=small_encoder(patch_size=8, image_size=64, text_length=24),
        optimizer=replace(small.optimizer, learning_rate=1e-3),
        schedule=WarmupCosine(samples=60_000, warmup_samples=5_000),
        run=replace(small.run, interpolate=True),
    )


RECIPES = {
    "demo": demo,
    "demo-tuning": demo_tuning,
    "vit-b16-i50-t16": vit_b16_i50_t16,
    "vit-b16-i50-t16-tuning-224": vit_b16_i50_t16_tuning_224,
    "vit-l16-i17-t16": vit_l16_i17_t16,
    "vit-l16-i17-t16-tuning-224": vit_l16_i17_t16_tuning_224,
    "vit-l16-i37-t8": vit_l16_i37_t8,
    "vit-l16-i37-t8-tuning-224": vit_l16_i37_t8_tuning_224,
    "vit-l14-i36-t8": vit_l14_i36_t8,
    "vit-l14-i36-t8-tuning-224": vit_l14_i36_t8_tuning_224,
    "vit-l14-i36-t8-tuning-336": vit_l14_i36_t8_tuning_336,
    "vit-h14-i36-t8": vit_h14_i36_t8,
    "vit-h14-i25-t8": vit_h14_i25_t8,
    "vit-h14-i25-t8-tuning-224": vit_h14_i25_t8_tuning_224,
    "vit-h14-i36-t8-tuning-224": vit_h14_i36_t8_tuning_224,
    "vit-h14-i36-t8-plain-tuning-224": vit_h14_i36_t8_plain_tuning_224,
    "vit-h14-i36-t8-tuning-336": vit_h14_i36_t8_tuning_336,
    "vit-bigg14-i36-t8": vit_bigg14_i36_t8,
    "vit-bigg14-i36-t8-tuning-224": vit_bigg14_i36_t8_tuning_224,
    "vit-bigg14-i36-t8-tuning-336": vit_bigg14_i36_t8_tuning_336,
}
