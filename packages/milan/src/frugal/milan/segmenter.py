"""The segmenter, and what trains it: UperNet's heads on four levels of a vision transformer."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
from typing_extensions import override

from frugal.common.contracts import Batch
from frugal.common.errors import InputError
from frugal.common.models.batch_norm import SharedBatchNorm, precise, share_statistics
from frugal.common.models.config import ImageTower
from frugal.common.models.flops import image_flops
from frugal.common.models.initialize import initialize_flip
from frugal.common.models.positions import sincos_table
from frugal.common.models.vit import ImageTransformer
from frugal.common.randomness import SampleNoise
from frugal.milan.classifier import mean_over_valid
from frugal.milan.encoder_start import start_encoder
from frugal.milan.masked_folder import IGNORED, PADDING
from frugal.milan.segmentation import Segmentation, SegmenterConfig
from frugal.milan.segmentation_pictures import paint

if TYPE_CHECKING:
    import numpy as np

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
        initialize_flip(model.image, generator)
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

    def normalized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 images in float32 as the tower takes them."""
        mean, std = _channels(self.config.image, images)
        return (images / 255 - mean) / std

    def shown(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalized`."""
        mean, std = _channels(self.config.image, images)
        return ((images * std + mean) * 255).round().clamp(0, 255).byte()


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


def enlarged(scores: Tensor, size: Any) -> Tensor:
    """(B, C, h, w) scores at another (height, width), in float32 at least."""
    return F.interpolate(precise(scores), size=tuple(size), mode="bilinear", align_corners=False)


def _channels(tower: ImageTower, images: Tensor) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each: the mean and the standard deviation of a tower's images."""
    mean, std = torch.tensor((tower.mean, tower.std), device=images.device)[..., None, None]
    return mean, std


class SegmentationObjective(nn.Module):
    """Images of a batch to the cross-entropy of their pixels, every weight trained."""

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
            "image_tokens": main_loss.new_tensor(_tokens(tower)),
        }
        return main_loss + self._config.auxiliary_weight * auxiliary_loss, metrics

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
        noise = SampleNoise(self._seed, numbers)
        images = self.model.normalized(self._config.distortion.apply(images, noise=noise))
        is_padding = labels == PADDING
        images = images.masked_fill(is_padding[:, None], 0.0)
        return images, labels.long().masked_fill(is_padding, IGNORED)

    def start_from(self, source: Path | None, *, interpolate: bool, log: logging.Logger) -> None:
        """Take the tower of a pretraining run or file.

        Raises:
            InputError: if there is no source, or its tower is not the model's.
        """
        if source is not None:
            start_encoder(cast("Any", self.model), source, interpolate=interpolate, log=log)
        elif not self._config.from_scratch:
            raise InputError(
                "segmentation needs an encoder: give a pretraining run or a file of weights with "
                "--run.start-from, or train random weights with --objective.from-scratch"
            )

    def bounds(self) -> dict[str, tuple[float, float]]:
        """None: no parameter is kept within bounds."""
        return {}

    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample; the backward pass costs twice the forward."""
        del metrics
        return 3 * segmenter_flops(self.model.config)

    @torch.no_grad()
    def draw(self, batch: Batch) -> np.ndarray:
        """Images as the model sees them above their classes: (3, 2 H, B W) uint8."""
        images, labels = self._seen(batch)
        classes = paint(labels.cpu().numpy(), self.model.config.num_classes)  # (B, 3, H, W)
        both = torch.cat([self.model.shown(images).cpu(), torch.from_numpy(classes)], dim=2)
        return both.permute(1, 2, 0, 3).flatten(2).numpy()


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    """(B, H, W) cross-entropies of (B, C, H, W) scores; 0 where a label is ignored."""
    return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")


def _tokens(tower: ImageTower) -> float:
    return float(tower.num_patches + (tower.class_token != "none"))


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
