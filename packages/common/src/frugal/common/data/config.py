"""The part of a recipe that says what a run is trained on, and how its stream is built."""

from __future__ import annotations

import contextlib
import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from frugal.common.contracts import Stream, TrainedModel
from frugal.common.data.color import NO_CHANGE, ColorJitter
from frugal.common.data.contents import (
    Contents,
    check_same_data,
    contents_of,
    streamed_contents,
)
from frugal.common.data.damage import Damaged, PassedOver, shortened
from frugal.common.data.order import GlobalOrder, Order, WeightedOrder
from frugal.common.data.patterns import find_files, find_streams, is_stream
from frugal.common.data.resampled import ResampledStream, ShardDraws
from frugal.common.data.sample_transform import SampleTransform
from frugal.common.data.samples import Fields, Shard, image_extensions
from frugal.common.data.sources import Source, index_missing, open_source
from frugal.common.data.stored_vectors import (
    IMAGES,
    INDEX,
    TEXTS,
    StoredTexts,
    StoredVectors,
    open_texts,
    open_vectors,
    width_of,
)
from frugal.common.data.stores.class_folders import keep_classes
from frugal.common.data.stores.folder import FileList, refuse_without_words
from frugal.common.data.stores.url import can_read
from frugal.common.data.stream import IndexedStream, OrderedSamples, RankSlice, ReaderCache
from frugal.common.data.subset import SubsetOrder, first_of, read_subset
from frugal.common.data.tokenizers import Tokenizer, TokenizerConfig
from frugal.common.data.transforms import Augmentation, RandomResizedCrop
from frugal.common.distributed import require_same
from frugal.common.errors import InputError
from frugal.common.files import read_bytes, reason_of
from frugal.common.ranges import Count, CountOrZero, Positive, Share, Weight, check_ranges
from frugal.common.recipe import DataConfig, ModelInputs, Recipe
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.text import Truncate
from frugal.common.run import Run


