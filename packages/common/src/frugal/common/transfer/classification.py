"""Fine-tuning of an image tower on images with classes, every weight trained.

Source: MAE (arXiv:2111.06377, appendix A.2) and MILAN (arXiv:2208.06049). Linear probing, which
does much alike, takes it from here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.checkpoint.init_from import init_encoder
from frugal.common.contracts import Batch, Initializer, Objective, Tower
from frugal.common.data.config import ImageData
from frugal.common.distributed import mean_over_valid
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.flops import image_flops
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.randomness import SampleNoise, weight_generator
from frugal.common.ranges import Range, check_ranges
from frugal.common.recipe import ObjectiveConfig, Recipe, model_of
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.transfer.classifier import ClassifierConfig, VisionClassifier
from frugal.common.transfer.mixing import Mixing, RandomErasing, mix, swap_neighbors
from frugal.common.transfer.pixels import normalized, side_by_side

_Smoothing = Annotated[float, Range(least=0, below=1, words="must be at least 0 and less than 1")]


@dataclass(frozen=True, kw_only=True)
class Classification(ObjectiveConfig):
    """Tell the class of an image; every weight is trained."""

    smoothing: _Smoothing = 0.0
    """Share of every label that is spread over all classes."""
    erasing: RandomErasing = field(default_factory=lambda: RandomErasing(probability=0.0))
    """Noise in a random rectangle; by default none."""
    mixing: Mixing = field(default_factory=lambda: Mixing(mixup=0.0, cutmix=0.0))
    """Mixup and CutMix; by default neither."""
    from_scratch: bool = False
    """Train random weights, without --run.start-from."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective")

    @override
    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that does not train a classifier."""
        check_classifier(recipe)
        if self.from_scratch and recipe.run.start_from is not None:
            raise InputError(
                f"objective.from_scratch trains random weights, but run.start_from is "
                f"{recipe.run.start_from}; choose one of them"
            )

    @override
    def build(self, recipe: Recipe) -> ClassificationObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        return ClassificationObjective(
            build_classifier(recipe), self, reduction=recipe.reduction.image, seed=recipe.run.seed
        )


class ClassificationObjective(Objective):
    """Images of a batch to their cross-entropy, every weight trained."""

    model: VisionClassifier

    def __init__(
        self,
        model: VisionClassifier,
        config: Classification,
        *,
        reduction: ImageReduction,
        seed: int,
    ) -> None:
        """Take the model and train it.

        Args:
            model: the classifier.
            config: how images and labels are changed.
            reduction: which patches stay.
            seed: the run's; with the number of a sample it decides about every change.
        """
        super().__init__()
        self.model = model
        self.reduction = reduction
        self._config = config
        self._seed = seed

    @override
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of the loss over the processes is that of their joint batch.

        Raises:
            InputError: if the batch cannot be mixed.
        """
        labels = batch_labels(batch)
        images, shares = self._changed(batch)
        view = PatchView.of(images, self.model.config.image)
        kept = self.reduction.keep(view, noise=SampleNoise(self._seed, batch.sample_numbers))
        scores = self.model(images, kept).float()  # (B, C)
        losses = smoothed_cross_entropy(scores, labels, shares, smoothing=self._config.smoothing)
        metrics = token_metrics(self.model, kept, batch)
        if shares is None:
            right = (scores.detach().argmax(1) == labels).float()
            metrics["accuracy"] = mean_over_valid(right, batch.valid)
        return mean_over_valid(losses, batch.valid), metrics

    def _changed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The images that the model sees, and what each keeps of itself; None without mixing."""
        config, numbers = self._config, batch.sample_numbers
        images = batch.images
        if config.erasing.probability == 0 and config.mixing.is_off:
            return images, None
        images = normalized(images, self.model.config.image)
        images = config.erasing.apply(images, seed=self._seed, sample_numbers=numbers)
        if config.mixing.is_off:
            return images, None
        if len(batch) % 2:
            raise InputError(
                f"mixup and CutMix mix samples in pairs, but a micro-batch of a process holds "
                f"{len(batch)}; choose an even number, or set objective.mixing.mixup and "
                "objective.mixing.cutmix to 0"
            )
        height, width = images.shape[2:]
        shares, boxes = config.mixing.draw(height, width, seed=self._seed, sample_numbers=numbers)
        # a damaged sample is no partner: the other stays as it is
        mixes = batch.valid & swap_neighbors(batch.valid)
        return mix(images, shares, boxes, mixes=mixes), torch.where(mixes, shares, 1.0)

    @override
    def towers(self) -> Sequence[Tower]:
        """The tower; heads are small."""
        return (self.model.image,)

    @override
    def init_from(self, source: Path | ModelBundle | None, start: Initializer) -> None:
        """Take the tower of a pretraining run or file, and the head where it fits.

        Raises:
            InputError: if there is no source, or its tower is not the model's.
        """
        if source is not None:
            found = init_encoder(self.model.image, source, start)
            init_head(self.model, found, log=start.log)
        elif not self._config.from_scratch:
            raise InputError(
                "fine-tuning needs an encoder: give a pretraining run or a file of weights with "
                "--run.start-from, or train random weights with --objective.from-scratch"
            )

    @override
    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample; the backward pass costs twice the forward."""
        return 3 * forward_flops(self.model, metrics)

    @torch.no_grad()
    def draw(self, batch: Batch) -> np.ndarray:
        """Images as the model sees them: (3, H, B W) uint8."""
        if len(batch) % 2 and not self._config.mixing.is_off:
            batch = batch.rows(0, len(batch) - 1)
        images, _ = self._changed(batch)
        return side_by_side(images, self.model.config.image)


