"""A segmenter on a vision transformer, as parts of a recipe; nothing here imports torch.

UperNet (Xiao et al., arXiv:1807.10221) on an encoder after masked pretraining, as MAE
(arXiv:2111.06377, appendix A.4) and BEiT (arXiv:2106.08254) are measured on ADE20K.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from frugal.common.contracts import Show
from frugal.common.data.samples import image_extensions
from frugal.common.errors import InputError
from frugal.common.evaluation.config import FolderEvaluation
from frugal.common.models.config import ImageTower
from frugal.common.randomness import weight_generator
from frugal.common.ranges import Count, Positive, PositiveShare, Range, ShareBelowOne, check_ranges
from frugal.common.recipe import Recipe, WarmupCosine
from frugal.common.reduction.image import KeepAll
from frugal.milan.masked_folder import MOST_CLASSES, open_masked_folder
from frugal.milan.photometric import PhotometricDistortion
from frugal.milan.segmentation_data import SegmentationData

if TYPE_CHECKING:
    import torch

    from frugal.common.run import Run
    from frugal.milan.segmenter import SegmentationObjective, Segmenter


def even_taps(depth: int) -> tuple[int, int, int, int]:
    """Blocks at a third, a half, two thirds and the end: 4, 6, 8, 12 and 8, 12, 16, 24."""
    return round(depth / 3), depth // 2, round(2 * depth / 3), depth


_Classes = Annotated[int, Range(least=2, most=MOST_CLASSES)]


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
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

    def build(self, generator: torch.Generator) -> Segmenter:
        """The model, on the CPU in float32, with weights drawn from ``generator``."""
        from frugal.milan.segmenter import Segmenter

        return Segmenter.initialized(self, generator)


@dataclass(frozen=True, kw_only=True)
class WarmupLinear(WarmupCosine):
    """Linear warm-up, then a straight line down to the floor."""

    def learning_rate(self, samples_seen: int, *, peak: float) -> float:
        """The learning rate of the step that starts after ``samples_seen`` samples."""
        if samples_seen < self.warmup_samples:
            return super().learning_rate(samples_seen, peak=peak)
        decay = max(self.samples - self.warmup_samples, 1)
        progress = min((samples_seen - self.warmup_samples) / decay, 1.0)
        return peak + (self.floor - peak) * progress


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Tell the class of every pixel; every weight is trained."""

    auxiliary_weight: Positive = 0.4
    """Of the loss of the auxiliary head, which looks at the third level alone."""
    distortion: PhotometricDistortion = field(default_factory=PhotometricDistortion)
    """Random changes of color, made on the device."""
    from_scratch: bool = False
    """Train random weights, without --run.start-from."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective")

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
                "(frugal.milan.segmentation.SegmenterConfig), not "
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

    def build(self, recipe: Recipe) -> SegmentationObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        from frugal.milan.segmenter import SegmentationObjective

        model = recipe.model.build(weight_generator(recipe.run.seed))
        model.image.blocks.checkpoint_activations = recipe.engine.checkpoint_activations
        if recipe.engine.compile:
            model.image.compile()
        return SegmentationObjective(model, self, seed=recipe.run.seed)


@dataclass(frozen=True, kw_only=True)
class MeanIoU(FolderEvaluation):
    """How well the pixels of every class are found: intersection over union, averaged.

    Reads pictures and masks in ADE20K's layout, or a scenes folder with such pictures.
    Intersections and unions are summed over all pictures, at their own resolution, before they are
    divided.
    """

    name: str = "segmentation"
    """First part of the name of every number."""
    split: str = "validation"
    """Name of the folders in images/ and annotations/ that are measured on."""
    view: Literal["sliding", "whole"] = "sliding"
    """sliding: the picture, resized to fit 4 times 1 windows, is seen through windows of the size
    that the model was trained on, and scores are averaged where they overlap. whole: it is
    stretched to that size."""
    stride: PositiveShare = 2 / 3
    """From one window to the next, over the side of a window: 341 pixels of 512. The public
    configuration of MAE has one half."""
    scales: tuple[Positive, ...] = (1.0,)
    """Sizes of the picture, over that of published single-scale numbers; probabilities are
    averaged. 0.5, 0.75, ... 1.75 for multi-scale numbers."""
    flip: bool = False
    """Average with the mirrored picture."""
    windows: Count = 8
    """Windows that the model takes at a time."""
    image_extensions: tuple[str, ...] = image_extensions()
    """Of the pictures."""

    _part: ClassVar[str] = "segmentation"
    _scores = ("miou", "pixel_accuracy", "mean_accuracy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales:
            raise InputError(f"MeanIoU.scales are {self.scales}; give positive factors")
        if self.view == "whole" and self.scales != (1.0,):
            raise InputError(
                f"MeanIoU.scales are {self.scales}, but view=whole has one size; use view=sliding"
            )

    def folder(self) -> Path | None:
        """Where the pictures are read from.

        Raises:
            InputError: if data is given and missing, laid out in another way, lacks masks, or has
                masks of other pictures.
        """
        folder = super().folder()
        if folder is not None:
            open_masked_folder(folder, self.split, self.image_extensions).look(MOST_CLASSES)
        return folder

    def evaluate(
        self, model: Any, recipe: Recipe, run: Run, *, show: Show | None = None
    ) -> dict[str, float | int]:
        """``{name}_miou``, ``_pixel_accuracy``, ``_mean_accuracy``, ``_images``, ``_classes``.

        The means are over the classes that occur. Every process of the run calls this and gets the
        same numbers, whatever their number; {} where there is no data. The first process writes
        the numbers of every class to ``evaluation/{name}_classes.csv``.

        Raises:
            InputError: if the data is missing, or a mask is none of its picture or of the model's
                classes.
        """
        folder = self.folder()
        if folder is None:
            return self._skip(run)
        from frugal.milan.mean_iou import evaluate

        return evaluate(self, folder, model, recipe, run, show)