@dataclass(frozen=True, kw_only=True)
class StoredData(DataConfig):
    """What training data of every kind share: where samples are, and how they are read."""

    train: tuple[str, ...]
    """Where the samples are: tars as img2dataset writes them (a path, 'path/{00000..41407}.tar', a
    glob or a folder), TFRecords, CSV files, class folders with images, or pipe: and cloud URLs."""
    weights: tuple[Weight, ...] = ()
    """Share of each entry of train in the samples read, in any unit; without them every sample is
    read once per epoch."""
    subset: Path | None = None
    """A list of the samples to train on, one shard/key per line; one that stands there twice comes
    twice in an epoch."""
    max_samples: Count | None = None
    """Train on the first of the samples only, in the order in which they are stored: for trials."""
    stored: Path | None = None
    """What frugal.common.embed --output pooled has written of train: images are not read then, nor
    cut; for objectives that leave the image tower as it is."""
    stored_texts: Path | None = None
    """What frugal.common.embed --texts --output pooled has written of train, perhaps the same
    folder: captions are not encoded then; for objectives that leave the text tower as it is."""
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

    @property
    @abstractmethod
    def sample_fields(self) -> Fields:
        """Where images and captions are found in a sample."""

    @property
    @abstractmethod
    def caption_tokenizer(self) -> TokenizerConfig | None:
        """What makes tokens of captions; None reads images alone."""

    @property
    @override
    def source_names(self) -> tuple[str, ...]:
        """The entries of ``train``."""
        return self.train

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if self.weights and len(self.weights) != len(self.train):
            raise InputError(
                f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries "
                "of data.train; give one per entry, or none"
            )
        if len(self.weights) == 1:
            raise InputError("data.weights of a single source have no effect; leave them out")

    @override
    def also_read(self) -> dict[str, str]:
        """Digests of the list of samples and of stored vectors, where there are any."""
        read = {
            "data.subset": self.subset,
            "data.stored": None if self.stored is None else self.stored / INDEX,
            "data.stored_texts": None if self.stored_texts is None else self.stored_texts / INDEX,
        }
        return {name: _digest(path, name) for name, path in read.items() if path is not None}

    @override
    def check(self, recipe: Recipe) -> None:
        """Refuse stored vectors where images or tokens are needed."""
        if self.stored is not None:
            self._check_stored(recipe)
        if self.stored_texts is not None:
            self._check_stored_texts(recipe)
        for name, folder in (("stored", self.stored), ("stored_texts", self.stored_texts)):
            if folder is not None and self.resampled_samples is not None:
                raise InputError(
                    f"data.{name} goes with samples that are read by number; leave out "
                    "data.resampled_samples"
                )

    def _check_stored(self, recipe: Recipe) -> None:
        if not recipe.objective.takes_vectors:
            raise InputError(
                f"data.stored {self.stored} holds what an image tower puts out, which "
                f"{type(recipe.objective).__name__} would train; choose "
                "frugal.cit's LockedContrastive with --objective.train-image none, or leave it out"
            )
        if not isinstance(recipe.reduction.image, KeepAll):
            raise InputError(
                f"reduction.image {type(recipe.reduction.image).__name__} leaves out patches, but "
                "data.stored has images no more; choose frugal.common.reduction.image.KeepAll"
            )
        if recipe.objective.groups_by == "field":
            raise InputError(
                "objective.positives is group, but of a sample whose image is stored nothing but "
                "captions is read; leave it out, or data.stored"
            )

    def _check_stored_texts(self, recipe: Recipe) -> None:
        if not recipe.objective.takes_text_vectors:
            raise InputError(
                f"data.stored_texts {self.stored_texts} holds what a text tower puts out, which "
                f"{type(recipe.objective).__name__} would train or reads the tokens of; choose "
                "frugal.cit's LockedContrastive with --objective.train-text none and without a "
                "token loss, or leave it out"
            )
        if type(recipe.reduction.text) is not Truncate:
            raise InputError(
                f"reduction.text {type(recipe.reduction.text).__name__} chooses among the tokens "
                "of a caption, but data.stored_texts has none any more; choose "
                "frugal.common.reduction.text.Truncate"
            )

    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: TrainedModel | None,
    ) -> Stream:
        """The micro-batches of this process from ``first_sample`` on.

        Raises:
            InputError: if there is no data, or it cannot be read.
        """
        if not self.train:
            what = "images" if self.caption_tokenizer is None else "image-text pairs"
            raise InputError(
                f"data.train is empty; say where the {what} are, such as --data.train "
                "'path/to/{00000..00010}.tar'"
            )
        transform = make_transform(self, recipe)
        rank_slice = RankSlice.of(recipe, run, first_sample=first_sample)
        if self.resampled_samples is not None and (self.subset or self.max_samples):
            raise InputError(
                "data.subset and data.max_samples choose samples by their place in shards, but "
                "data.resampled_samples reads shards from their beginning on; leave one of them out"
            )
        if self.resampled_samples is not None and recipe.engine.virtual_processes is not None:
            raise InputError(
                "data.resampled_samples draws other samples on another number of processes, so "
                "that engine.virtual_processes cannot keep its promise; copy the shards to a disk, "
                "or leave one of them out"
            )
        if self.resampled_samples is not None:
            return _resampled(self, self.resampled_samples, run, transform, rank_slice, state)
        return _indexed(self, recipe, run, transform, rank_slice, engine)


@dataclass(frozen=True, kw_only=True)
class PairData(StoredData):
    """Image-text pairs."""

    tokenizer: TokenizerConfig | None
    """None reads images alone."""
    color: ColorJitter = NO_CHANGE
    """Random changes of color, made on the device; by default none."""
    fields: Fields = field(default_factory=Fields)

    @property
    def sample_fields(self) -> Fields:
        """Where images and captions are found in a sample."""
        return self.fields

    @property
    def caption_tokenizer(self) -> TokenizerConfig | None:
        """What makes tokens of captions; None reads images alone."""
        return self.tokenizer

    @property
    @override
    def color_change(self) -> ColorJitter:
        """The color jitter."""
        return self.color

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
    def sample_fields(self) -> Fields:
        """Where images are found in a sample."""
        return Fields(image=self.image_extensions, caption=())

    @property
    def caption_tokenizer(self) -> None:
        """None: there is nothing to tokenize."""
        return None


