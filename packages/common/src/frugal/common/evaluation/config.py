"""What a finished model is measured on, as parts of a recipe; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from frugal.common.contracts import EvaluationTask, Show
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.sugarcrepe import CATEGORIES, KINDS
from frugal.common.evaluation.suites import Metric, listed
from frugal.common.ranges import (
    Count,
    CountOrZero,
    NotNegative,
    OpenShare,
    Positive,
    Range,
    Seed,
    check_ranges,
)

if TYPE_CHECKING:
    from frugal.common.evaluation.bootstrap import Keep
    from frugal.common.models.bundle import ModelBundle
    from frugal.common.run import Run


@dataclass(frozen=True, kw_only=True)
class FolderEvaluation(EvaluationTask):
    """What evaluations on the data of a folder have in common."""

    name: str
    data: Path | None = None
    """Folder of the data; without it this evaluation is skipped."""
    workers: CountOrZero = 0
    """Processes that decode images, per process of the run; 0 decodes in the process itself."""

    _part: ClassVar[str]
    """Sub-folder of a scenes folder."""
    _scores: ClassVar[tuple[str, ...]]
    """The last parts of the names of numbers of which higher is better."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InputError(
                f"the name of an evaluation is {self.name!r}; choose letters, digits and "
                "underscores, because its numbers are named after it"
            )
        check_ranges(self, type(self).__name__)

    @property
    def scores(self) -> tuple[str, ...]:
        """As every evaluation."""
        return tuple(f"{self.name}_{score}" for score in self._scores)

    def folder(self) -> Path | None:
        """Where the images are read from: ``data``, or the part of a scenes folder meant for this.

        Cheap: calling it before a run starts refuses a path that is not there.

        Raises:
            InputError: if data is given and missing.
        """
        if self.data is None:
            return None
        if not self.data.exists():
            raise InputError(
                f"the data of the evaluation {self.name!r} is not there: {self.data} does not "
                "exist; check the path, or leave it out to skip this evaluation"
            )
        inside = self.data / self._part
        return inside if inside.is_dir() else self.data

    def _skip(self, run: Run) -> dict[str, float | int]:
        run.log.info("the evaluation %s is skipped: it was given no data", self.name)
        return {}


_MaskRatio = Annotated[float, Range(least=0, below=1, words="must be at least 0 and less than 1")]