def init_head(model: VisionClassifier, found: ImageEncoder, *, log: logging.Logger) -> None:
    """Give a classifier the head of a fine-tuned model, and the norm before it, where they fit."""
    fresh = []
    for name, part in (("fc_norm", model.fc_norm), ("head", model.head)):
        needed = part.state_dict()
        stored = {n: found.rest[f"{name}.{n}"] for n in needed if f"{name}.{n}" in found.rest}
        fits = all(stored[n].shape == tensor.shape for n, tensor in needed.items() if n in stored)
        if stored.keys() == needed.keys() and fits:
            part.load_state_dict(stored)
        else:
            fresh.append(f"{name} (of another shape there)" if stored else name)
    if fresh:
        log.info("with new weights: %s", ", ".join(fresh))


def batch_labels(batch: Batch) -> Tensor:
    """(B,) int64.

    Raises:
        InputError: if the data has no classes.
    """
    if batch.labels is None:
        raise InputError(
            "a classifier needs the class of every image, but the data has none; give class "
            "folders, or tars with cls members"
        )
    return batch.labels


def smoothed_cross_entropy(
    scores: Tensor, labels: Tensor, shares: Tensor | None, *, smoothing: float
) -> Tensor:
    """(B,) cross-entropies against labels that are spread over the classes and mixed.

    Args:
        scores: (B, C) float32.
        labels: (B,) int64.
        shares: (B,) what of its label a mixed image keeps, the rest is its neighbor's; None for
            images that are not mixed.
        smoothing: s, so that a label is 1 - s + s / C for its class and s / C for others.
    """
    log_probabilities = scores.log_softmax(1)
    target = log_probabilities.gather(1, labels[:, None])[:, 0]
    if shares is not None:
        partner = log_probabilities.gather(1, swap_neighbors(labels)[:, None])[:, 0]
        target = shares * target + (1 - shares) * partner
    return -(1 - smoothing) * target - smoothing * log_probabilities.mean(1)


def token_metrics(
    model: VisionClassifier, kept: KeptPatches | None, batch: Batch
) -> dict[str, Tensor]:
    """``image_tokens``: the mean number of tokens that the tower saw of one image."""
    tower = model.config.image
    patches = batch.sample_numbers.new_full((len(batch),), tower.num_patches)
    counts = patches if kept is None else kept.counts
    return {"image_tokens": counts.float().mean() + (tower.class_token != "none")}


def forward_flops(model: VisionClassifier, metrics: dict[str, float]) -> float:
    """Forward FLOPs of one image, whose tokens are those of :func:`token_metrics`."""
    tower = model.config.image
    patches = metrics["image_tokens"] - (tower.class_token != "none")
    return image_flops(tower, patches) + 2 * tower.width * model.config.num_classes


def check_classifier(recipe: Recipe) -> None:
    """Refuse what no classifier can be trained with."""
    if not isinstance(recipe.data, ImageData):
        raise InputError(
            f"a classifier needs images with classes, but data is {type(recipe.data).__name__}; "
            "choose ImageData"
        )
    if not isinstance(recipe.model, ClassifierConfig):
        raise InputError(
            "a classifier needs a model with classes (frugal.common.transfer.classifier."
            f"ClassifierConfig), not {type(recipe.model).__name__}"
        )
    if recipe.model.image.positions != "learned":
        raise InputError(
            f"model.image.positions is {recipe.model.image.positions!r}, but a classifier has its "
            "positions as weights; choose learned, which starts from the encoder's table"
        )
    image = recipe.reduction.image
    if image.calibration_images:
        raise InputError(
            f"reduction.image looks for its {image.calibrated[0]} on the first images of a run, "
            f"which a classifier does not show; give --reduction.image.{image.calibrated[0]}"
        )
    if recipe.reduction.text is not None:
        raise InputError(
            "reduction.text is given, but a classifier reads no captions; leave it out"
        )
    if recipe.engine.cache_chunk is not None:
        raise InputError(
            "engine.cache_chunk is for losses that compare samples with each other; for a "
            "classifier use engine.accumulate"
        )


def build_classifier(recipe: Recipe) -> VisionClassifier:
    """The model of a recipe, with freshly drawn weights, on the CPU in float32."""
    return model_of(ClassifierConfig, recipe.model).build(weight_generator(recipe.run.seed))