def _vectors_of(
    data: StoredData,
    sources: Sequence[Source],
    recipe: Recipe,
    run: Run,
    engine: TrainedModel | None,
) -> StoredVectors | None:
    """The stored vectors of the images of a run, if it trains on such.

    Raises:
        InputError: if they are of other data, or of another tower than the run's.
    """
    if data.stored is None:
        return None
    vectors = open_vectors(data.stored, sources, data.sample_fields, seed=recipe.run.seed)
    frozen = "" if engine is None else engine.objective.frozen_image
    _check_tower(f"data.stored {data.stored}", "image", vectors.tower, frozen)
    run.log.info(
        "images are not read: %s holds %d of their vectors, %d numbers each",
        data.stored, vectors.views, vectors.width,
    )  # fmt: skip
    return vectors


def _texts_of(
    data: StoredData, sources: Sequence[Source], run: Run, engine: TrainedModel | None
) -> StoredTexts | None:
    """The stored vectors of the captions of a run, if it trains on such.

    Raises:
        InputError: if they are of other data, or of another tower than the run's.
    """
    if data.stored_texts is None:
        return None
    texts = open_texts(data.stored_texts, sources, data.sample_fields)
    frozen = "" if engine is None else engine.objective.frozen_text
    _check_tower(f"data.stored_texts {data.stored_texts}", "text", texts.tower, frozen)
    run.log.info(
        "captions are not encoded: %s holds their vectors, %d numbers each",
        data.stored_texts, texts.width,
    )  # fmt: skip
    return texts


def _check_tower(stored: str, kind: str, digest: str, frozen: str) -> None:
    """Refuse vectors of another tower than a run begins with, where it tells its digest."""
    if frozen and frozen != digest:
        raise InputError(
            f"{stored} is of another {kind} tower than the one that this run starts from; embed "
            "the data with that one"
        )


def _indexed(
    data: StoredData,
    recipe: Recipe,
    run: Run,
    transform: SampleTransform,
    rank_slice: RankSlice,
    engine: TrainedModel | None,
) -> IndexedStream:
    """Samples that can be read in any order: each comes exactly once per epoch."""
    opened = open_data(data, recipe, run, engine, num_classes=transform.num_classes)
    if transform.num_classes is not None:
        _keep_classes(opened.sources, recipe, run, is_resumed=rank_slice.first_sample > 0)
    return IndexedStream(
        OrderedSamples(
            opened.readers,
            opened.order,
            transform,
            vectors=opened.vectors,
            texts=opened.texts,
        ),
        rank_slice,
        epoch_samples=opened.order.samples,
        workers=data.workers,
        pin_memory=run.device.type == "cuda",
        contents=opened.contents,
        limit=60 * data.timeout_minutes,
    )


def _digest(path: Path, name: str) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise InputError(
            f"{name}: {path} cannot be read ({reason_of(error)}); give another one"
        ) from None


@dataclass(frozen=True)
class OpenedData:
    """What a run reads by number: the samples of all entries of ``data.train``, in one order."""

    sources: list[Source]
    shards: list[Shard]
    readers: ReaderCache
    order: Order
    contents: Contents
    vectors: StoredVectors | None
    """What is stored of images, which are not read then."""
    texts: StoredTexts | None
    """What is stored of captions, which do not become tokens then."""


def open_data(
    data: StoredData,
    recipe: Recipe,
    run: Run,
    engine: TrainedModel | None,
    *,
    num_classes: int | None = None,
    called: tuple[str, str] = ("data", "samples"),
) -> OpenedData:
    """Open all that a run reads by number; every process of it must call this.

    Args:
        data: the part of a recipe.
        recipe: the whole.
        run: is told what was found.
        engine: holds the model, whose frozen towers stored vectors must be of.
        num_classes: classes that the model tells apart; None where it needs none.
        called: what it is, and what it has, in the log.

    Raises:
        InputError: if something is missing, altered, named twice, or does not go together.
    """
    sources = open_sources(data, run, num_classes=num_classes)
    contents = contents_of(sources)
    check_same_data(contents)
    order = make_order(data, sources, seed=recipe.run.seed)
    shards = [shard for source in sources for shard in source.shards]
    run.log.info(
        "%s: %s %s in %s shards", called[0], f"{order.samples:,}", called[1], f"{len(shards):,}"
    )
    if data.max_samples is not None and order.samples < data.max_samples:
        run.log.warning("data.max_samples is %d, but there are no more", data.max_samples)
    readers = ReaderCache(shards, data.sample_fields, sources=_entries_of(sources))
    _check_groups(data, recipe, run, readers, order)
    vectors = _vectors_of(data, sources, recipe, run, engine)
    texts = _texts_of(data, sources, run, engine)
    return OpenedData(sources, shards, readers, order, contents, vectors, texts)


