"""What evaluations of a model on the data of a folder have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from typing_extensions import override

from frugal.common.contracts import EvaluationTask, Keep, Show
from frugal.common.data.transforms import CenterCrop
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.ranges import Count, CountOrZero, Range, check_ranges
from frugal.common.run import Run


@dataclass(frozen=True)
class Inputs:
    """What one measurement is made of, and who is told of it."""

    bundle: ModelBundle
    """On the device of the run."""
    folder: Path
    """Of the data; it is there."""
    run: Run
    ranks: Ranks
    """The processes that share the images."""
    show: Show | None
    """Takes pictures of what the model said."""
    keep: Keep | None
    """Takes what was found image by image."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images that the model takes."""
        return self.bundle.image.height_width


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
    @override
    def scores(self) -> tuple[str, ...]:
        """As every evaluation."""
        return tuple(map(self.number_name, self._scores))

    def number_name(self, kind: str) -> str:
        """What a number of this kind is called, among those of all evaluations of a run."""
        return f"{self.name}_{kind}"

    @override
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

    @override
    def evaluate(
        self,
        bundle: ModelBundle,
        run: Run,
        *,
        show: Show | None = None,
        keep: Keep | None = None,
    ) -> dict[str, float | int]:
        """What :meth:`measure` finds, the same on every process; {} where there is no data.

        Raises:
            InputError: if the data is missing, or cannot be used.
        """
        folder = self.folder()
        if folder is None:
            run.log.info("the evaluation %s is skipped: it was given no data", self.name)
            return {}
        given = Inputs(bundle, folder, run, Ranks.current(), show, keep)
        return {self.number_name(kind): number for kind, number in self.measure(given).items()}

    @abstractmethod
    def measure(self, given: Inputs) -> dict[str, float | int]:
        """Numbers by their kind (see :meth:`number_name`); every process of the run calls this."""


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

    @property
    def reduces_texts(self) -> bool:
        """Shorten texts as the training of the model shortened captions, by its reduction."""
        return False
