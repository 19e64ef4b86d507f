"""Builds the stream of training batches that a recipe describes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from frugal.common.contracts import Stream
from frugal.common.data.config import StoredData
from frugal.common.data.damage import Damaged
from frugal.common.data.folders import FileList
from frugal.common.data.order import GlobalOrder, Order, WeightedOrder
from frugal.common.data.pairs import Pairs, Preparation, Shelf
from frugal.common.data.resampled import ResampledStream, ShardDraws
from frugal.common.data.samples import Fields, Shard
from frugal.common.data.sources import (
    Source,
    find_files,
    find_streams,
    index_missing,
    is_stream,
    open_source,
)
from frugal.common.data.stream import IndexedStream, Share
from frugal.common.data.tokenizers import Tokenizer
from frugal.common.errors import InputError
from frugal.common.recipe import Recipe
from frugal.common.run import Run


def build_stream(
    data: StoredData, recipe: Recipe, run: Run, *, first_sample: int, state: dict[str, Any]
) -> Stream:
    """See :meth:`frugal.common.data.config.StoredData.build`."""
    if not data.train:
        what = "images" if data.tokenizer is None else "image-text pairs"
        raise InputError(
            f"data.train is empty; say where the {what} are, such as --data.train "
            "'path/to/{00000..00010}.tar'"
        )
    preparation = make_preparation(data, recipe)
    share = make_share(recipe, run, first_sample=first_sample)
    pin_memory = run.device.type == "cuda"
    if data.resampled_samples is not None:
        return _resampled(data, run, preparation, share, state, pin_memory=pin_memory)
    sources = open_sources(data, run, num_classes=preparation.num_classes)
    order = make_order(data, sources, seed=recipe.run.seed)
    shards = [shard for source in sources for shard in source.shards]
    run.log.info("data: %s samples in %s shards", f"{order.samples:,}", f"{len(shards):,}")
    pairs = Pairs(Shelf(shards, data.fields), order, preparation)
    return IndexedStream(
        pairs,
        share,
        epoch_samples=order.samples,
        workers=data.workers,
        pin_memory=pin_memory,
    )


def make_share(recipe: Recipe, run: Run, *, first_sample: int) -> Share:
    """What of the samples from ``first_sample`` on this process reads."""
    return Share(
        first_sample=first_sample,
        micro_batch=recipe.batch_size // recipe.engine.accumulate,
        rank=run.rank,
        world_size=run.world_size,
    )


def _resampled(
    data: StoredData,
    run: Run,
    preparation: Preparation,
    share: Share,
    state: dict[str, Any],
    *,
    pin_memory: bool,
) -> ResampledStream:
    assert data.resampled_samples is not None
    urls = [find_streams(pattern) for pattern in data.train]
    run.log.info(
        "data: %s samples to an epoch, drawn with replacement from %s shards",
        f"{data.resampled_samples:,}",
        f"{sum(map(len, urls)):,}",
    )
    draws = ShardDraws(urls, data.weights, seed=preparation.seed)
    return ResampledStream(
        draws,
        data.fields,
        preparation,
        share,
        state=state,
        epoch_samples=data.resampled_samples,
        open_shards=data.shuffle_shards,
        workers=data.workers,
        pin_memory=pin_memory,
    )


def make_preparation(data: StoredData, recipe: Recipe) -> Preparation:
    """What a recipe does to every sample.

    Raises:
        InputError: if tokenizer and text tower do not fit, or cannot be loaded.
    """
    tokenizer = None
    if data.tokenizer is not None:
        tokenizer = data.tokenizer.load()
        _check_tokenizer(tokenizer, recipe)
        tokenizer.assemble((), recipe.model.text.length)  # refuses what leaves no room for words
        if recipe.reduction.text is None:
            raise InputError(
                "reduction.text is None, but captions are read; choose what stays of them, such as "
                "with --reduction.text frugal.common.reduction.text.Truncate"
            )
        prepare = getattr(recipe.reduction.text, "prepare", None)
        if prepare is not None:
            prepare(tokenizer, length=recipe.model.text.length)
    return Preparation(
        seed=recipe.run.seed,
        augmentation=data.augmentation,
        image_size=recipe.model.image.height_width,
        tokenizer=tokenizer,
        text=recipe.reduction.text,
        text_length=0 if tokenizer is None else recipe.model.text.length,
        num_classes=getattr(recipe.model, "num_classes", None),
    )


def _check_tokenizer(tokenizer: Tokenizer, recipe: Recipe) -> None:
    text = recipe.model.text
    if tokenizer.vocab_size > text.vocabulary:
        raise InputError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, more than the table of "
            f"model.text.vocabulary = {text.vocabulary} rows; raise it, or choose the tokenizer "
            "that the model was made for"
        )
    if tokenizer.pad_id != text.pad_id:
        raise InputError(
            f"data.tokenizer pads with {tokenizer.pad_id}, but model.text.pad_id is {text.pad_id}; "
            "make them equal"
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
    without_classes = data.tokenizer is None and num_classes is None
    files = [
        find_files(pattern, fields=data.fields, without_classes=without_classes)
        for pattern in data.train
    ]
    counts = Counter(path for found in files for path in found)
    twice = next((path for path, count in counts.items() if count > 1), None)
    if twice is not None:
        raise InputError(f"data.train names {twice} more than once; name every shard once")
    index_missing([path for found in files for path in found], run.log)
    sources = [
        open_source(pattern, data.fields, found)
        for pattern, found in zip(data.train, files, strict=True)
    ]
    for note in (note for source in sources for note in source.notes):
        run.log.warning("%s; what lies behind that is lost", note)
    if num_classes is not None:
        _check_classes(sources, data.fields, num_classes)
    return sources


def _check_classes(sources: list[Source], fields: Fields, num_classes: int) -> None:
    """Refuse data whose classes are not those of the model, as far as a first look can tell."""
    numbered: FileList | None = None
    for shard in (shard for source in sources for shard in source.shards[:1]):
        folders = shard.class_folders if isinstance(shard, FileList) else ()
        if folders and len(folders) != num_classes:
            raise InputError(
                f"{shard.name} has {len(folders)} class folders, but the model tells apart "
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
    """The global order of the samples of all sources."""
    counts = [source.counts for source in sources]
    if data.weights:
        return WeightedOrder(counts, data.weights, seed=seed, window=data.shuffle_shards)
    return GlobalOrder([n for part in counts for n in part], seed=seed, window=data.shuffle_shards)