_LOOKED_AT = 64
"""Samples, evenly spread, that are asked for their group before a run begins."""


def _check_groups(
    data: StoredData, recipe: Recipe, run: Run, readers: ReaderCache, order: Order
) -> None:
    """Say how many samples have a group, where an objective asks for the field of one.

    Raises:
        InputError: if none has, so that the field is probably another.
    """
    name = data.sample_fields.group
    if recipe.objective.groups_by != "field":
        if name is not None:
            run.log.warning(
                "data.fields.group is %s, which this objective does not ask for; give "
                "--objective.positives group",
                name,
            )
        return
    numbers = np.unique(np.linspace(0, order.samples - 1, _LOOKED_AT).astype(np.int64))
    places = list(zip(*(each.tolist() for each in order.locate(numbers)), strict=True))
    groups = 0
    for shard, index in places:
        with contextlib.suppress(Damaged):
            groups += readers.reader(shard).read(index).group is not None
    if not groups:
        raise InputError(
            f"none of {len(places)} samples, evenly spread, has the data.fields.group {name}; name "
            "another field, or leave out objective.positives"
        )
    run.log.info("%d of %d samples, evenly spread, have a %s", groups, len(places), name)


def _resampled(
    data: StoredData,
    epoch_samples: int,
    run: Run,
    transform: SampleTransform,
    rank_slice: RankSlice,
    state: dict[str, Any],
) -> ResampledStream:
    """Shards that can only be read from their beginning on, drawn with replacement."""
    passed_over = PassedOver()
    urls = [find_streams(pattern, passed_over) for pattern in data.train]
    contents = streamed_contents(urls)
    check_same_data(contents)
    odd = next((url for part in urls for url in part if not can_read(url)), None)
    if odd is not None:
        raise InputError(
            f"data.train names {odd}, and there is no command for URLs of this kind; give one "
            f"yourself, such as 'pipe:aws s3 cp {odd} -'"
        )
    for line in passed_over.lines():
        run.log.warning("data: %s", line)
    run.log.info(
        "data: %s samples to an epoch, drawn with replacement from %s shards",
        f"{epoch_samples:,}",
        f"{sum(map(len, urls)):,}",
    )
    return ResampledStream(
        ShardDraws(urls, data.weights, seed=transform.seed),
        data.sample_fields,
        transform,
        rank_slice,
        state=state,
        epoch_samples=epoch_samples,
        open_shards=data.shuffle_shards,
        workers=data.workers,
        pin_memory=run.device.type == "cuda",
        contents=contents,
        limit=60 * data.timeout_minutes,
    )


def _entries_of(sources: Sequence[Source]) -> list[int]:
    """The entry of ``data.train`` that each shard is of; empty where there is one."""
    if len(sources) == 1:
        return []
    return [entry for entry, source in enumerate(sources) for _ in source.shards]


def make_transform(data: StoredData, recipe: Recipe) -> SampleTransform:
    """What a recipe does to every sample between the store and the model.

    Raises:
        InputError: if tokenizer and text tower do not fit, or cannot be loaded.
    """
    tokenizer, inputs = None, recipe.model.inputs()
    length = 0 if inputs.captions is None else inputs.captions.length
    if data.caption_tokenizer is not None:
        tokenizer = data.caption_tokenizer.load()
        _check_tokenizer(tokenizer, inputs)
        tokenizer.assemble((), length)  # refuses what leaves no room for words
        if recipe.reduction.text is None:
            raise InputError(
                "reduction.text is None, but captions are read; choose what stays of them, such as "
                "with --reduction.text frugal.common.reduction.text.Truncate"
            )
        recipe.reduction.text.prepare(tokenizer, length=length)
    if recipe.objective.groups_by == "field" and data.sample_fields.group is None:
        raise InputError(
            "objective.positives is group, but data.fields.group does not say where samples have "
            "one; name it, such as --data.fields.group json.id"
        )
    return SampleTransform(
        seed=recipe.run.seed,
        augmentation=data.augmentation,
        image_size=inputs.height_width,
        tokenizer=tokenizer,
        text=recipe.reduction.text,
        text_length=0 if tokenizer is None else length,
        num_classes=inputs.num_classes,
        caption_weights=data.sample_fields.weights,
        groups_by=recipe.objective.groups_by,
        vector_width=None if data.stored is None else width_of(data.stored, IMAGES),
        text_vector_width=(
            None if data.stored_texts is None else width_of(data.stored_texts, TEXTS)
        ),
    )


