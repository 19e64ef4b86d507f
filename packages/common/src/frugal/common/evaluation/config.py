"""What a finished model is measured on, as parts of a recipe; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from frugal.common.contracts import EvaluationTask
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError

if TYPE_CHECKING:
    from frugal.common.recipe import Recipe
    from frugal.common.run import Run


def _check(task: ZeroShot | Retrieval) -> None:
    kind = type(task).__name__
    if not task.name.isidentifier():
        raise InputError(
            f"the name of an evaluation is {task.name!r}; choose letters, digits and underscores, "
            "because its numbers are named after it"
        )
    if task.batch_size < 1:
        raise InputError(f"{kind}.batch_size is {task.batch_size}, must be at least 1")
    if task.workers < 0:
        raise InputError(f"{kind}.workers is {task.workers}, must not be negative")


def _folder(task: ZeroShot | Retrieval, part: str) -> Path | None:
    """The data of a task; of a scenes folder, the part that is meant for it."""
    if task.data is None:
        return None
    if not task.data.exists():
        raise InputError(
            f"the data of the evaluation {task.name!r} is not there: {task.data} does not exist; "
            "check the path, or leave it out to skip this evaluation"
        )
    inside = task.data / part
    return inside if inside.is_dir() else task.data


def _skip(task: ZeroShot | Retrieval, run: Run) -> dict[str, float | int]:
    run.log.info("the evaluation %s is skipped: it was given no data", task.name)
    return {}


@dataclass(frozen=True, kw_only=True)
class ZeroShot(EvaluationTask):
    """Zero-shot classification with class names written into prompt templates.

    Reads a scenes folder (``python -m frugal.common.scenes``), class-per-folder images
    (ImageNet-1k: the folders are WordNet ids), or clip_benchmark's webdataset layout.
    """

    name: str = "zero_shot"
    """First part of the name of every number."""
    data: Path | None = None
    """Folder of labelled images; without it this evaluation is skipped."""
    class_names: Literal["data", "imagenet"] = "data"
    """data: the names the data comes with (folders that are the WordNet ids of ImageNet-1k get
    ImageNet's names). imagenet: ImageNet-1k's 1,000 names, labels 0 to 999."""
    templates: Literal["data", "imagenet_7", "imagenet_80", "name"] = "data"
    """data: the templates the data comes with, or imagenet_7 where it has none. imagenet_7 and
    imagenet_80: OpenAI's for ImageNet. name: the bare class name."""
    crop: CenterCrop = field(default_factory=CenterCrop)
    """Which part of an image the model sees, at the size its image tower takes."""
    batch_size: int = 64
    """Images read at a time; the model takes 64 at a time whatever this is."""
    workers: int = 0
    """Processes that decode images, per process of the run; 0 decodes in the process itself."""

    def __post_init__(self) -> None:
        _check(self)

    def folder(self) -> Path | None:
        """Where the images are read from: ``data``, or ``zero_shot/`` in a scenes folder.

        Cheap: calling it before a run starts refuses a path that is not there.

        Raises:
            InputError: if data is given and missing.
        """
        return _folder(self, "zero_shot")

    def evaluate(self, model: Any, recipe: Recipe, run: Run) -> dict[str, float | int]:
        """``{name}_top1``, ``_top5``, ``_mean_per_class_recall``, ``_images`` and ``_classes``.

        Where the data says which classes training never saw (scenes: ``held_out.txt``), also
        ``{name}_top1_held_out``, ``_images_held_out`` and ``_classes_held_out``. Every process
        of the run calls this and gets the same numbers; {} where there is no data.

        Raises:
            InputError: if the data is missing, or its classes and names do not fit together.
        """
        folder = self.folder()
        if folder is None:
            return _skip(self, run)
        from frugal.common.evaluation import zero_shot

        return zero_shot.evaluate(self, folder, model, recipe, run)


@dataclass(frozen=True, kw_only=True)
class Retrieval(EvaluationTask):
    """Finding the image of a caption and a caption of an image, among all of a data set.

    Reads a scenes folder or clip_benchmark's webdataset layout of type retrieval; an image may
    have several captions.
    """

    name: str = "retrieval"
    """Part of the name of every number."""
    data: Path | None = None
    """Folder of captioned images; without it this evaluation is skipped."""
    crop: CenterCrop = field(default_factory=CenterCrop)
    """Which part of an image the model sees, at the size its image tower takes."""
    batch_size: int = 64
    """Images read at a time; the model takes 64 at a time whatever this is."""
    workers: int = 0
    """Processes that decode images, per process of the run; 0 decodes in the process itself."""

    def __post_init__(self) -> None:
        _check(self)

    def folder(self) -> Path | None:
        """Where the images are read from: ``data``, or ``retrieval/`` in a scenes folder.

        Cheap: calling it before a run starts refuses a path that is not there.

        Raises:
            InputError: if data is given and missing.
        """
        return _folder(self, "retrieval")

    def evaluate(self, model: Any, recipe: Recipe, run: Run) -> dict[str, float | int]:
        """``image_{name}_recall_at_{1,5,10}`` (text to image), ``text_{name}_...`` (to text).

        Also ``{name}_candidates`` (images to choose from) and ``{name}_captions``. Every process
        of the run calls this and gets the same numbers; {} where there is no data.

        Raises:
            InputError: if the data is missing.
        """
        folder = self.folder()
        if folder is None:
            return _skip(self, run)
        from frugal.common.evaluation import retrieval

        return retrieval.evaluate(self, folder, model, recipe, run)
