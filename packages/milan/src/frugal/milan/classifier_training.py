"""What trains a classifier: all of it (fine-tuning), or its last layer (linear probe)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.contracts import Batch, ImageReduction
from frugal.common.errors import InputError
from frugal.common.models.config import ImageTower
from frugal.common.models.flops import image_flops
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import Kept, PatchView
from frugal.milan.classification import Classification, LinearProbe
from frugal.milan.classifier import FeatureNorm, VisionClassifier, mean_over_valid
from frugal.milan.encoder_start import start_encoder, start_head
from frugal.milan.mixing import mix, swap_neighbors

if TYPE_CHECKING:
    import numpy as np


class ClassificationObjective(nn.Module):
    """Images of a batch to their cross-entropy, every weight trained."""

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

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of the loss over the processes is that of their joint batch.

        Raises:
            InputError: if the batch cannot be mixed.
        """
        labels = batch_labels(batch)
        images, shares = self._changed(batch)
        kept = _keep(self.reduction, images, batch, self.model, self._seed)
        scores = self.model(images, kept).float()  # (B, C)
        losses = smoothed_cross_entropy(scores, labels, shares, smoothing=self._config.smoothing)
        metrics = _token_metrics(self.model, kept, batch)
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
        images = _normalized(images, self.model.config.image)
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

    def start_from(self, source: Path | None, *, interpolate: bool, log: logging.Logger) -> None:
        """Take the tower of a pretraining run or file, and the head where it fits.

        Raises:
            InputError: if there is no source, or its tower is not the model's.
        """
        if source is not None:
            found = start_encoder(self.model, source, interpolate=interpolate, log=log)
            start_head(self.model, found, log=log)
        elif not self._config.from_scratch:
            raise InputError(
                "fine-tuning needs an encoder: give a pretraining run or a file of weights with "
                "--run.start-from, or train random weights with --objective.from-scratch"
            )

    def bounds(self) -> dict[str, tuple[float, float]]:
        """None: no parameter is kept within bounds."""
        return {}

    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample; the backward pass costs twice the forward."""
        return 3 * _forward_flops(self.model, metrics)

    @torch.no_grad()
    def draw(self, batch: Batch) -> np.ndarray:
        """Images as the model sees them: (3, H, B W) uint8."""
        if len(batch) % 2 and not self._config.mixing.is_off:
            batch = batch.rows(0, len(batch) - 1)
        images, _ = self._changed(batch)
        return _picture(images, self.model.config.image)


class ProbeObjective(nn.Module):
    """Images of a batch to their cross-entropy; a batch norm and a linear layer are trained."""

    def __init__(
        self,
        model: VisionClassifier,
        config: LinearProbe,
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

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of the loss over the processes is that of their joint batch."""
        labels = batch_labels(batch)
        kept = _keep(self.reduction, batch.images, batch, self.model, self._seed)
        norm, linear = self.model.head.children()
        with torch.no_grad():
            features = self.model.features(batch.images, kept)  # (B, D)
        scores = linear(norm(features, batch.valid)).float()  # (B, C)
        losses = F.cross_entropy(scores, labels, reduction="none")
        right = (scores.detach().argmax(1) == labels).float()
        metrics = {
            **_token_metrics(self.model, kept, batch),
            "accuracy": mean_over_valid(right, batch.valid),
        }
        return mean_over_valid(losses, batch.valid), metrics

    def start_from(self, source: Path | None, *, interpolate: bool, log: logging.Logger) -> None:
        """Take the tower of a pretraining run or file.

        Raises:
            InputError: if there is no source, or its tower is not the model's.
        """
        if source is None:
            raise InputError(
                "a linear probe measures an encoder: give a pretraining run or a file of weights "
                "with --run.start-from"
            )
        start_encoder(self.model, source, interpolate=interpolate, log=log)

    def bounds(self) -> dict[str, tuple[float, float]]:
        """None: no parameter is kept within bounds."""
        return {}

    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward FLOPs of one sample; what the linear layer needs backward does not count."""
        return _forward_flops(self.model, metrics)

    def draw(self, batch: Batch) -> np.ndarray:
        """Images as the model sees them: (3, H, B W) uint8."""
        return _picture(batch.images, self.model.config.image)


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
    own = log_probabilities.gather(1, labels[:, None])[:, 0]
    if shares is not None:
        other = log_probabilities.gather(1, swap_neighbors(labels)[:, None])[:, 0]
        own = shares * own + (1 - shares) * other
    return -(1 - smoothing) * own - smoothing * log_probabilities.mean(1)


def _keep(
    reduction: ImageReduction, images: Tensor, batch: Batch, model: VisionClassifier, seed: int
) -> Kept | None:
    view = PatchView.of(images, model.config.image)
    return reduction.keep(view, noise=SampleNoise(seed, batch.sample_numbers))


def _token_metrics(model: VisionClassifier, kept: Kept | None, batch: Batch) -> dict[str, Tensor]:
    tower = model.config.image
    patches = batch.sample_numbers.new_full((len(batch),), tower.num_patches)
    counts = patches if kept is None else kept.counts
    return {"image_tokens": counts.float().mean() + (tower.class_token != "none")}


def _forward_flops(model: VisionClassifier, metrics: dict[str, float]) -> float:
    tower = model.config.image
    patches = metrics["image_tokens"] - (tower.class_token != "none")
    return image_flops(tower, patches) + 2 * tower.width * model.config.num_classes


def _channels(values: Any, images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device).view(3, 1, 1)


def _normalized(images: Tensor, tower: ImageTower) -> Tensor:
    """(B, 3, H, W) float32 as the tower takes it."""
    if images.dtype != torch.uint8:
        return images
    return (images / 255 - _channels(tower.mean, images)) / _channels(tower.std, images)


def _picture(images: Tensor, tower: ImageTower) -> np.ndarray:
    """(B, 3, H, W) images beside each other: (3, H, B W) uint8."""
    if images.dtype != torch.uint8:
        levels = images * _channels(tower.std, images) + _channels(tower.mean, images)
        images = (levels * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(1, 2, 0, 3).flatten(2).cpu().numpy()
