"""Image-text retrieval: the image of every caption, and a caption of every image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.data.labeled import CaptionedImages, ImageSet, walk_images
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Measure, SampleResults
from frugal.common.evaluation.embed import Embedder, text_table
from frugal.common.evaluation.metrics import Recall, recall_at, similarity
from frugal.common.evaluation.pictures import Picture, draw_predictions, example_places
from frugal.common.evaluation.provenance import identify
from frugal.common.evaluation.task import ImageEvaluation, Inputs
from frugal.common.models.bundle import ModelBundle


@dataclass(frozen=True, kw_only=True)
class Retrieval(ImageEvaluation):
    """Finding the image of a caption and a caption of an image, among all of a data set.

    Reads a scenes folder or clip_benchmark's webdataset layout of type retrieval; an image may
    have several captions.
    """

    name: str = "retrieval"
    """Part of the name of every number."""

    _part = "retrieval"
    _scores = tuple(f"{way}_recall_at_{k}" for way in ("image", "text") for k in (1, 5, 10))

    @override
    def number_name(self, kind: str) -> str:
        """As of all evaluations, but for recalls, whose direction comes first."""
        way, _, recall = kind.partition("_recall_at_")
        return f"{way}_{self.name}_recall_at_{recall}" if recall else super().number_name(kind)

    @override
    def measure(self, given: Inputs) -> dict[str, float | int]:
        """``image_recall_at_{1,5,10}`` (text to image), ``text_recall_at_{1,5,10}`` (to text).

        Also ``candidates`` (images to choose from) and ``captions``; where there are such,
        ``captions_repeated`` (at several images), ``captions_of_several_lines`` and
        ``captions_cut``.

        Raises:
            InputError: if the data cannot be used.
        """
        run, ranks = given.run, given.ranks
        captioned = open_captioned(self, given.folder, given.bundle)
        embedder = Embedder.of(given.bundle, run, self)
        ranks.same_data(captioned, self.name)
        with embedder.measuring(ranks):
            embedded = embed(
                embedder, captioned, batch_size=self.batch_size, workers=self.workers, ranks=ranks
            )
            recall = embedded.recall(ranks)
        identity = identify(captioned, ranks, run.device)
        identity.remark(self.name, run.log)
        counts = _remark(self, captioned, embedder, given)
        if given.show is not None:
            given.show(self.name, _picture(captioned, embedded))
        if given.keep is not None:
            given.keep(_results(self, embedded, recall, identity.facts() | counts))
        numbers: dict[str, float | int] = {}
        for way, values in (("image", recall.image_retrieval), ("text", recall.text_retrieval)):
            numbers |= {f"{way}_recall_at_{k}": value for k, value in values.items()}
        numbers |= {"candidates": len(embedded.images), "captions": len(embedded.texts)}
        return numbers | counts


@dataclass(frozen=True)
class Embedded:
    """A captioned data set as embeddings, complete on every process."""

    images: Tensor
    """(N, E) float32, in the order of the data."""
    texts: Tensor
    """(M, E) float32: the captions of the first image, then of the second, and so on."""
    image_of_text: Tensor
    """(M,) int64."""

    def recall(self, ranks: Ranks) -> Recall:
        """Recall at 1, 5 and 10; every process must call this."""
        return recall_at(self.images, self.texts, self.image_of_text, ranks=ranks)


class Captioned(ImageSet, Protocol):
    """Images with captions."""

    captions: list[list[str]]
    """Of every image."""


def embed(
    embedder: Embedder,
    data: Captioned,
    *,
    batch_size: int,
    workers: int = 0,
    ranks: Ranks | None = None,
) -> Embedded:
    """Embed every image once and every distinct caption once.

    Args:
        embedder: its model in evaluation mode, without gradients (see ``evaluating``).
        data: nothing is known of its images beside the pixels and the captions.
        batch_size: images read at a time.
        workers: processes that decode images.
        ranks: the processes that share the work; this one alone by default.

    Raises:
        InputError: if there are no captions.
    """
    ranks = ranks or Ranks()
    captions = [caption for own in data.captions for caption in own]
    if not captions:
        raise InputError("there are no captioned images; check the folder of the evaluation")
    image_of_text = torch.tensor(
        [place for place, own in enumerate(data.captions) for _ in own], device=embedder.device
    )
    images = torch.zeros(len(data), embedder.width, device=embedder.device)
    walk_images(
        data,
        lambda pixels, places: [embedder.images(pixels, places)],
        [images],
        ranks=ranks,
        batch_size=batch_size,
        workers=workers,
    )
    texts = text_table(embedder, captions, ranks=ranks)
    return Embedded(images, texts, image_of_text)


def open_captioned(task: Retrieval, folder: Path, bundle: ModelBundle) -> CaptionedImages:
    """Open the data of a task; captions are read, images are not yet.

    Raises:
        InputError: if the data cannot be used.
    """
    return CaptionedImages(folder, size=bundle.image.height_width, crop=task.crop)


def _remark(
    task: Retrieval, captioned: CaptionedImages, embedder: Embedder, given: Inputs
) -> dict[str, int]:
    """Say what the numbers rest on, and count what makes them other than they seem."""
    run, captions = given.run, sum(map(len, captioned.captions))
    run.log.info("%s: %s images, %s captions", task.name, f"{len(captioned):,}", f"{captions:,}")
    counts = {}
    owners = Counter(caption for own in captioned.captions for caption in set(own))
    if repeated := sum(owners[caption] > 1 for own in captioned.captions for caption in own):
        counts["captions_repeated"] = repeated
        run.log.warning(
            "%s: %s of the %s captions stand at several images, of which only the own one counts "
            "as found",
            task.name,
            f"{repeated:,}",
            f"{captions:,}",
        )
    if several := captioned.several_lines:
        counts["captions_of_several_lines"] = several
        run.log.warning(
            "%s: %s of the %s captions have several lines; if every line is a caption, write "
            "retrieval into %s",
            task.name,
            f"{several:,}",
            f"{captions:,}",
            given.folder / "dataset_type.txt",
        )
    if cut := sum(caption in embedder.cut for own in captioned.captions for caption in own):
        counts["captions_cut"] = cut
        run.log.warning(
            "%s: %s of the %s captions are longer than the %d tokens of the model and are cut",
            task.name,
            f"{cut:,}",
            f"{captions:,}",
            embedder.context_length,
        )
    return counts


def _results(
    task: Retrieval, embedded: Embedded, recall: Recall, facts: dict[str, Any]
) -> SampleResults:
    """Caption by caption and image by image, what was found."""
    tables = {"image_of_text": embedded.image_of_text.cpu()}
    measures = {}
    for place, k in enumerate(recall.at):
        tables[f"text_{k}"] = recall.texts_found[place].to(torch.uint8).cpu()
        tables[f"image_{k}"] = recall.images_found[place].to(torch.uint8).cpu()
        found = Measure("mean", f"text_{k}", image="image_of_text")
        measures[task.number_name(f"image_recall_at_{k}")] = found
        measures[task.number_name(f"text_recall_at_{k}")] = Measure("mean", f"image_{k}")
    facts = {
        **facts,
        "images": len(embedded.images),
        "captions": len(embedded.texts),
    }
    return SampleResults(facts, len(embedded.images), tables, measures)


def _picture(captioned: CaptionedImages, embedded: Embedded) -> Picture:
    """Some images with the nearest of all captions."""
    places = example_places(len(captioned))
    captions = [caption for own in captioned.captions for caption in own]
    nearest = similarity(embedded.images[places], embedded.texts).argmax(1)  # (places,)
    right = [
        owner == place
        for owner, place in zip(embedded.image_of_text[nearest].tolist(), places, strict=True)
    ]
    said = [captions[number] for number in nearest.tolist()]
    return draw_predictions(captioned.pictures(places), said, right)
