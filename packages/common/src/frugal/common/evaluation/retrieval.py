"""Image-text retrieval: the image of every caption, and a caption of every image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.contracts import Show
from frugal.common.data.labeled import CaptionedImages, grouped
from frugal.common.distributed import Ranks, check_delivery
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Keep, Measure, SampleResults
from frugal.common.evaluation.config import Retrieval
from frugal.common.evaluation.embed import Embedder, similarity, text_table
from frugal.common.evaluation.metrics import Recall, recall_at
from frugal.common.evaluation.pictures import Picture, draw_predictions, example_places
from frugal.common.evaluation.provenance import identify
from frugal.common.models.bundle import ModelBundle
from frugal.common.run import Run


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


def embed(
    embedder: Embedder,
    data: Any,
    *,
    batch_size: int,
    workers: int = 0,
    ranks: Ranks | None = None,
) -> Embedded:
    """Embed every image once and every distinct caption once.

    Args:
        embedder: its model in evaluation mode, without gradients (see ``evaluating``).
        data: has ``len()``, ``captions`` (one list per image) and
            ``batches(rank, world_size, batch_size, workers)``, which yields images
            (b, 3, H, W) and places in the data (b,).
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
    delivered = torch.zeros(len(data), dtype=torch.int64, device=embedder.device)
    batches = data.batches(ranks.rank, ranks.world_size, batch_size, workers)
    for pixels, places in grouped(batches):
        places = places.to(embedder.device)
        images[places] = embedder.images(pixels, places)
        delivered.index_add_(0, places, torch.ones_like(places))
    check_delivery(ranks.sum(delivered).cpu())
    texts = text_table(embedder, captions, ranks=ranks)
    return Embedded(ranks.sum(images), texts, image_of_text)


def open_captioned(task: Retrieval, folder: Path, bundle: ModelBundle) -> CaptionedImages:
    """Open the data of a task; captions are read, images are not yet.

    Raises:
        InputError: if the data cannot be used.
    """
    return CaptionedImages(folder, size=bundle.image.height_width, crop=task.crop)


def evaluate(
    task: Retrieval,
    folder: Path,
    bundle: ModelBundle,
    run: Run,
    show: Show | None,
    keep: Keep | None = None,
) -> dict[str, float | int]:
    """See :meth:`frugal.common.evaluation.config.Retrieval.evaluate`."""
    ranks = Ranks.current()
    captioned = open_captioned(task, folder, bundle)
    embedder = Embedder.of(bundle, run, task)
    ranks.same_data(captioned, task.name)
    with embedder.measuring(ranks):
        embedded = embed(
            embedder, captioned, batch_size=task.batch_size, workers=task.workers, ranks=ranks
        )
        recall = embedded.recall(ranks)
    identity = identify(captioned, ranks, run.device)
    identity.remark(task.name, run.log)
    counts = _remark(task, captioned, embedder, folder, run)
    if show is not None:
        show(task.name, _picture(captioned, embedded))
    if keep is not None:
        facts = identity.facts() | counts
        keep(_outcomes(task, embedded, recall, facts))
    numbers: dict[str, float | int] = {}
    for kind, values in (("image", recall.image_retrieval), ("text", recall.text_retrieval)):
        for k, value in values.items():
            numbers[f"{kind}_{task.name}_recall_at_{k}"] = value
    numbers[f"{task.name}_candidates"] = len(embedded.images)
    numbers[f"{task.name}_captions"] = len(embedded.texts)
    return numbers | {f"{task.name}_{name}": count for name, count in counts.items()}


def _remark(
    task: Retrieval, captioned: CaptionedImages, embedder: Embedder, folder: Path, run: Run
) -> dict[str, int]:
    """Say what the numbers rest on, and count what makes them other than they seem."""
    captions = sum(map(len, captioned.captions))
    run.log.info("%s: %s images, %s captions", task.name, f"{len(captioned):,}", f"{captions:,}")
    counts = {}
    if several := captioned.several_lines:
        counts["captions_of_several_lines"] = several
        run.log.warning(
            "%s: %s of the %s captions have several lines; if every line is a caption, write "
            "retrieval into %s",
            task.name,
            f"{several:,}",
            f"{captions:,}",
            folder / "dataset_type.txt",
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


def _outcomes(
    task: Retrieval, embedded: Embedded, recall: Recall, facts: dict[str, Any]
) -> SampleResults:
    """Caption by caption and image by image, what was found."""
    tables = {"image_of_text": embedded.image_of_text.cpu()}
    measures = {}
    for place, k in enumerate(recall.at):
        tables[f"text_{k}"] = recall.texts_found[place].to(torch.uint8).cpu()
        tables[f"image_{k}"] = recall.images_found[place].to(torch.uint8).cpu()
        found = Measure("mean", f"text_{k}", image="image_of_text")
        measures[f"image_{task.name}_recall_at_{k}"] = found
        measures[f"text_{task.name}_recall_at_{k}"] = Measure("mean", f"image_{k}")
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
