"""Linear probing: a linear layer is trained on the normalized features of a frozen image tower.

Source: MAE (arXiv:2111.06377, appendix A.3) and MILAN (arXiv:2208.06049).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.checkpoint.init_from import init_encoder
from frugal.common.contracts import Batch, Initializer, Objective, Tower
from frugal.common.distributed import mean_over_valid, place_in_world, sum_over_processes
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import ObjectiveConfig, Recipe, model_of
from frugal.common.reduction.image import ImageReduction, PatchView
from frugal.common.transfer.classification import (
    batch_labels,
    build_classifier,
    check_classifier,
    forward_flops,
    token_metrics,
)
from frugal.common.transfer.classifier import ClassifierConfig, VisionClassifier
from frugal.common.transfer.pixels import side_by_side

_Statistics = Literal["all_processes", "each_process"]


@dataclass(frozen=True, kw_only=True)
class LinearProbing(ObjectiveConfig):
    """Tell the class of an image by a linear layer on the normalized features of a frozen tower."""

    statistics: _Statistics = "all_processes"
    """Whose features the batch norm before the linear layer is computed from. Published runs
    computed it on every GPU for itself; together, the number of processes changes nothing."""

    @override
    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that does not train a probe."""
        check_classifier(recipe)
        if drop_path := model_of(ClassifierConfig, recipe.model).image.drop_path:
            raise InputError(
                f"model.image.drop_path is {drop_path}, but the tower of a "
                "linear probe is frozen; set it to 0"
            )

    @override
    def build(self, recipe: Recipe) -> ProbeObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        return ProbeObjective(
            build_classifier(recipe), self, reduction=recipe.reduction.image, seed=recipe.run.seed
        )


class ProbeObjective(Objective):
    """Images of a batch to their cross-entropy; a batch norm and a linear layer are trained."""

    model: VisionClassifier

    def __init__(
        self,
        model: VisionClassifier,
        config: LinearProbing,
        *,
        reduction: ImageReduction,
        seed: int,
    ) -> None:
        """Take the model, freeze its tower and put a batch norm before its linear layer.

        Args:
            model: the classifier.
            config: what the batch norm is computed from.
            reduction: which patches stay.
            seed: the run's.
        """
        super().__init__()
        norm = FeatureNorm(model.config.image.width, of=config.statistics)
        model.head = nn.Sequential(norm, model.head)
        model.freeze_features()
        self.model = model
        self.reduction = reduction
        self._seed = seed

    @override
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of the loss over the processes is that of their joint batch."""
        labels = batch_labels(batch)
        view = PatchView.of(batch.images, self.model.config.image)
        kept = self.reduction.keep(view, noise=SampleNoise(self._seed, batch.sample_numbers))
        norm, linear = self.model.head.children()
        with torch.no_grad():
            features = self.model.features(batch.images, kept)  # (B, D)
        scores = linear(norm(features, batch.valid)).float()  # (B, C)
        losses = F.cross_entropy(scores, labels, reduction="none")
        right = (scores.detach().argmax(1) == labels).float()
        metrics = {
            **token_metrics(self.model, kept, batch),
            "accuracy": mean_over_valid(right, batch.valid),
        }
        return mean_over_valid(losses, batch.valid), metrics

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
        if source is None:
            raise InputError(
                "a linear probe measures an encoder: give a pretraining run or a file of weights "
                "with --run.start-from"
            )
        init_encoder(self.model.image, source, start)

    @override
    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward FLOPs of one sample; what the linear layer needs backward does not count."""
        return forward_flops(self.model, metrics)

    def draw(self, batch: Batch) -> np.ndarray:
        """Images as the model sees them: (3, H, B W) uint8."""
        return side_by_side(batch.images, self.model.config.image)


class FeatureNorm(nn.Module):
    """Batch norm of features that carry no gradient, without learned factors.

    Buffers have the names of ``nn.BatchNorm1d`` and its meaning: ``running_var`` is unbiased.
    """

    epsilon = 1e-6
    momentum = 0.1

    def __init__(self, width: int, *, of: _Statistics) -> None:
        super().__init__()
        self._of = of
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, D) float32, normalized by the batch in training and by what was seen otherwise.

        Args:
            features: (B, D).
            valid: (B,) bool; other rows count nowhere.
        """
        features = features.float()
        mean, variance = self.running_mean, self.running_var
        if self.training:
            if valid is None:
                valid = torch.ones(len(features), dtype=torch.bool, device=features.device)
            mean, variance = self._measure(features, valid)
        return (features - mean) * (variance + self.epsilon).rsqrt()

    @torch.no_grad()
    def _measure(self, features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (D,) of a batch, remembered in the running ones."""
        weight = valid.float()[:, None]  # (B, 1)
        count = self._total(weight.sum()).clamp(min=1)
        mean = self._total((features * weight).sum(0)) / count
        variance = self._total(((features - mean).square() * weight).sum(0)) / count
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(self._shared(mean), self.momentum)
        self.running_var.lerp_(self._shared(unbiased), self.momentum)
        self.num_batches_tracked += 1
        return mean, variance

    def _total(self, local: Tensor) -> Tensor:
        """The sum over the processes whose features count."""
        return sum_over_processes(local) if self._of == "all_processes" else local

    def _shared(self, statistic: Tensor) -> Tensor:
        """What all processes remember: where each counts for itself, their mean."""
        if self._of == "all_processes":
            return statistic
        return sum_over_processes(statistic) / place_in_world()[1]
