"""Builds the stream of training batches that a recipe describes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from frugal.common.contracts import Stream
from frugal.common.data.agreement import check_same_data
from frugal.common.data.class_matching import keep_classes
from frugal.common.data.config import StoredData
from frugal.common.data.contents import contents_of, streamed_contents
from frugal.common.data.damage import Damaged
from frugal.common.data.order import GlobalOrder, Order, WeightedOrder
from frugal.common.data.pairs import Pairs, Preparation, Shelf
from frugal.common.data.passed_over import PassedOver, shortened
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
from frugal.common.data.stores.folder import FileList, refuse_without_words
from frugal.common.data.stores.url import can_read
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
    contents = contents_of(sources)
    check_same_data(contents, run)
    order = make_order(data, sources, seed=recipe.run.seed)
    if preparation.num_classes is not None:
        _keep_classes(sources, recipe, run, is_resumed=first_sample > 0)
    shards = [shard for source in sources for shard in source.shards]
    run.log.info("data: %s samples in %s shards", f"{order.samples:,}", f"{len(shards):,}")
    shelf = Shelf(shards, data.fields, sources=entries_of(sources))
    pairs = Pairs(shelf, order, preparation)
    return IndexedStream(
        pairs,
        share,
        epoch_samples=order.samples,
        workers=data.workers,
        pin_memory=pin_memory,
        contents=contents,
        limit=60 * data.timeout_minutes,
    )


def entries_of(sources: list[Source]) -> list[int]:
    """The entry of ``data.train`` that each shard is of; empty where there is one."""
    if len(sources) == 1:
        return []
    return [entry for entry, source in enumerate(sources) for _ in source.shards]


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
    passed_over = PassedOver()
    urls = [find_streams(pattern, passed_over) for pattern in data.train]
    contents = streamed_contents(urls)
    check_same_data(contents, run)
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
        contents=contents,
        limit=60 * data.timeout_minutes,
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
    passed_over = PassedOver()
    files = [
        find_files(
            pattern,
            fields=data.fields,
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
    fields = data.fields if data.tokenizer is not None else replace(data.fields, caption=())
    sources = [
        open_source(pattern, fields, found)
        for pattern, found in zip(data.train, files, strict=True)
    ]
    for line in passed_over.lines():
        run.log.warning("data: %s", line)
    for source in sources:
        source.tell(run.log)
    if data.tokenizer is not None:
        for shard in image_folders(sources):
            refuse_without_words(shard)
        _refuse_one_caption(sources)
    if num_classes is not None:
        _check_classes(sources, data.fields, num_classes)
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
        check = getattr(task, "check_classes", None)
        if check is not None:
            without = folder.classes_without_images
            check([name for name in folder.class_folders if name not in without])
    keep_classes(run.dir, folder, is_resumed=is_resumed, is_main=run.is_main)


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
    """The global order of the samples of all sources."""
    counts = [source.counts for source in sources]
    if data.weights:
        return WeightedOrder(counts, data.weights, seed=seed, window=data.shuffle_shards)
    return GlobalOrder([n for part in counts for n in part], seed=seed, window=data.shuffle_shards)
