"""A vision transformer that tells classes, and the norm of a linear probe."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.models.positions import sincos_table
from frugal.common.models.vit import ImageTransformer
from frugal.common.objectives.gather import place_in_world
from frugal.common.reduction.image import Kept
from frugal.milan.classification import ClassifierConfig

_STD = 0.02


class VisionClassifier(nn.Module):
    """Images to one score per class.

    Parameters stand in the order of the released models: tower, head, and the norm of pooled
    features last, so that the groups of an optimizer are numbered alike.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        """Parameters are uninitialized in effect; see :meth:`initialized`."""
        super().__init__()
        self.config = config
        self.image = ImageTransformer(config.image)
        self.head: nn.Module = nn.Linear(config.image.width, config.num_classes)
        self.fc_norm: nn.Module = nn.Identity()
        if config.image.norm_after_pooling:
            self.fc_norm, self.image.norm = self.image.norm, self.fc_norm

    @classmethod
    @torch.no_grad()
    def initialized(cls, config: ClassifierConfig, generator: torch.Generator) -> Self:
        """A classifier with the first weights of MAE's fine-tuning: normal with deviation 0.02.

        Learned positions start from the fixed table of MAE.
        """
        model = cls(config)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                _truncated_normal(module.weight, _STD, generator)
                if module.bias is not None:
                    module.bias.zero_()
        tower = model.image
        _as_convolution(tower.patch_embed, generator)
        if config.image.class_token != "none":
            _truncated_normal(tower.cls_token, _STD, generator)
        if config.image.positions == "learned":
            class_row = config.image.class_token == "with_position"
            table = sincos_table(
                config.image.grid, config.image.width, "sincos", class_row=class_row
            )
            tower.pos_embed.copy_(table[None])
        assert isinstance(model.head, nn.Linear)
        _truncated_normal(model.head.weight, config.head_init_std, generator)
        return model

    def features(self, images: Tensor, kept: Kept | None = None) -> Tensor:
        """(B, D): what the head sees of (B, 3, H, W) images, uint8 or normalized."""
        return self.fc_norm(self.image(images, kept, output="pooled"))

    def forward(self, images: Tensor, kept: Kept | None = None) -> Tensor:
        """(B, C) scores of (B, 3, H, W) images, uint8 or normalized."""
        return self.head(self.features(images, kept))

    def freeze_features(self) -> None:
        """Have nothing but the head trained; the rest stays in evaluation mode."""
        for part in (self.image, self.fc_norm):
            part.requires_grad_(False)
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.image.parameters()):
            self.image.eval()
        return self


def _as_convolution(layer: nn.Linear, generator: torch.Generator) -> None:
    """As torch's convolutions start, of which the patch projection is one elsewhere."""
    limit = layer.weight.shape[1] ** -0.5
    layer.weight.uniform_(-limit, limit, generator=generator)
    if layer.bias is not None:
        layer.bias.uniform_(-limit, limit, generator=generator)


def _truncated_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-2.0, b=2.0, generator=generator)


class FeatureNorm(nn.Module):
    """Batch norm of features that carry no gradient, without learned factors.

    Buffers have the names of ``nn.BatchNorm1d`` and its meaning: ``running_var`` is unbiased.
    """

    epsilon = 1e-6
    momentum = 0.1

    def __init__(self, width: int, *, of: Literal["all_processes", "each_process"]) -> None:
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
        return total_over_processes(local) if self._of == "all_processes" else local

    def _shared(self, statistic: Tensor) -> Tensor:
        """What all processes remember: where each counts for itself, their mean."""
        if self._of == "all_processes":
            return statistic
        return total_over_processes(statistic) / place_in_world()[1]


def total_over_processes(local: Tensor) -> Tensor:
    """The sum of a small tensor over the processes, without gradients."""
    if place_in_world()[1] == 1:
        return local
    total = local.clone()
    dist.all_reduce(total)
    return total


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """A scalar whose mean over the processes is the mean of the valid ones of all (B,) values."""
    world_size = place_in_world()[1]
    count = total_over_processes(valid.sum()).clamp(min=1)
    return torch.where(valid, values, 0.0).sum() * (world_size / count)
