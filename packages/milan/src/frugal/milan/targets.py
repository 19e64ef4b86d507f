"""What is predicted of an image, and how far a prediction is from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from frugal.common.models.vit import ImageTower
from frugal.common.reduction.image import KeptPatches, PatchView, normalize, take_patches
from frugal.milan.decoders import Split
from frugal.milan.teacher import FrozenTeacher

_EPSILON = 1e-12
"""Added to the length of a vector before dividing by it; the published code adds nothing."""
_SMALLEST_VARIANCE = 1e-6
"""Added to the variance of the pixels of a patch (MAE)."""


@dataclass(frozen=True)
class TargetValues:
    """What is to be predicted of a batch."""

    values: Tensor
    """(B, 1 + N, E) a teacher's tokens, or the images themselves."""
    importance: Tensor | None
    """(B, N) how much every patch matters; None where nobody says."""


class Target(Protocol):
    """What the objective asks of a target."""

    outputs: int
    """Numbers predicted for every token."""
    hidden_only: bool
    """Whether hidden patches alone are predicted."""

    def of(self, images: Tensor) -> TargetValues:
        """From (B, 3, H, W) images, before anything is hidden."""
        ...

    def losses(self, predicted: Tensor, target: TargetValues, split: Split) -> Tensor:
        """(B, T) float32: the loss of every predicted token, in the order of the decoder."""
        ...

    def flops(self) -> float:
        """Forward FLOPs of computing the target of one image."""
        ...

    def also_read(self) -> dict[str, str]:
        """See :meth:`frugal.common.contracts.Objective.also_read`."""
        ...


class FeatureTarget:
    """The tokens of a teacher, all of them (arXiv:2208.06049, section 3.1)."""

    hidden_only = False

    def __init__(self, teacher: FrozenTeacher) -> None:
        self.teacher = teacher
        self.outputs = teacher.width

    def of(self, images: Tensor) -> TargetValues:
        """The teacher's tokens of whole images, and the importance of their patches."""
        tokens, importance = self.teacher(images)
        return TargetValues(tokens, importance)

    def losses(self, predicted: Tensor, target: TargetValues, split: Split) -> Tensor:
        """(B, 1 + N) float32, each from 0 to 4."""
        # the teacher's tokens come to the order of the predictions, once, and not the other way
        row = torch.arange(len(predicted), device=predicted.device)[:, None]
        row = row * target.values.shape[1] + split.order  # (B, 1 + N)
        tokens = target.values.flatten(0, 1).index_select(0, row.flatten())
        return unit_distance(predicted, tokens.view_as(predicted))

    def flops(self) -> float:
        """Forward FLOPs of the teacher on one image."""
        return self.teacher.flops()

    def also_read(self) -> dict[str, str]:
        """A digest of the teacher."""
        return {"objective.teacher": self.teacher.digest}


class PixelTarget:
    """The pixels of hidden patches (MAE, arXiv:2111.06377)."""

    hidden_only = True

    def __init__(self, tower: ImageTower, *, normalize_patches: bool) -> None:
        self._tower = tower
        self._normalize_patches = normalize_patches
        self.outputs = 3 * tower.patch_size**2

    def of(self, images: Tensor) -> TargetValues:
        """The images themselves, of which nothing is more important."""
        return TargetValues(images, None)

    def losses(self, predicted: Tensor, target: TargetValues, split: Split) -> Tensor:
        """(B, M) float32: mean squared error over the pixels of every hidden patch."""
        view = PatchView.of(target.values, self._tower)
        pixels = take_patches(view, KeptPatches.dense(split.hidden))  # (B, M, P)
        if pixels.dtype == torch.uint8:
            pixels = normalize(pixels, mean=self._tower.mean, std=self._tower.std)
        pixels = pixel_target(pixels, normalize_patches=self._normalize_patches)
        return (_widened(predicted) - pixels).square().mean(-1)

    def flops(self) -> float:
        """0: pixels are there already."""
        return 0.0

    def also_read(self) -> dict[str, str]:
        """Nothing: pixels are in the data."""
        return {}


def pixel_target(pixels: Tensor, *, normalize_patches: bool) -> Tensor:
    """What a decoder predicts of patches, channel fastest as MAE has it.

    Args:
        pixels: (..., P) in (channel, row, column) order.
        normalize_patches: to mean 0 and (unbiased) variance 1 over each patch.

    Returns:
        (..., P) in (row, column, channel) order.
    """
    ordered = pixels.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)
    if not normalize_patches:
        return ordered
    variance, mean = torch.var_mean(ordered, dim=-1, keepdim=True)
    return (ordered - mean) / (variance + _SMALLEST_VARIANCE).sqrt()


def unit_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """(..., K) vectors to (...) squared distances after scaling both to length 1, at least float32.

    Gradients flow to ``predicted`` alone. No scaled copy of either is kept.
    """
    return _UnitDistance.apply(predicted, target)


def _widened(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class _UnitDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor) -> Tensor:
        left, right = _widened(predicted), _widened(target)
        length, other = (torch.linalg.vector_norm(side, dim=-1) for side in (left, right))
        product = (left * right).sum(-1) / (other + _EPSILON)
        ctx.save_for_backward(predicted, target, length, other, product)
        return 2 - 2 * product / (length + _EPSILON)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        predicted, target, length, other, product = ctx.saved_tensors
        across = -2 * gradient / (length + _EPSILON)
        along = -across * product / ((length + _EPSILON) * length.clamp(min=_EPSILON))
        across = across / (other + _EPSILON)
        result = _widened(target) * across[..., None]
        result.addcmul_(_widened(predicted), along[..., None])
        return result.to(predicted.dtype), None
