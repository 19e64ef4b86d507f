"""FLIP's named runs (arXiv:2212.00794): masked pre-training, unmasked tuning, ablations.

Every published run comes in two presets, which differ in five fields of the recipe and so in its
``recipe.json``: ``large`` repeats what was run (:data:`PARITY`), ``large-clean`` what was meant
(:data:`CLEAN`). Tuning is a recipe of its own, such as ``large-tuning``, that starts from a
finished run.

Durations are counted in samples. The reference counted in virtual epochs of 1,281,167 samples,
each cut down to whole steps; :meth:`Preset.samples` counts either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import WordPiece
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.demo import scenes_recipe, small_encoder
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import flip_encoder
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, Reductions, model_of
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import TextReduction, Truncate
from frugal.flip.text_masking import TextMasking

BATCH_SIZE = 65_536
VIRTUAL_EPOCH = 1_281_167
"""Samples after which the reference counts an epoch, whatever the data: ImageNet-1k's size."""
_WHOLE_TEXT = Truncate()
_CENTER = CenterCrop(order="crop_first")
_PUBLISHED_CENTER = CenterCrop(order="crop_first", interpolation="tf1_bicubic")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How true a recipe is to the published runs where these did what was hardly meant."""

    pad_mask: bool
    """No token of a caption sees padding (``model.text.pad_mask``)."""
    clamp: Literal["forward", "after_step"]
    """Where the logit scale is kept within its bounds (``objective.clamp``). In the forward pass
    only, a scale that left them gets no gradient, and weight decay alone brings it back."""
    no_decay: tuple[str, ...]
    """What weight decay spares (``optimizer.no_decay``)."""
    whole_steps: bool
    """Cut every virtual epoch down to whole steps: 19 instead of 19.55 at a batch of 65,536, which
    makes a run 2.8 % shorter than its name (``schedule.samples``, ``schedule.warmup_samples``)."""

    def samples(self, epochs: int, *, batch_size: int) -> int:
        """Samples in a number of virtual epochs."""
        surplus = VIRTUAL_EPOCH % batch_size if self.whole_steps else 0
        return epochs * (VIRTUAL_EPOCH - surplus)


PARITY = Preset(
    pad_mask=False,
    clamp="forward",
    no_decay=("bias", "norm", "position"),
    whole_steps=True,
)
"""The published runs as their code made them."""

CLEAN = Preset(
    pad_mask=True,
    clamp="after_step",
    no_decay=("bias", "norm", "position", "class_token", "logit_scale"),
    whole_steps=False,
)
"""The same with padding masked, class token and logit scale spared by weight decay, the scale
clamped after every step, and exactly the samples that the paper names."""


def _published(
    model: DualEncoderConfig,
    preset: Preset,
    *,
    epochs: int = 10_000,
    warmup_epochs: int = 40,
    learning_rate_per_256: float = 4e-6,
    batch_size: int = BATCH_SIZE,
    mask_ratio: float = 0.5,
    text: TextReduction = _WHOLE_TEXT,
) -> Recipe:
    """Masked pre-training; 10,000 virtual epochs are 32 of LAION-400M.

    Args:
        model: towers.
        preset: parity or clean.
        epochs: virtual ones.
        warmup_epochs: virtual ones among them.
        learning_rate_per_256: peak for a batch of 256, scaled with the batch.
        batch_size: over all processes.
        mask_ratio: fraction of the patches that goes.
        text: which tokens of a caption stay.
    """
    return Recipe(
        model=replace(model, text=replace(model.text, pad_mask=preset.pad_mask)),
        data=PairData(
            train=(),
            tokenizer=WordPiece(entries=30522),
            augmentation=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5),
        ),
        reduction=Reductions(image=RandomMasking(mask_ratio=mask_ratio), text=text),
        objective=Contrastive(clamp=preset.clamp),
        optimizer=AdamW(
            learning_rate_per_256=learning_rate_per_256,
            betas=(0.9, 0.95),
            weight_decay=0.2,
            no_decay=preset.no_decay,
        ),
        schedule=WarmupCosine(
            samples=preset.samples(epochs, batch_size=batch_size),
            warmup_samples=preset.samples(warmup_epochs, batch_size=batch_size),
        ),
        batch_size=batch_size,
        evaluation=(
            ZeroShot(crop=_CENTER, published_crop=_PUBLISHED_CENTER),
            Retrieval(crop=_CENTER, published_crop=_PUBLISHED_CENTER),
        ),
    )


# ------------------------------------------------------------------------------------------------
# Masked pre-training


def base(preset: Preset = PARITY) -> Recipe:
    """ViT-B/16 on LAION-400M, half of the patches removed; 68.0 % on ImageNet after tuning."""
    return _published(flip_encoder("B/16"), preset)


def large(preset: Preset = PARITY) -> Recipe:
    """ViT-L/16 on LAION-400M, half of the patches removed; 74.3 % on ImageNet after tuning."""
    return _published(flip_encoder("L/16"), preset)


def huge14(preset: Preset = PARITY) -> Recipe:
    """ViT-H/14 on LAION-400M, half of the patches removed; 75.5 % on ImageNet after tuning."""
    return _published(flip_encoder("H/14"), preset, warmup_epochs=200)


def large_laion2b(preset: Preset = PARITY) -> Recipe:
    """ViT-L/16 on LAION-2B for twice the samples; 76.6 % on ImageNet after tuning."""
    return _published(
        flip_encoder("L/16"), preset, epochs=20_000, warmup_epochs=40, learning_rate_per_256=2e-6
    )


def huge14_laion2b(preset: Preset = PARITY) -> Recipe:
    """ViT-H/14 on LAION-2B for twice the samples; 78.8 % on ImageNet after tuning."""
    return _published(
        flip_encoder("H/14"), preset, epochs=20_000, warmup_epochs=200, learning_rate_per_256=2e-6
    )


# ------------------------------------------------------------------------------------------------
# Unmasked tuning


def unmasked_tuning(
    pretrained: Recipe, preset: Preset = PARITY, *, image_size: int | None = None
) -> Recipe:
    """The short stage on whole images that follows a masked recipe (0.32 epochs of LAION-400M).

    Weights come from the finished run, optimizer and schedule start afresh.

    Args:
        pretrained: the recipe of that run.
        preset: the one it was made with.
        image_size: another one; the fixed position table is computed for the new grid.
    """
    recipe = replace(
        pretrained,
        reduction=replace(pretrained.reduction, image=KeepAll()),
        optimizer=replace(pretrained.optimizer, learning_rate_per_256=4e-8),
        schedule=WarmupCosine(
            samples=preset.samples(100, batch_size=pretrained.batch_size),
            warmup_samples=preset.samples(20, batch_size=pretrained.batch_size),
        ),
    )
    if image_size is None:
        return recipe
    model = model_of(DualEncoderConfig, recipe.model)
    return replace(
        recipe,
        model=replace(model, image=replace(model.image, image_size=image_size)),
        run=replace(recipe.run, interpolate=True),
    )


def base_tuning(preset: Preset = PARITY) -> Recipe:
    """Unmasked tuning of ``base``; give its run with --run.start-from."""
    return unmasked_tuning(base(preset), preset)


def large_tuning(preset: Preset = PARITY) -> Recipe:
    """Unmasked tuning of ``large``; give its run with --run.start-from."""
    return unmasked_tuning(large(preset), preset)


def large_tuning_336(preset: Preset = PARITY) -> Recipe:
    """Unmasked tuning of ``large`` at 336 pixels; give its run with --run.start-from."""
    return unmasked_tuning(large(preset), preset, image_size=336)


def huge14_tuning(preset: Preset = PARITY) -> Recipe:
    """Unmasked tuning of ``huge14``; give its run with --run.start-from."""
    return unmasked_tuning(huge14(preset), preset)


def large_laion2b_tuning(preset: Preset = PARITY) -> Recipe:
    """Unmasked tuning of ``large-laion2b``; give its run with --run.start-from."""
    return unmasked_tuning(large_laion2b(preset), preset)


def large_laion2b_tuning_336(preset: Preset = PARITY) -> Recipe:
    """Unmasked tuning of ``large-laion2b`` at 336 pixels; give its run with --run.start-from."""
    return unmasked_tuning(large_laion2b(preset), preset, image_size=336)


def huge14_laion2b_tuning(preset: Preset = PARITY) -> Recipe:
    """Unmasked tuning of ``huge14-laion2b``; give its run with --run.start-from."""
    return unmasked_tuning(huge14_laion2b(preset), preset)


# ------------------------------------------------------------------------------------------------
# The paper's ablations: ViT-L/16, 6.4 epochs of LAION-400M, no tuning. Their warm-up was not
# published; it is that of ``large``.


def _ablation(*, mask_ratio: float, batch_size: int, text: TextReduction = _WHOLE_TEXT) -> Recipe:
    return _published(
        flip_encoder("L/16"),
        PARITY,
        epochs=2_000,
        batch_size=batch_size,
        mask_ratio=mask_ratio,
        text=text,
    )


def ablation_mask0_16k() -> Recipe:
    """Whole images at a batch of 16,384; 68.6 % on ImageNet."""
    return _ablation(mask_ratio=0.0, batch_size=16_384)


def ablation_mask50_16k() -> Recipe:
    """Half of the patches removed at a batch of 16,384; 68.5 % on ImageNet."""
    return _ablation(mask_ratio=0.5, batch_size=16_384)


def ablation_mask50_32k() -> Recipe:
    """Half of the patches removed at a batch of 32,768; 69.6 % on ImageNet."""
    return _ablation(mask_ratio=0.5, batch_size=32_768)


def ablation_mask50_64k() -> Recipe:
    """Half of the patches removed at a batch of 65,536; 70.4 % on ImageNet."""
    return _ablation(mask_ratio=0.5, batch_size=65_536)


def ablation_mask75_16k() -> Recipe:
    """Three quarters of the patches removed at a batch of 16,384; 65.8 % on ImageNet."""
    return _ablation(mask_ratio=0.75, batch_size=16_384)


def ablation_mask75_32k() -> Recipe:
    """Three quarters of the patches removed at a batch of 32,768; 67.3 % on ImageNet."""
    return _ablation(mask_ratio=0.75, batch_size=32_768)


def ablation_mask75_64k() -> Recipe:
    """Three quarters of the patches removed at a batch of 65,536; 68.2 % on ImageNet."""
    return _ablation(mask_ratio=0.75, batch_size=65_536)


def ablation_text_random() -> Recipe:
    """``ablation-mask75-64k`` with half of every caption removed too; 66.0 % on ImageNet."""
    return _ablation(mask_ratio=0.75, batch_size=65_536, text=TextMasking(order="random"))


def ablation_text_pad_first() -> Recipe:
    """``ablation-mask75-64k`` with half of the text removed, padding first; 67.8 % on ImageNet."""
    return _ablation(mask_ratio=0.75, batch_size=65_536, text=TextMasking(order="padding_first"))


# ------------------------------------------------------------------------------------------------
# A small model for two cores


def demo() -> Recipe:
    """A small CLIP on the scenes data set, half of the patches removed; minutes on two cores."""
    model = small_encoder(patch_size=8, image_size=32, text_length=24)
    return scenes_recipe(model, image=RandomMasking(mask_ratio=0.5))


def demo_tuning() -> Recipe:
    """The short unmasked stage after ``demo``; give its run with --run.start-from."""
    masked = demo()
    return replace(
        masked,
        reduction=replace(masked.reduction, image=KeepAll()),
        optimizer=replace(masked.optimizer, learning_rate=1e-3),
        schedule=WarmupCosine(samples=160_000, warmup_samples=5_000),
    )


_Make = Callable[[Preset], Recipe]

_STAGES: dict[tuple[str, str], dict[str, _Make]] = {
    # names: the model's, and the same by model and data
    ("base", "vit-b16-laion400m"): {"": base, "-tuning": base_tuning},
    ("large", "vit-l16-laion400m"): {
        "": large,
        "-tuning": large_tuning,
        "-tuning-336": large_tuning_336,
    },
    ("huge14", "vit-h14-laion400m"): {"": huge14, "-tuning": huge14_tuning},
    ("large-laion2b", "vit-l16-laion2b"): {
        "": large_laion2b,
        "-tuning": large_laion2b_tuning,
        "-tuning-336": large_laion2b_tuning_336,
    },
    ("huge14-laion2b", "vit-h14-laion2b"): {
        "": huge14_laion2b,
        "-tuning": huge14_laion2b_tuning,
    },
}


def _in_preset(make: _Make, preset: Preset, description: str | None) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return make(preset)

    recipe.__doc__ = description
    return recipe


def _both_presets() -> dict[str, Callable[[], Recipe]]:
    """Every stage of every model under both of its names: large-tuning, large-clean-tuning..."""
    recipes = {}
    for names, stages in _STAGES.items():
        for name in names:
            for stage, make in stages.items():
                recipes[name + stage] = _in_preset(make, PARITY, make.__doc__)
            for stage, make in stages.items():
                description = f"``{name}{stage}`` in the clean preset; no published run."
                recipes[f"{name}-clean{stage}"] = _in_preset(make, CLEAN, description)
    return recipes


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "demo-tuning": demo_tuning,
    **_both_presets(),
    "ablation-mask0-16k": ablation_mask0_16k,
    "ablation-mask50-16k": ablation_mask50_16k,
    "ablation-mask50-32k": ablation_mask50_32k,
    "ablation-mask50-64k": ablation_mask50_64k,
    "ablation-mask75-16k": ablation_mask75_16k,
    "ablation-mask75-32k": ablation_mask75_32k,
    "ablation-mask75-64k": ablation_mask75_64k,
    "ablation-text-random": ablation_text_random,
    "ablation-text-pad-first": ablation_text_pad_first,
}