def _check_tokenizer(tokenizer: Tokenizer, inputs: ModelInputs) -> None:
    captions = inputs.captions
    if captions is None:
        raise InputError(
            "data.tokenizer makes tokens of captions, but this model is given none; set it to "
            "None, or choose a model that reads captions"
        )
    if tokenizer.vocab_size > captions.vocabulary:
        raise InputError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, more than the table of "
            f"model.text.vocabulary = {captions.vocabulary} rows; raise it, or choose the "
            "tokenizer that the model was made for"
        )
    if tokenizer.pad_id != captions.pad_id:
        raise InputError(
            f"data.tokenizer pads with {tokenizer.pad_id}, but model.text.pad_id is "
            f"{captions.pad_id}; make them equal"
        )


def _refuse_lists(data: StoredData, sources: Sequence[Source]) -> None:
    """Refuse a field of groups that lists and folders of images do not have."""
    if data.sample_fields.group is None:
        return
    for listed in (each for source in sources for each in source.lists):
        raise InputError(
            f"data.fields.group names a field of shards, but {listed.name} is a list or folder; "
            "leave it out, or convert it with `python -m frugal.common.shards convert`"
        )


def open_sources(data: StoredData, run: Run, *, num_classes: int | None = None) -> list[Source]:
    """The shards of every entry of ``data.train``; every process of a run must call this.

    Args:
        data: the part of a recipe.
        run: for its log.
        num_classes: classes that the model tells apart; None where it needs none.

    Raises:
        InputError: if something is missing, altered or named twice, or the classes are others.
    """
    url = next((pattern for pattern in data.train if is_stream(pattern)), None)
    if url is not None:
        raise InputError(
            f"data.train names {url}, which can only be read from its beginning on; set "
            "data.resampled_samples to the samples of an epoch and read it with replacement"
        )
    without_classes = data.caption_tokenizer is None and num_classes is None
    passed_over = PassedOver()
    files = [
        find_files(
            pattern,
            fields=data.sample_fields,
            without_classes=without_classes,
            passed_over=passed_over,
        )
        for pattern in data.train
    ]
    counts = Counter(path for found in files for path in found)
    twice = next((path for path, count in counts.items() if count > 1), None)
    if twice is not None:
        raise InputError(f"data.train names {twice} more than once; name every shard once")
    index_missing([path for found in files for path in found], run.log)
    # where nobody reads captions, text beside images is passed over like any other file
    fields = data.sample_fields
    if data.caption_tokenizer is None:
        fields = replace(fields, caption=())
    sources = [
        open_source(pattern, fields, found)
        for pattern, found in zip(data.train, files, strict=True)
    ]
    for line in passed_over.lines():
        run.log.warning("data: %s", line)
    for source in sources:
        source.tell(run.log)
    _refuse_lists(data, sources)
    if data.caption_tokenizer is not None:
        for shard in image_folders(sources):
            refuse_without_words(shard)
        _refuse_one_caption(sources)
    if num_classes is not None:
        _check_classes(sources, data.sample_fields, num_classes)
    return sources


def _refuse_one_caption(sources: list[Source]) -> None:
    """Refuse class folders of one class as the only source of captions.

    Raises:
        InputError: if every image would have the same caption.
    """
    folders = image_folders(sources)
    classes = {name for shard in folders for name in shard.class_names}
    if len(classes) == 1 and len(folders) == sum(len(source.shards) for source in sources):
        raise InputError(
            f"{folders[0].name} holds images in one class folder only ({min(classes)}), so that "
            "every image would have the same caption; give a .csv or .tsv list of images and "
            "captions, tars, or more class folders"
        )


