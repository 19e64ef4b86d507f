"""The model of segmentation: UperNet's heads on four levels of a vision transformer.

UperNet (Xiao et al., arXiv:1807.10221) stands on an encoder after masked pretraining, as MAE
(arXiv:2111.06377, appendix A.4) and BEiT (arXiv:2106.08254) are measured on ADE20K.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.errors import InputError
from frugal.common.models.batch_norm import SharedBatchNorm, precise, share_statistics
from frugal.common.models.flops import image_flops
from frugal.common.models.positions import sincos_table
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.ranges import Count, Range, ShareBelowOne, check_ranges
from frugal.common.recipe import ModelConfig, ModelInputs
from frugal.common.transfer.masked_folder import MOST_CLASSES


def even_taps(depth: int) -> tuple[int, int, int, int]:
    """Blocks at a third, a half, two thirds and the end: 4, 6, 8, 12 and 8, 12, 16, 24."""
    return round(depth / 3), depth // 2, round(2 * depth / 3), depth


_Classes = Annotated[int, Range(least=2, most=MOST_CLASSES)]


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(ModelConfig):
    """A vision transformer whose blocks put out four levels of features, and UperNet on them."""

    image: ImageTower
    num_classes: _Classes = 150
    taps: tuple[int, int, int, int]
    """Blocks, counted from 1, whose outputs are the levels, finest first; the last is the last."""
    width: Count | None = None
    """Channels of UperNet; without it as many as the tower has."""
    pool_scales: tuple[Count, ...] = (1, 2, 3, 6)
    """Sides of what UperNet pools the coarsest level to."""
    auxiliary_width: Count = 256
    """Channels of the convolution on the third level, which only training reads."""
    dropout: ShareBelowOne = 0.1
    """Share of the channels that are dropped before each of the two classifiers."""

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        object.__setattr__(self, "taps", tuple(self.taps))
        if len(self.taps) != 4 or sorted({*self.taps, 0}) != [0, *self.taps]:
            raise InputError(
                f"model.taps are {self.taps}; give four blocks, counted from 1, in ascending order"
            )
        if self.taps[-1] != self.image.depth:
            raise InputError(
                f"model.taps end at block {self.taps[-1]}, but model.image.depth is "
                f"{self.image.depth}; end at the last block, such as with "
                f"{' '.join(map(str, even_taps(self.image.depth)))}"
            )
        if min(self.image.grid) < 2:
            raise InputError(
                f"images of {self.image.height_width} pixels are "
                f"{self.image.grid[0]}x{self.image.grid[1]} patches, too few for the coarsest "
                "level; use larger images or smaller patches"
            )
        if not self.pool_scales:
            raise InputError(
                f"model.pool_scales are {self.pool_scales}; give sides of at least 1, such as "
                "1 2 3 6"
            )

    @override
    def inputs(self) -> ModelInputs:
        """Images with the classes of their pixels."""
        return ModelInputs(
            height_width=self.image.height_width,
            grid=self.image.grid,
            num_classes=self.num_classes,
        )

    def build(self, generator: torch.Generator) -> Segmenter:
        """The model, on the CPU in float32, with weights drawn from ``generator``."""
        return Segmenter.initialized(self, generator)


_CLASSIFIER_STD = 0.01


class FeatureLevels(nn.Module):
    """Four maps of one grid to four scales: 4, 2, 1 and a half times its sides.

    Names are those of the feature pyramid of transformers' BEiT backbone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(
            OrderedDict(
                conv_transpose1=nn.ConvTranspose2d(width, width, 2, stride=2),
                normalization=SharedBatchNorm(width),
                activation=nn.GELU(),
                conv_transpose2=nn.ConvTranspose2d(width, width, 2, stride=2),
            )
        )
        self.fpn2 = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(B, D, rows, columns) each to the same of their own sizes."""
        first, second, third, fourth = maps
        return [self.fpn1(first), self.fpn2(second), third, F.max_pool2d(fourth, 2, stride=2)]


class PixelClassifier(nn.Conv2d):
    """A linear layer for every pixel, some channels of whose input are dropped in training."""

    def __init__(self, width: int, num_classes: int, *, dropout: float) -> None:
        super().__init__(width, num_classes, kernel_size=1)
        self.dropout = dropout

    @override
    def forward(self, input: Tensor) -> Tensor:
        """(B, D, h, w) to (B, C, h, w)."""
        return super().forward(F.dropout2d(input, self.dropout, self.training))


class Segmenter(nn.Module):
    """Images to a score for every class and pixel."""

    def __init__(self, config: SegmenterConfig) -> None:
        """Parameters are uninitialized in effect; see :meth:`initialized`."""
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        super().__init__()
        self.config = config
        tower, width = config.image, config.width or config.image.width
        self.image = ImageTransformer(tower)
        self.image.norm = cast("Any", nn.Identity())  # levels are what blocks put out
        heads = UperNetConfig(
            hidden_size=width,
            pool_scales=config.pool_scales,
            auxiliary_channels=config.auxiliary_width,
        )
        self.neck = FeatureLevels(tower.width)
        self.decode_head = UperNetHead(heads, in_channels=[tower.width] * 4)
        self.auxiliary_head = UperNetFCNHead(heads, in_channels=[tower.width] * 4)
        for head in (self.decode_head, self.auxiliary_head):
            head.classifier = PixelClassifier(
                head.channels, config.num_classes, dropout=config.dropout
            )
        share_statistics(self)

    @classmethod
    @torch.no_grad()
    def initialized(cls, config: SegmenterConfig, generator: torch.Generator) -> Self:
        """A segmenter with the first weights of mmsegmentation's heads.

        Convolutions start normal by the number of their outputs (He et al., arXiv:1502.01852), the
        classifiers normal with deviation 0.01, what enlarges levels as torch has it; the tower as
        that of MAE, whatever kind its positions are.
        """
        model = cls(config)
        model.image.initialize(generator, "flip")
        tower = config.image
        if tower.positions == "learned":
            class_row = tower.class_token == "with_position"
            table = sincos_table(tower.grid, tower.width, "sincos", class_row=class_row)
            model.image.pos_embed.copy_(table[None])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
                module.bias.zero_()
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                _initialize_convolution(module, generator)
        return model

    def levels(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, D, h, w), finest first, of (B, 3, H, W) images, uint8 or normalized."""
        taps = [tap - 1 for tap in self.config.taps]
        outputs = self.image(images, output="blocks", blocks=taps)
        rows, columns = self.config.image.grid
        patches = rows * columns
        maps = [
            tokens[:, -patches:].transpose(1, 2).unflatten(2, (rows, columns))
            for tokens in outputs  # (B, [1 +] N, D)
        ]
        return self.neck(maps)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float32 scores of (B, 3, H, W) images, uint8 or normalized."""
        return enlarged(self.decode_head(self.levels(images)), images.shape[2:])

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of UperNet and of the auxiliary head (B, C, h, w), each at its own size."""
        levels = self.levels(images)
        return self.decode_head(levels), self.auxiliary_head(levels)


