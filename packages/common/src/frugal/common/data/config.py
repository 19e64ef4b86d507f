"""The part of a recipe that says what a run is trained on; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from frugal.common.contracts import DataConfig
from frugal.common.data.color import NO_CHANGE, ColorJitter
from frugal.common.data.samples import Fields, image_extensions
from frugal.common.data.tokenizers import TokenizerConfig
from frugal.common.data.transforms import Augmentation, RandomResizedCrop
from frugal.common.errors import InputError
from frugal.common.ranges import Count, CountOrZero, Positive, Range, Share, check_ranges

if TYPE_CHECKING:
    from frugal.common.contracts import Stream
    from frugal.common.recipe import Recipe
    from frugal.common.run import Run


_Weight = Annotated[float, Range(above=0, hint="leave out what is not to be read")]


@dataclass(frozen=True, kw_only=True)
class StoredData(DataConfig):
    """What training data of every kind share: where samples are, and how they are read."""

    train: tuple[str, ...]
    """Where the samples are: tars as img2dataset writes them (a path, 'path/{00000..41407}.tar', a
    glob or a folder), TFRecords, CSV files, class folders with images, or pipe: and cloud URLs."""
    weights: tuple[_Weight, ...] = ()
    """Share of each entry of train in the samples read, in any unit; without them every sample is
    read once per epoch."""
    augmentation: Augmentation = field(default_factory=RandomResizedCrop)
    shuffle_shards: Count = 16
    """Shards whose samples are mixed with one another."""
    max_damaged: Share = 0.05
    """Fraction of damaged samples at which the run stops."""
    resampled_samples: Count | None = None
    """Read with replacement, this many samples to an epoch; the only way to read URLs."""
    workers: CountOrZero = 4
    """Loader processes per process of the run; 0 loads in the process itself."""
    timeout_minutes: Positive = 10.0
    """Without any data for so long the run ends with a sentence. A URL or command that gives
    nothing for half as long counts as a damaged shard."""

    if TYPE_CHECKING:  # fields of one kind of data, and the same for all data of another

        @property
        def fields(self) -> Fields:
            """Where images and captions are found in a sample."""

        @property
        def tokenizer(self) -> TokenizerConfig | None:
            """What makes tokens of captions; None reads images alone."""

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if self.weights and len(self.weights) != len(self.train):
            raise InputError(
                f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries "
                "of data.train; give one per entry, or none"
            )
        if len(self.weights) == 1:
            raise InputError("data.weights of a single source have no effect; leave them out")

    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: Any,
    ) -> Stream:
        """The micro-batches of this process from ``first_sample`` on.

        Raises:
            InputError: if there is no data, or it cannot be read.
        """
        from frugal.common.data.training import build_stream

        del engine  # such data does not ask the model
        return build_stream(self, recipe, run, first_sample=first_sample, state=state)


@dataclass(frozen=True, kw_only=True)
class PairData(StoredData):
    """Image-text pairs."""

    tokenizer: TokenizerConfig | None
    """None reads images alone."""
    color: ColorJitter = NO_CHANGE
    """Random changes of color, made on the device; by default none."""
    fields: Fields = field(default_factory=Fields)

    def save_tokenizer(self, folder: Path) -> None:
        """Keep with a run what is needed to tokenize as it did."""
        if self.tokenizer is not None:
            self.tokenizer.load().save(folder)


@dataclass(frozen=True, kw_only=True)
class ImageData(StoredData):
    """Images without captions, with the number of their class where they have one.

    Classes come from class folders, numbered in the order of torchvision's ImageFolder, or from
    ``cls`` members. A model with ``num_classes`` needs one of that many for every image; for other
    models a folder may also hold images and nothing else.
    """

    image_extensions: tuple[str, ...] = image_extensions()
    """Of images in tars, TFRecords and folders; the first that a sample has."""

    @property
    def fields(self) -> Fields:
        """Where images are found in a sample."""
        return Fields(image=self.image_extensions, caption=())

    @property
    def tokenizer(self) -> None:
        """None: there is nothing to tokenize."""
        return None
