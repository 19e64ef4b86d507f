"""MILAN's objectives: a part of every image is encoded, and targets of all of it are predicted.

Source: Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation",
arXiv:2208.06049; pixels and the plain decoder are those of MAE, arXiv:2111.06377.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.contracts import Batch, Objective, Tower
from frugal.common.distributed import gather, place_in_world
from frugal.common.errors import InputError
from frugal.common.randomness import SampleNoise, weight_generator
from frugal.common.recipe import ObjectiveConfig, Recipe, model_of
from frugal.common.reduction.image import ImageReduction, PatchView
from frugal.milan.decoders import Split
from frugal.milan.model import MaskedImageModel, MaskedModel
from frugal.milan.pictures import draw_reconstruction
from frugal.milan.targets import FeatureTarget, PixelTarget, Target, TargetValues
from frugal.milan.teacher import Teacher, load_teacher, outline_teacher


class _Reconstruct(ObjectiveConfig):
    takes_uneven: ClassVar[bool] = False

    def trained_model(self, recipe: Recipe, weights: Mapping[str, Tensor]) -> MaskedImageModel:
        """Encoder and decoder; the teacher is not needed."""
        model = model_of(MaskedModel, recipe.model)
        return model.build(outputs=len(weights["decoder.head.weight"]))


@dataclass(frozen=True, kw_only=True)
class ReconstructFeatures(_Reconstruct):
    """Predict the teacher's feature of every token, seen or hidden.

    The loss is the squared distance of unit vectors, from 0 to 4 (arXiv:2208.06049, section 3.1).
    """

    teacher: Teacher = field(default_factory=Teacher)

    knows_importance: ClassVar[bool] = True

    def check(self, recipe: Recipe) -> None:
        """Refuse what this objective cannot do."""
        _check(recipe)

    def build(self, recipe: Recipe) -> Reconstruction:
        """The objective with freshly drawn weights, on the CPU in float32, and its teacher.

        Raises:
            InputError: if there is no teacher, or its patches do not lie where the student's do.
        """
        teacher = load_teacher(self.teacher, model_of(MaskedModel, recipe.model).image)
        return _reconstruction(FeatureTarget(teacher), recipe)

    def outline(self, recipe: Recipe) -> Reconstruction:
        """The same with sizes and no numbers; the teacher need not be there."""
        teacher = outline_teacher(self.teacher, model_of(MaskedModel, recipe.model).image)
        with torch.device("meta"):
            return _reconstruction(FeatureTarget(teacher), recipe)


@dataclass(frozen=True, kw_only=True)
class ReconstructPixels(_Reconstruct):
    """Predict the pixels of every hidden patch: MAE (arXiv:2111.06377)."""

    normalize_patches: bool = True
    """Bring the pixels of every patch to mean 0 and variance 1 first."""

    def check(self, recipe: Recipe) -> None:
        """Refuse what this objective cannot do."""
        _check(recipe)

    def build(self, recipe: Recipe) -> Reconstruction:
        """The objective with freshly drawn weights, on the CPU in float32."""
        image = model_of(MaskedModel, recipe.model).image
        target = PixelTarget(image, normalize_patches=self.normalize_patches)
        return _reconstruction(target, recipe)


def _check(recipe: Recipe) -> None:
    if not isinstance(recipe.model, MaskedModel):
        raise InputError(
            "reconstruction needs a model with a decoder (frugal.milan.model.MaskedModel), not "
            f"{type(recipe.model).__name__}"
        )
    if recipe.engine.cache_chunk is not None:
        raise InputError(
            "engine.cache_chunk is for losses that compare the samples of a batch; leave it out"
        )
    if recipe.reduction.text is not None:
        raise InputError(
            "reduction.text is given, but reconstruction reads no captions; leave it out"
        )
    if recipe.reduction.image.mask_ratio == 0:
        raise InputError(
            "reduction.image.mask_ratio is 0, which hides nothing that could be reconstructed; "
            "the published ratio is 0.75"
        )


class Reconstruction(Objective):
    """Images to the loss of what is predicted of them (arXiv:2208.06049).

    The target is no module: a teacher in it is frozen and belongs to nobody's optimizer.
    """

    model: MaskedImageModel

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

    @override
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of the loss over the processes is that of their joint batch."""
        target, split, losses = self._predict(batch)
        weights = _weights(batch.valid)
        visible, patches = split.visible.shape[1], self.model.config.image.num_patches
        values = self._report(losses.detach(), target, split)
        metrics = {name: _weighted(value, weights) for name, value in values.items()}
        metrics["image_tokens"] = losses.new_full((), 1 + visible)
        metrics["mask_ratio"] = losses.new_full((), 1 - visible / patches)
        return _weighted(losses.mean(1), weights), metrics

    @override
    def towers(self) -> Sequence[Tower]:
        """Encoder and decoder, and the teacher, which is no module."""
        teachers = (self.target.teacher,) if isinstance(self.target, FeatureTarget) else ()
        return (self.model.image, self.model.decoder, *teachers)

    @override
    def also_read(self) -> dict[str, str]:
        """A digest of the teacher's weights, where there is one."""
        return self.target.also_read()

    @override
    def patch_view(self, batch: Batch) -> tuple[PatchView, SampleNoise]:
        """What the image reduction sees of a batch, and where it gets its random numbers."""
        return self._view(batch, self.target.of(batch.images))

    def _view(self, batch: Batch, target: TargetValues) -> tuple[PatchView, SampleNoise]:
        images, numbers = batch.images, batch.sample_numbers
        view = PatchView.of(
            images,
            self.model.config.image,
            embed=lambda: self.model.image(images, output="embedded"),
            progress=None if self._samples is None else numbers / self._samples,
            importance=target.importance,
        )
        return view, SampleNoise(self._seed, numbers)

    def _split(self, batch: Batch, target: TargetValues) -> Split:
        view, noise = self._view(batch, target)
        kept = self.reduction.keep(view, noise=noise)
        name = type(self.reduction).__name__
        if kept is None or (not kept.is_packed and kept.index.shape[1] == view.num_patches):
            raise InputError(
                f"reduction.image {name} keeps every patch, so that nothing is left to "
                "reconstruct; choose another one"
            )
        return Split.of(kept, view.num_patches)

    def _predict(self, batch: Batch) -> tuple[TargetValues, Split, Tensor]:
        """The target, what is seen, and (B, T) the loss of every predicted token."""
        target = self.target.of(batch.images)
        split = self._split(batch, target)
        predicted = self.model(batch.images, split, hidden_only=self.target.hidden_only)
        return target, split, self.target.losses(predicted, target, split)

    def _report(self, losses: Tensor, target: TargetValues, split: Split) -> dict[str, Tensor]:
        """(B,) what to look at beside the loss, where there is a teacher."""
        if target.importance is None or self.target.hidden_only:
            return {}
        seen = 1 + split.visible.shape[1]
        share = target.importance.gather(1, split.visible).sum(1) / target.importance.sum(1)
        return {
            "cosine_visible": 1 - losses[:, :seen].mean(1) / 2,
            "cosine_hidden": 1 - losses[:, seen:].mean(1) / 2,
            "importance_seen": share,
        }

    @override
    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample, and what looking at it costs.

        The backward pass costs twice the forward; a teacher has none.
        """
        return 3 * self.model.flops(metrics["image_tokens"] - 1) + self.target.flops()

    @torch.no_grad()
    def draw(self, batch: Batch) -> np.ndarray:
        """(3, H*, W*) uint8: images, what is seen of them, and how well the rest is predicted."""
        target, split, losses = self._predict(batch)
        return draw_reconstruction(
            batch.images,
            self.model.config.image,
            split,
            importance=target.importance,
            losses=losses,
            hidden_only=self.target.hidden_only,
        )


def _weights(valid: Tensor) -> Tensor:
    """(B,) such that the mean over the processes of weighted sums is the mean of valid samples."""
    count = gather(valid.sum()[None]).sum().clamp(min=1)
    return valid * (place_in_world()[1] / count)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of (B,) values; what has no weight does not count even if not finite."""
    return (values.where(weights > 0, 0.0) * weights).sum()


def _reconstruction(target: Target, recipe: Recipe) -> Reconstruction:
    generator = weight_generator(recipe.run.seed)
    return Reconstruction(
        model_of(MaskedModel, recipe.model).build(generator, outputs=target.outputs),
        target,
        reduction=recipe.reduction.image,
        seed=recipe.run.seed,
        samples=recipe.schedule.samples,
    )