def _keep_classes(sources: list[Source], recipe: Recipe, run: Run, *, is_resumed: bool) -> None:
    """Keep the classes with the run, and refuse now what would be measured on others.

    Every source has the same ones.
    """
    folder = next((shard for shard in image_folders(sources) if shard.class_folders), None)
    if folder is None:
        return
    for task in recipe.evaluation:
        without = folder.classes_without_images
        task.check_classes([name for name in folder.class_folders if name not in without])
    keep_classes(
        run.dir,
        folder.class_folders,
        folder.class_names,
        source=folder.name,
        is_resumed=is_resumed,
        is_main=run.is_main,
    )


def image_folders(sources: Sequence[Source]) -> list[FileList]:
    """The folders of images among some sources; a list, or a folder, is the one shard of its."""
    return [shard for source in sources for shard in source.lists]


def _check_classes(sources: list[Source], fields: Fields, num_classes: int) -> None:
    """Refuse data whose classes are not those of the model, as far as a first look can tell."""
    numbered: FileList | None = None
    for shard in (shard for source in sources for shard in source.shards[:1]):
        folders = shard.class_folders if isinstance(shard, FileList) else ()
        if isinstance(shard, FileList) and folders and len(folders) != num_classes:
            without = shard.empty_folders
            empty = f" with images (none: {shortened(without)})" if without else ""
            raise InputError(
                f"{shard.name} has {len(folders)} class folders{empty}, but the model tells apart "
                f"model.num_classes = {num_classes}; make them equal"
            )
        if isinstance(shard, FileList) and folders:
            if numbered is not None and numbered.class_folders != folders:
                raise InputError(
                    f"{shard.name} has other class folders than {numbered.name}, so that a number "
                    "would mean two classes; give them the same names"
                )
            numbered = shard
        if not folders and not _has_class(shard, fields):
            raise InputError(
                f"the images of {shard.name} have no classes, which this model needs; give folders "
                "with one folder of images per class, or tars with cls members"
            )


def _has_class(shard: Shard, fields: Fields) -> bool:
    """Whether the first sample that can be read has a class; True where none can be read."""
    reader = shard.open(fields)
    try:
        for index in range(shard.num_samples):
            try:
                return reader.read(index).label is not None
            except Damaged:
                continue
    finally:
        reader.close()
    return True


def make_order(data: StoredData, sources: list[Source], *, seed: int) -> Order:
    """The global order of the samples of all sources, or of those that are to be read.

    Raises:
        InputError: if data.subset cannot be read, names what is not there, or leaves nothing of a
            source with a weight.
    """
    chosen = _chosen_samples(data, sources)
    if chosen is None:
        return _order_of([source.counts for source in sources], data, seed=seed)
    counts = iter([len(each) for each in chosen])
    kept = [[next(counts) for _ in source.shards] for source in sources]
    if data.weights and (
        empty := [name for n, name in zip(kept, data.train, strict=True) if not sum(n)]
    ):
        raise InputError(
            f"data.subset and data.max_samples leave nothing of {empty[0]}, which has a share in "
            "data.weights; leave it out of data.train"
        )
    return SubsetOrder(_order_of(kept, data, seed=seed), chosen)


def _order_of(counts: list[list[int]], data: StoredData, *, seed: int) -> Order:
    if data.weights:
        return WeightedOrder(counts, data.weights, seed=seed, window=data.shuffle_shards)
    return GlobalOrder([n for part in counts for n in part], seed=seed, window=data.shuffle_shards)


def _chosen_samples(data: StoredData, sources: list[Source]) -> list[np.ndarray] | None:
    """Of every shard the samples that are read; None where all are."""
    if data.subset is None:
        counts = [count for source in sources for count in source.counts]
        return None if data.max_samples is None else first_of(counts, data.max_samples)
    require_same(
        data.also_read()["data.subset"],
        f"data.subset {data.subset}",
        remedy="copy the same list to every machine",
    )
    listed = read_subset(data.subset, sources, data.sample_fields)
    if data.max_samples is None:
        return listed
    places = first_of([len(each) for each in listed], data.max_samples)
    return [each[kept] for each, kept in zip(listed, places, strict=True)]
