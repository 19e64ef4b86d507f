"""The model of fine-tuning and linear probing: a vision transformer and a linear layer on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.models.positions import sincos_table
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.ranges import Range, check_ranges
from frugal.common.recipe import ModelConfig, ModelInputs
from frugal.common.reduction.image import KeptPatches

Pooling = Literal["class", "mean", "mean_all"]
"""MAE's and MILAN's three: the class token behind the last norm (cls), or the mean of the patches
(global_pool) or of all tokens (global_pool_wcls) before a norm of its own."""


def pooled(tower: ImageTower, pooling: Pooling) -> ImageTower:
    """A tower that pools in one of the three ways."""
    return replace(tower, pooling=pooling, norm_after_pooling=pooling != "class")


_Classes = Annotated[
    int,
    Range(
        least=2,
        words="must be at least 2: with fewer classes there is nothing to tell apart",
    ),
]
_HeadStd = Annotated[float, Range(above=0, hint="the released code uses 0.02, MAE's 2e-5")]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ModelConfig):
    """A vision transformer and a linear layer on what it pools."""

    image: ImageTower
    num_classes: _Classes = 1000
    head_init_std: _HeadStd = 0.02
    """Standard deviation of the linear layer's first weights."""

    def __post_init__(self) -> None:
        check_ranges(self, "model")

    @override
    def inputs(self) -> ModelInputs:
        """Images with their classes."""
        return ModelInputs(
            height_width=self.image.height_width,
            grid=self.image.grid,
            num_classes=self.num_classes,
        )

    def build(self, generator: torch.Generator) -> VisionClassifier:
        """The model, on the CPU in float32, with weights drawn from ``generator``."""
        return VisionClassifier.initialized(self, generator)


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

    def features(self, images: Tensor, kept: KeptPatches | None = None) -> Tensor:
        """(B, D): what the head sees of (B, 3, H, W) images, uint8 or normalized."""
        return self.fc_norm(self.image(images, kept, output="pooled"))

    def forward(self, images: Tensor, kept: KeptPatches | None = None) -> Tensor:
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