def _initialize_convolution(
    layer: nn.Conv2d | nn.ConvTranspose2d, generator: torch.Generator
) -> None:
    if isinstance(layer, PixelClassifier):
        layer.weight.normal_(0.0, _CLASSIFIER_STD, generator=generator)
    elif isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(
            layer.weight, mode="fan_out", nonlinearity="relu", generator=generator
        )
    else:
        # torch counts the second axis of the weight and its kernel as what goes in
        limit = (layer.weight.shape[1] * layer.weight[0, 0].numel()) ** -0.5
        layer.weight.uniform_(-limit, limit, generator=generator)
        if layer.bias is not None:
            layer.bias.uniform_(-limit, limit, generator=generator)
        return
    if layer.bias is not None:
        layer.bias.zero_()


def enlarged(scores: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) scores at another (height, width), in float32 at least."""
    return F.interpolate(precise(scores), size=tuple(size), mode="bilinear", align_corners=False)


def segmenter_flops(config: SegmenterConfig) -> float:
    """Forward FLOPs of one image in training, both heads: two operations per multiply-add."""
    tower = config.image
    width, upernet = tower.width, config.width or tower.width
    (rows, columns), classes = tower.grid, config.num_classes
    places = [16 * rows * columns, 4 * rows * columns, rows * columns, (rows // 2) * (columns // 2)]
    neck = width**2 * (4 * rows * columns + 4 * places[1] + 4 * rows * columns)
    pooled = width * upernet * sum(scale**2 for scale in config.pool_scales)
    bottleneck = 9 * (width + len(config.pool_scales) * upernet) * upernet * places[3]
    pyramid = (width * upernet + 9 * upernet**2) * sum(places[:3])
    fused = (9 * 4 * upernet + classes) * upernet * places[0]
    auxiliary = (9 * width + classes) * config.auxiliary_width * places[2]
    heads = neck + pooled + bottleneck + pyramid + fused + auxiliary
    return image_flops(tower, tower.num_patches) + 2 * heads
