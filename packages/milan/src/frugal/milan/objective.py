"""A part of every image is seen, and what is to be said of all of it is predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from frugal.common.contracts import Batch, ImageReduction
from frugal.common.errors import InputError
from frugal.common.objectives.gather import gather_values, place_in_world
from frugal.common.randomness import SampleNoise, weight_generator
from frugal.common.recipe import Recipe
from frugal.common.reduction.image import PatchView
from frugal.milan.decoders import Split
from frugal.milan.model import MaskedImageModel
from frugal.milan.pictures import draw_reconstruction
from frugal.milan.settings import ReconstructFeatures, ReconstructPixels
from frugal.milan.targets import FeatureTarget, PixelTarget, Target, Wanted
from frugal.milan.teacher import load_teacher

if TYPE_CHECKING:
    import numpy as np


class Reconstruction(nn.Module):
    """Images to the loss of what is predicted of them (arXiv:2208.06049).

    The target is no module: a teacher in it is frozen and belongs to nobody's optimizer.
    """

    def __init__(
        self,
        model: MaskedImageModel,
        target: Target,
        *,
        reduction: ImageReduction,
        seed: int,
        samples: int | None = None,
    ) -> None:
        """Take the model and train it.

        Args:
            model: encoder and decoder, with as many outputs as the target has.
            target: what is predicted.
            reduction: which patches are seen; its noise is a function of seed and sample.
            seed: the run's.
            samples: that the run trains on, for reductions that change on the way.
        """
        super().__init__()
        self.model = model
        self.target = target
        self.reduction = reduction
        self._seed = seed
        self._samples = samples

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of the loss over the processes is that of their joint batch."""
        wanted, split, losses = self._predict(batch)
        weights = _weights(batch.valid)
        visible, patches = split.visible.shape[1], self.model.config.image.num_patches
        values = self._report(losses.detach(), wanted, split)
        metrics = {name: _weighted(value, weights) for name, value in values.items()}
        metrics["image_tokens"] = losses.new_full((), 1 + visible)
        metrics["mask_ratio"] = losses.new_full((), 1 - visible / patches)
        return _weighted(losses.mean(1), weights), metrics

    def look(self, batch: Batch) -> tuple[PatchView, SampleNoise]:
        """What the image reduction sees of a batch, and where it gets its random numbers."""
        return self._view(batch, self.target.look(batch.images))

    def _view(self, batch: Batch, wanted: Wanted) -> tuple[PatchView, SampleNoise]:
        images, numbers = batch.images, batch.sample_numbers
        view = PatchView.of(
            images,
            self.model.config.image,
            embed=lambda: self.model.image(images, output="embedded"),
            progress=None if self._samples is None else numbers / self._samples,
            importance=wanted.importance,
        )
        return view, SampleNoise(self._seed, numbers)

    def _split(self, batch: Batch, wanted: Wanted) -> Split:
        view, noise = self._view(batch, wanted)
        kept = self.reduction.keep(view, noise=noise)
        name = type(self.reduction).__name__
        if kept is None or (not kept.is_packed and kept.index.shape[1] == view.num_patches):
            raise InputError(
                f"reduction.image {name} keeps every patch, so that nothing is left to "
                "reconstruct; choose another one"
            )
        if kept.is_packed:
            raise InputError(
                f"reduction.image {name} keeps another number of patches of every image, but "
                "reconstruction needs equally many; choose another one"
            )
        return Split.of(kept, view.num_patches)

    def _predict(self, batch: Batch) -> tuple[Wanted, Split, Tensor]:
        """What is wanted, what is seen, and (B, T) the loss of every predicted token."""
        wanted = self.target.look(batch.images)
        split = self._split(batch, wanted)
        predicted = self.model(batch.images, split, hidden_only=self.target.hidden_only)
        return wanted, split, self.target.losses(predicted, wanted, split)

    def _report(self, losses: Tensor, wanted: Wanted, split: Split) -> dict[str, Tensor]:
        """(B,) what to look at beside the loss, where there is a teacher."""
        if wanted.importance is None or self.target.hidden_only:
            return {}
        seen = 1 + split.visible.shape[1]
        share = wanted.importance.gather(1, split.visible).sum(1) / wanted.importance.sum(1)
        return {
            "cosine_visible": 1 - losses[:, :seen].mean(1) / 2,
            "cosine_hidden": 1 - losses[:, seen:].mean(1) / 2,
            "importance_seen": share,
        }

    def bounds(self) -> dict[str, tuple[float, float]]:
        """No parameter has any."""
        return {}

    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample, and what looking at it costs.

        The backward pass costs twice the forward; a teacher has none.
        """
        return 3 * self.model.flops(metrics["image_tokens"] - 1) + self.target.flops()

    @torch.no_grad()
    def draw(self, batch: Batch) -> np.ndarray:
        """(3, H*, W*) uint8: images, what is seen of them, and how well the rest is predicted."""
        wanted, split, losses = self._predict(batch)
        return draw_reconstruction(
            batch.images,
            self.model.config.image,
            split,
            importance=wanted.importance,
            losses=losses,
            hidden_only=self.target.hidden_only,
        )


def _weights(valid: Tensor) -> Tensor:
    """(B,) such that the mean over the processes of weighted sums is the mean of valid samples."""
    count = gather_values(valid.sum()[None]).sum().clamp(min=1)
    return valid * (place_in_world()[1] / count)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of (B,) values; what has no weight does not count even if not finite."""
    return (values.where(weights > 0, 0.0) * weights).sum()


def reconstruct_features(config: ReconstructFeatures, recipe: Recipe) -> Reconstruction:
    """See :meth:`frugal.milan.settings.ReconstructFeatures.build`."""
    teacher = load_teacher(config.teacher, recipe.model.image)
    if recipe.engine.compile:
        teacher.compile()
    return _reconstruction(FeatureTarget(teacher), recipe)


def reconstruct_pixels(config: ReconstructPixels, recipe: Recipe) -> Reconstruction:
    """See :meth:`frugal.milan.settings.ReconstructPixels.build`."""
    target = PixelTarget(recipe.model.image, normalize_patches=config.normalize_patches)
    return _reconstruction(target, recipe)


def _reconstruction(target: Target, recipe: Recipe) -> Reconstruction:
    model: Any = recipe.model.build(weight_generator(recipe.run.seed), outputs=target.outputs)
    model.checkpoint_activations = recipe.engine.checkpoint_activations
    if recipe.engine.compile:
        model.image.compile()
        model.decoder.compile()
    return Reconstruction(
        model,
        target,
        reduction=recipe.reduction.image,
        seed=recipe.run.seed,
        samples=recipe.schedule.samples,
    )
