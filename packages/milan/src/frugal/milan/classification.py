"""A classifier on a vision transformer, as parts of a recipe; nothing here imports torch.

Fine-tuning and linear probing of MILAN (arXiv:2208.06049) follow MAE (arXiv:2111.06377, appendices
A.2 and A.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from frugal.common.contracts import PreparedReduction, Show
from frugal.common.data.config import ImageData
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.config import FolderEvaluation
from frugal.common.models.config import ImageTower
from frugal.common.randomness import weight_generator
from frugal.common.ranges import Count, Range, check_ranges
from frugal.common.recipe import Recipe
from frugal.milan.mixing import Mixing, RandomErasing

if TYPE_CHECKING:
    import torch

    from frugal.common.run import Run
    from frugal.milan.classifier import VisionClassifier
    from frugal.milan.classifier_training import ClassificationObjective, ProbeObjective

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
class ClassifierConfig:
    """A vision transformer and a linear layer on what it pools."""

    image: ImageTower
    num_classes: _Classes = 1000
    head_init_std: _HeadStd = 0.02
    """Standard deviation of the linear layer's first weights."""

    def __post_init__(self) -> None:
        check_ranges(self, "model")

    def build(self, generator: torch.Generator) -> VisionClassifier:
        """The model, on the CPU in float32, with weights drawn from ``generator``."""
        from frugal.milan.classifier import VisionClassifier

        return VisionClassifier.initialized(self, generator)


def _check(recipe: Recipe) -> None:
    """Refuse what no classifier can be trained with."""
    if not isinstance(recipe.data, ImageData):
        raise InputError(
            f"a classifier needs images with classes, but data is {type(recipe.data).__name__}; "
            "choose ImageData"
        )
    if not isinstance(recipe.model, ClassifierConfig):
        raise InputError(
            "a classifier needs a model with classes (frugal.milan.classification.ClassifierConfig"
            f"), not {type(recipe.model).__name__}"
        )
    if recipe.model.image.positions != "learned":
        raise InputError(
            f"model.image.positions is {recipe.model.image.positions!r}, but a classifier has its "
            "positions as weights; choose learned, which starts from the encoder's table"
        )
    image = recipe.reduction.image
    if isinstance(image, PreparedReduction) and image.images_to_see:
        raise InputError(
            f"reduction.image looks for its {image.measured[0]} on the first images of a run, "
            f"which a classifier does not show; give --reduction.image.{image.measured[0]}"
        )
    if recipe.reduction.text is not None:
        raise InputError(
            "reduction.text is given, but a classifier reads no captions; leave it out"
        )
    if recipe.engine.cache_chunk is not None:
        raise InputError(
            "engine.cache_chunk is for losses that compare samples with each other; for a "
            "classifier use engine.accumulate"
        )


def _built(recipe: Recipe) -> VisionClassifier:

    model: VisionClassifier = recipe.model.build(weight_generator(recipe.run.seed))
    model.image.blocks.checkpoint_activations = recipe.engine.checkpoint_activations
    if recipe.engine.compile:
        model.image.compile()
    return model


_Smoothing = Annotated[float, Range(least=0, below=1, words="must be at least 0 and less than 1")]


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Tell the class of an image; every weight is trained."""

    smoothing: _Smoothing = 0.0
    """Share of every label that is spread over all classes."""
    erasing: RandomErasing = field(default_factory=lambda: RandomErasing(probability=0.0))
    """Noise in a random rectangle; by default none."""
    mixing: Mixing = field(default_factory=lambda: Mixing(mixup=0.0, cutmix=0.0))
    """Mixup and CutMix; by default neither."""
    from_scratch: bool = False
    """Train random weights, without --run.start-from."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective")

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that does not train a classifier."""
        _check(recipe)
        if self.from_scratch and recipe.run.start_from is not None:
            raise InputError(
                f"objective.from_scratch trains random weights, but run.start_from is "
                f"{recipe.run.start_from}; choose one of them"
            )

    def build(self, recipe: Recipe) -> ClassificationObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        from frugal.milan.classifier_training import ClassificationObjective

        return ClassificationObjective(
            _built(recipe), self, reduction=recipe.reduction.image, seed=recipe.run.seed
        )


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Tell the class of an image by a linear layer on the normalized features of a frozen tower."""

    statistics: Literal["all_processes", "each_process"] = "all_processes"
    """Whose features the batch norm before the linear layer is computed from. Published runs
    computed it on every GPU for itself; together, the number of processes changes nothing."""

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that does not train a probe."""
        _check(recipe)
        if recipe.model.image.drop_path:
            raise InputError(
                f"model.image.drop_path is {recipe.model.image.drop_path}, but the tower of a "
                "linear probe is frozen; set it to 0"
            )

    def build(self, recipe: Recipe) -> ProbeObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        from frugal.milan.classifier_training import ProbeObjective

        return ProbeObjective(
            _built(recipe), self, reduction=recipe.reduction.image, seed=recipe.run.seed
        )


@dataclass(frozen=True, kw_only=True)
class Accuracy(FolderEvaluation):
    """How often a classifier is right, on images with classes that it was not trained on.

    Class folders are brought together with those of the training by their names. Reads
    class-per-folder images, clip_benchmark's webdataset layout, or a scenes folder, of which the
    classes are left out that its training part does not have.
    """

    name: str = "accuracy"
    """First part of the name of every number."""
    crop: CenterCrop = field(default_factory=lambda: CenterCrop(share=0.875))
    """Which part of an image the model sees."""
    batch_size: Count = 64
    """Images read at a time; the model takes 64 at a time whatever this is."""

    _part: ClassVar[str] = "zero_shot"
    _scores = ("top1", "top5")

    def check_classes(self, trained: Sequence[str]) -> None:
        """Refuse data with class folders that training does not have; calls for no model.

        Raises:
            InputError: if there is one with images.
        """
        folder = self.folder()
        if folder is not None:
            from frugal.milan.accuracy import check_classes

            check_classes(folder, trained)

    def evaluate(
        self, model: Any, recipe: Recipe, run: Run, *, show: Show | None = None
    ) -> dict[str, float | int]:
        """``{name}_top1``, ``_top5``, ``_loss`` (mean cross-entropy), ``_images``, ``_classes``.

        Also ``_classes_without_images`` and ``_passed_over``, where there are such.

        Every process of the run calls this and gets the same numbers, whatever their number; {}
        where there is no data.

        Raises:
            InputError: if the data is missing, or its classes are not the model's.
        """
        del show
        folder = self.folder()
        if folder is None:
            return self._skip(run)
        from frugal.milan.accuracy import evaluate

        return evaluate(self, folder, model, recipe, run)