@dataclass(frozen=True, kw_only=True)
class ImageEvaluation(FolderEvaluation):
    """What evaluations of images and captions have in common."""

    crop: CenterCrop = field(default_factory=CenterCrop)
    """Which part of an image the model sees, at the size its image tower takes."""
    published_crop: CenterCrop | None = None
    """The crop that the method's published numbers were measured with; the evaluate command takes
    it instead of crop when it is told --published."""
    mask_ratio: _MaskRatio = 0.0
    """Fraction of the patches that the image tower does not see, drawn anew for every image."""
    views: Count = 1
    """Masked views of every image, whose unit embeddings are averaged. As many as fit see
    different patches: 2 at a mask ratio of 0.5, 4 at 0.75."""
    batch_size: Count = 64
    """Images read at a time; the model takes 64 at a time whatever this is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self).__name__
        if self.views > 1 and self.mask_ratio == 0:
            raise InputError(
                f"{kind}.views is {self.views}, but without a mask_ratio all views are the same; "
                "give the fraction of the patches to leave out, such as 0.5"
            )


SUBSETS = ("imagenet_a", "imagenet_r")
"""Of ImageNet's classes."""
CLASS_NAMES = ("data", "imagenet", *SUBSETS)
TEMPLATES = ("data", "imagenet_7", "imagenet_9", "imagenet_80", "name")
"""Words of their own beside the names of tasks."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot(ImageEvaluation):
    """Zero-shot classification with class names written into prompt templates.

    Reads a scenes folder (``python -m frugal.common.scenes``), class-per-folder images (ImageNet-1k
    and its variants V2, A, R and Sketch, ObjectNet), or clip_benchmark's webdataset layout.
    """

    name: str = "zero_shot"
    """First part of the name of every number."""
    class_names: str = "data"
    """data: the names the data comes with; folders that are WordNet ids of ImageNet-1k, or the
    numbers 0 to 999, get ImageNet's names, and images are classified among the classes that are
    there. imagenet: ImageNet-1k's 1,000 names, whichever of its classes are there; folders are
    WordNet ids or the numbers 0 to 999, labels of tars the same numbers. imagenet_a, imagenet_r:
    those of their 200 classes. One of the tasks of the suite clip-26, such as food101: that task's
    names, for folders that are called so, or else in their order."""
    templates: str = "data"
    """data: the templates the data comes with, or imagenet_7 where it has none. imagenet_7 and
    imagenet_80: OpenAI's for ImageNet; imagenet_9: the seven, "A photo of a {}" and the bare name
    (CiT). name: the bare class name. One of the tasks of the suite clip-26: that task's."""
    metric: Metric | None = None
    """Which of the numbers is the task's own: it is given again as its score."""
    reduce_prompts: bool = False
    """Shorten prompts by the recipe's text reduction, as captions in training; else only what
    does not fit is cut off."""

    _part: ClassVar[str] = "zero_shot"
    _scores = (
        "top1", "top5", "mean_per_class_recall", "top1_held_out", "roc_auc",
        "mean_average_precision", "score",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for field_name, given, words in (
            ("class_names", self.class_names, CLASS_NAMES),
            ("templates", self.templates, TEMPLATES),
        ):
            if given not in (*words, *listed()):
                raise InputError(
                    f"{field_name} is {given!r}; choose {', '.join(words)} or one of the tasks "
                    f"{', '.join(listed())}"
                )

    def evaluate(
        self,
        bundle: ModelBundle,
        run: Run,
        *,
        show: Show | None = None,
        keep: Keep | None = None,
    ) -> dict[str, float | int]:
        """``{name}_top1``, ``_top5``, ``_mean_per_class_recall``, ``_images`` and ``_classes``.

        With two classes also ``_roc_auc``, with a metric ``_score``. Where images may be of
        several classes (clip_benchmark's ``dataset_type.txt`` says multilabel) instead
        ``{name}_mean_average_precision``, ``_images``, ``_classes`` and ``_labels``.
        Where the data says which classes training never saw (scenes: ``held_out.txt``), also
        ``{name}_top1_held_out``, ``_images_held_out`` and ``_classes_held_out``; where there are
        such, ``_same_names``, ``_classes_without_images`` and ``_passed_over``. Every process
        of the run calls this and gets the same numbers; {} where there is no data.

        Raises:
            InputError: if the data is missing, or its classes and names do not fit together.
        """
        folder = self.folder()
        if folder is None:
            return self._skip(run)
        from frugal.common.data.benchmark_layout import is_multi_labeled
        from frugal.common.evaluation import multi_label, zero_shot

        if is_multi_labeled(folder):
            return multi_label.evaluate(self, folder, bundle, run, show, keep)
        return zero_shot.evaluate(self, folder, bundle, run, show, keep)


@dataclass(frozen=True, kw_only=True)
class Retrieval(ImageEvaluation):
    """Finding the image of a caption and a caption of an image, among all of a data set.

    Reads a scenes folder or clip_benchmark's webdataset layout of type retrieval; an image may
    have several captions.
    """

    name: str = "retrieval"
    """Part of the name of every number."""

    _part: ClassVar[str] = "retrieval"

    @property
    def scores(self) -> tuple[str, ...]:
        """As every evaluation."""
        return tuple(
            f"{kind}_{self.name}_recall_at_{k}" for kind in ("image", "text") for k in (1, 5, 10)
        )

    def evaluate(
        self,
        bundle: ModelBundle,
        run: Run,
        *,
        show: Show | None = None,
        keep: Keep | None = None,
    ) -> dict[str, float | int]:
        """``image_{name}_recall_at_{1,5,10}`` (text to image), ``text_{name}_...`` (to text).

        Also ``{name}_candidates`` (images to choose from) and ``{name}_captions``. Every process
        of the run calls this and gets the same numbers; {} where there is no data.

        Raises:
            InputError: if the data is missing.
        """
        folder = self.folder()
        if folder is None:
            return self._skip(run)
        from frugal.common.evaluation import retrieval

        return retrieval.evaluate(self, folder, bundle, run, show, keep)


@dataclass(frozen=True, kw_only=True)
class Compositional(ImageEvaluation):
    """Telling an image's caption from one that was made false by replacing, swapping or adding.

    Reads SugarCrepe's seven JSON files (arXiv:2306.14610) or a scenes folder.
    """

    name: str = "compositional"
    """First part of the name of every number."""
    images: Path | None = None
    """Folder of images (COCO's val2017 for SugarCrepe); by default images/ or val2017/ beside the
    JSON files, or their own folder."""

    _part: ClassVar[str] = "compositional"
    _scores = ("mean", *KINDS, *CATEGORIES)

    def folder(self) -> Path | None:
        """Where the JSON files are: ``data``, or the part of a scenes folder meant for this.

        Raises:
            InputError: if data or images are given and missing.
        """
        if self.data is not None and self.images is not None and not self.images.is_dir():
            raise InputError(
                f"the images of the evaluation {self.name!r} are not there: {self.images} is no "
                "folder; check the path"
            )
        return super().folder()

    def evaluate(
        self,
        bundle: ModelBundle,
        run: Run,
        *,
        show: Show | None = None,
        keep: Keep | None = None,
    ) -> dict[str, float | int]:
        """``{name}_swap_obj`` and so on: the share of items whose true caption is strictly nearer.

        Also ``{name}_replace``, ``_swap``, ``_add`` and ``_mean``, the means over their categories
        and over all seven, ``{name}_items``, ``{name}_images`` and ``{name}_swap_obj_items`` and so
        on. Every process of the run calls this and gets the same numbers; {} where there is no
        data.

        Raises:
            InputError: if the data is missing or cannot be used.
        """
        folder = self.folder()
        if folder is None:
            return self._skip(run)
        from frugal.common.evaluation import compositional

        return compositional.evaluate(self, folder, bundle, run, show, keep)


Solver = Literal["lbfgs", "adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe(ImageEvaluation):
    """A linear classifier on the embeddings of images, trained on some and measured on others.

    Reads a folder with the parts train/ and test/ (or val/), each of them class-per-folder images
    or tars with ``cls`` members as clip_benchmark has them; of a scenes folder, its zero_shot/.
    Source: Radford et al., arXiv:2103.00020, appendix A.3, as clip_benchmark does it.
    """

    name: str = "linear_probe"
    """First part of the name of every number."""
    train: str = "train"
    """Sub-folder of the images to train on."""
    test: str | None = None
    """Sub-folder of the images to measure on; by default test, or val without it."""
    validation: str | None = None
    """Sub-folder of the images that choose the weight decay; by default val, where it is not
    measured on."""
    validation_share: OpenShare = 0.2
    """Without such a folder, the share of the training images that choose instead, drawn with the
    seed; they are trained on too once the weight decay is chosen."""
    weight_decay: NotNegative | None = None
    """By default searched: 7 of the 97 values from 1e-6 to 100, then closer and closer around the
    best."""
    solver: Solver = "lbfgs"
    """lbfgs: the optimum of the mean cross-entropy plus half the weight decay times the squared
    weights, without a learning rate. adamw, sgd: epochs with a cosine, as clip_benchmark trains."""
    epochs: Count = 10
    """Of adamw and sgd."""
    learning_rate: Positive = 0.1
    """Of adamw and sgd, at the start."""
    probe_batch: Count = 64
    """Embeddings in a step of adamw and sgd."""
    seed: Seed = 0
    """Of the first weights, the order and the drawn validation images."""
    features: Path | None = None
    """Folder where embeddings are kept for the next time; without it they are not."""

    _part: ClassVar[str] = "zero_shot"
    _scores = ("top1", "top5", "mean_per_class_recall")

    def evaluate(
        self,
        bundle: ModelBundle,
        run: Run,
        *,
        show: Show | None = None,
        keep: Keep | None = None,
    ) -> dict[str, float | int]:
        """``{name}_top1``, ``_top5``, ``_mean_per_class_recall``, ``_weight_decay``.

        Also ``_images``, ``_train_images``, ``_validation_images`` and ``_classes``, and where
        there are such ``_classes_without_images`` and ``_passed_over``. Every process of the run
        calls this and gets the same numbers; {} where there is no data.

        Raises:
            InputError: if the data is missing, or its parts do not have the same classes.
        """
        del show
        folder = self.folder()
        if folder is None:
            return self._skip(run)
        from frugal.common.evaluation import linear_probe

        return linear_probe.evaluate(self, folder, bundle, run, keep)
