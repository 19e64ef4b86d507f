"""Semantic segmentation on an image tower: the class of every pixel, every weight trained.

Source: MAE (arXiv:2111.06377, appendix A.4) and BEiT (arXiv:2106.08254).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from frugal.common.checkpoint.init_from import init_encoder
from frugal.common.contracts import Batch, Initializer, Objective, Tower
from frugal.common.distributed import mean_over_valid
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.vit import ImageTower
from frugal.common.randomness import SampleNoise, weight_generator
from frugal.common.ranges import Positive, check_ranges
from frugal.common.recipe import ObjectiveConfig, Recipe, model_of
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.masked_folder import IGNORED, PADDING
from frugal.common.transfer.photometric import PhotometricDistortion
from frugal.common.transfer.pixels import gray_levels, normalized, paint
from frugal.common.transfer.segmentation_data import SegmentationData
from frugal.common.transfer.segmenter import Segmenter, SegmenterConfig, enlarged, segmenter_flops


@dataclass(frozen=True, kw_only=True)
class Segmentation(ObjectiveConfig):
    """Tell the class of every pixel; every weight is trained."""

    auxiliary_weight: Positive = 0.4
    """Of the loss of the auxiliary head, which looks at the third level alone."""
    distortion: PhotometricDistortion = field(default_factory=PhotometricDistortion)
    """Random changes of color, made on the device."""
    from_scratch: bool = False
    """Train random weights, without --run.start-from."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective")

    @override
    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that does not train a segmenter."""
        if not isinstance(recipe.data, SegmentationData):
            raise InputError(
                "a segmenter needs a class for every pixel, but data is "
                f"{type(recipe.data).__name__}; choose SegmentationData"
            )
        if not isinstance(recipe.model, SegmenterConfig):
            raise InputError(
                "a segmenter needs a model with classes for pixels "
                "(frugal.common.transfer.segmenter.SegmenterConfig), not "
                f"{type(recipe.model).__name__}"
            )
        if recipe.model.image.positions != "learned":
            raise InputError(
                f"model.image.positions is {recipe.model.image.positions!r}, but a segmenter has "
                "its positions as weights; choose learned, which starts from the encoder's table"
            )
        if not isinstance(recipe.reduction.image, KeepAll) or recipe.reduction.text is not None:
            raise InputError(
                "a segmenter sees every patch and reads no captions; leave out reduction.image and "
                "reduction.text"
            )
        if recipe.engine.cache_chunk is not None:
            raise InputError(
                "engine.cache_chunk is for losses that compare samples with each other; for a "
                "segmenter use engine.accumulate"
            )
        if recipe.batch_size // recipe.engine.accumulate < 2:
            raise InputError(
                f"a batch_size of {recipe.batch_size} with engine.accumulate = "
                f"{recipe.engine.accumulate} leaves one picture at a time, too few for batch norm; "
                "give at least 2"
            )
        if self.from_scratch and recipe.run.start_from is not None:
            raise InputError(
                f"objective.from_scratch trains random weights, but run.start_from is "
                f"{recipe.run.start_from}; choose one of them"
            )

    @override
    def build(self, recipe: Recipe) -> SegmentationObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        model = model_of(SegmenterConfig, recipe.model).build(weight_generator(recipe.run.seed))
        return SegmentationObjective(model, self, seed=recipe.run.seed)


class SegmentationObjective(Objective):
    """Images of a batch to the cross-entropy of their pixels, every weight trained."""

    model: Segmenter

    def __init__(self, model: Segmenter, config: Segmentation, *, seed: int) -> None:
        """Take the model and train it.

        Args:
            model: the segmenter.
            config: the weight of the auxiliary head; how colors are changed.
            seed: the run's; with the number of a sample it decides about every change.
        """
        super().__init__()
        self.model = model
        self._config = config
        self._seed = seed

    @override
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of the loss over the processes is that of their joint batch.

        Every pixel counts alike that has a class; others, and damaged samples, count nowhere, in
        batch norm neither.
        """
        images, labels = self._seen(batch)
        known = labels != IGNORED  # (B, H, W)
        main, auxiliary = (enlarged(scores, labels.shape[1:]) for scores in self.model.both(images))
        main_loss, auxiliary_loss = (
            mean_over_valid(_losses(scores, labels), known) for scores in (main, auxiliary)
        )
        right = (main.detach().argmax(1) == labels).float()
        tower = self.model.config.image
        metrics = {
            "main_loss": main_loss.detach(),
            "auxiliary_loss": auxiliary_loss.detach(),
            "pixel_accuracy": mean_over_valid(right, known),
            "image_tokens": main_loss.new_full((), _tokens(tower)),
        }
        return main_loss + self._config.auxiliary_weight * auxiliary_loss, metrics

    @override
    def counted(self, batch: Batch) -> Tensor:
        """(): the pixels that have a class."""
        assert batch.labels is not None
        has_class = (batch.labels != PADDING) & (batch.labels != IGNORED)  # (B, H, W)
        return (has_class & batch.valid[:, None, None]).sum()

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalized images (B, 3, H, W) and labels (B, H, W) int64 of the samples that count."""
        assert batch.labels is not None
        images, labels, numbers = batch.images, batch.labels, batch.sample_numbers
        if batch.damage:  # known without asking the device
            images, labels, numbers = (part[batch.valid] for part in (images, labels, numbers))
        images = self._config.distortion.apply(images, noise=SampleNoise(self._seed, numbers))
        images = normalized(images, self.model.config.image)
        is_padding = labels == PADDING
        images = images.masked_fill(is_padding[:, None], 0.0)
        return images, labels.long().masked_fill(is_padding, IGNORED)

    @override
    def towers(self) -> Sequence[Tower]:
        """The tower; heads are small."""
        return (self.model.image,)

    @override
    def init_from(self, source: Path | ModelBundle | None, start: Initializer) -> None:
        """Take the tower of a pretraining run or file.

        Raises:
            InputError: if there is no source, or its tower is not the model's.
        """
        if source is not None:
            init_encoder(self.model.image, source, start)
        elif not self._config.from_scratch:
            raise InputError(
                "segmentation needs an encoder: give a pretraining run or a file of weights with "
                "--run.start-from, or train random weights with --objective.from-scratch"
            )

    @override
    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample; the backward pass costs twice the forward."""
        del metrics
        return 3 * segmenter_flops(self.model.config)

    @torch.no_grad()
    def draw(self, batch: Batch) -> np.ndarray:
        """Images as the model sees them above their classes: (3, 2 H, B W) uint8."""
        images, labels = self._seen(batch)
        classes = paint(labels.cpu().numpy(), self.model.config.num_classes)  # (B, 3, H, W)
        pixels = gray_levels(images, self.model.config.image).cpu()
        both = torch.cat([pixels, torch.from_numpy(classes)], dim=2)
        return both.permute(1, 2, 0, 3).flatten(2).numpy()


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    """(B, H, W) cross-entropies of (B, C, H, W) scores; 0 where a label is ignored."""
    return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")


def _tokens(tower: ImageTower) -> float:
    return float(tower.num_patches + (tower.class_token != "none"))
