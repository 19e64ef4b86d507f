"""Single images with what a model makes of them, for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frugal.common.data.decoding import as_bytes
from frugal.common.data.labeled import ImageSet
from frugal.common.data.stored_images import GROUP
from frugal.common.distributed import Ranks
from frugal.common.evaluation.compositional import Contrasts
from frugal.common.evaluation.embed import Embedder, text_table
from frugal.common.evaluation.metrics import similarity
from frugal.common.evaluation.pictures import Picture, as_array, example_places, gray_dropped
from frugal.common.evaluation.predictions import Predictions
from frugal.common.evaluation.retrieval import Captioned
from frugal.common.evaluation.sugarcrepe import PARTS
from frugal.common.reduction.image import KeptPatches


@dataclass(frozen=True)
class MaskedExample:
    """An image and the part of it that the model sees in training."""

    image: Picture
    """(3, H, W) uint8."""
    masked: Picture
    """(3, H, W) uint8, the dropped patches hatched."""
    kept: int
    """Patches that stay."""
    patches: int
    caption: str = ""


@dataclass(frozen=True)
class Guess:
    """One classify of the model."""

    text: str
    score: float
    """A probability in zero-shot examples, else a cosine."""
    right: bool


@dataclass(frozen=True)
class Example:
    """An image, the truth about it, and the model's best answers, best first."""

    image: Picture
    """(3, H, W) uint8."""
    truth: tuple[str, ...]
    """Its class, or its captions."""
    guesses: tuple[Guess, ...]
    question: str = ""
    """What is asked, where that differs from example to example."""


@dataclass(frozen=True)
class Drawing:
    """A picture that a reduction or an objective draws of what it does."""

    picture: Picture
    """(3, H*, W*) uint8."""
    artist: str
    """What the reduction or the objective is called."""


def masked_examples(
    images: Tensor, kept: KeptPatches | None, patch_size: int, captions: Sequence[str] = ()
) -> list[MaskedExample]:
    """Images beside what is left of them.

    Args:
        images: (B, 3, H, W) uint8.
        kept: what an image reduction answered for them; None where everything stays.
        patch_size: side of a patch in pixels.
        captions: one per image, or none.
    """
    count, _, height, width = images.shape
    patches = (height // patch_size) * (width // patch_size)
    mask = torch.ones(count, patches).bool() if kept is None else kept.mask(patches)
    masked = gray_dropped(images, mask, patch_size)
    return [
        MaskedExample(
            image=as_array(images[row]),
            masked=masked[row],
            kept=int(mask[row].sum()),
            patches=patches,
            caption=captions[row] if captions else "",
        )
        for row in range(count)
    ]


@dataclass(frozen=True)
class ClassRecall:
    """How a class fared."""

    name: str
    right: int
    images: int
    held_out: bool = False
    """Training never saw it."""


@dataclass(frozen=True)
class Confusion:
    """One class taken for another."""

    truth: str
    said: str
    images: int


@dataclass(frozen=True)
class _Chosen:
    place: int
    image: Tensor
    label: int | None


def _some(data: ImageSet, count: int, *, workers: int) -> Iterator[_Chosen]:
    """At most ``count`` images drawn from all of a data set, always the same, in its order."""
    wanted = set(example_places(len(data), count))
    chosen: list[_Chosen] = []
    for images, *labels, places in data.batches(0, 1, GROUP, workers):
        for row, place in enumerate(places.tolist()):
            if place in wanted:
                label = int(labels[0][row]) if labels else None
                chosen.append(_Chosen(place, images[row], label))
        if len(chosen) == len(wanted):
            break
    return iter(sorted(chosen, key=lambda item: item.place))


def zero_shot_examples(
    embedder: Embedder,
    data: ImageSet,
    classes: Tensor,
    names: Sequence[str],
    *,
    count: int = 12,
    guesses: int = 3,
    workers: int = 0,
) -> list[Example]:
    """The most probable classes of some images of the data.

    Args:
        embedder: its model in evaluation mode, without gradients.
        data: labeled images, as for ``zero_shot.classify``.
        classes: (C, E) from ``class_embeddings``.
        names: one per class.
        count: images.
        guesses: classes named per image.
        workers: processes that decode images.
    """
    scale = float(torch.as_tensor(embedder.model.logit_scale).exp())
    examples = []
    for item in _some(data, count, workers=workers):
        scores = similarity(embedder.images(item.image[None]), classes)[0]  # (C,)
        best = (scale * scores).softmax(0).topk(min(guesses, len(names)))
        said = [
            Guess(names[number], probability, number == item.label)
            for probability, number in zip(*(part.tolist() for part in best), strict=True)
        ]
        assert item.label is not None
        examples.append(Example(as_bytes(as_array(item.image)), (names[item.label],), tuple(said)))
    return examples


def retrieval_examples(
    embedder: Embedder,
    data: Captioned,
    *,
    count: int = 6,
    guesses: int = 3,
    workers: int = 0,
) -> list[Example]:
    """The captions nearest to some images, among all distinct captions of the data.

    Args:
        embedder: its model in evaluation mode, without gradients.
        data: captioned images, as for ``retrieval.embed``.
        count: images.
        guesses: captions shown per image.
        workers: processes that decode images.
    """
    captions = list(dict.fromkeys(caption for own in data.captions for caption in own))
    texts = text_table(embedder, captions, ranks=Ranks())  # (M, E)
    examples = []
    for item in _some(data, count, workers=workers):
        own = tuple(data.captions[item.place])
        scores = similarity(embedder.images(item.image[None]), texts)[0]  # (M,)
        best = scores.topk(min(guesses, len(captions)))
        said = [
            Guess(captions[number], cosine, captions[number] in own)
            for cosine, number in zip(*(part.tolist() for part in best), strict=True)
        ]
        examples.append(Example(as_bytes(as_array(item.image)), own, tuple(said)))
    return examples


def compositional_examples(embedder: Embedder, data: Contrasts, *, count: int = 6) -> list[Example]:
    """Some images with their true and their false caption, the nearer one first.

    Args:
        embedder: its model in evaluation mode, without gradients.
        data: the items.
        count: items.
    """
    examples = []
    for place in example_places(len(data.items), count):
        item = data.items[place]
        image = data.images([data.image_of_item[place]])  # (1, 3, H, W)
        captions = [item.caption, item.negative_caption]
        true, false = similarity(embedder.images(image), embedder.texts(captions))[0].tolist()
        said = [Guess(captions[0], true, True), Guess(captions[1], false, False)]
        kind, _, part = item.category.partition("_")
        examples.append(
            Example(
                as_bytes(as_array(image[0])),
                (item.caption,),
                tuple(said if true > false else said[::-1]),
                question=f"{kind}, {PARTS[part]}",
            )
        )
    return examples


def recall_by_class(
    answers: Predictions, names: Sequence[str], held_out: Sequence[int] = ()
) -> list[ClassRecall]:
    """The images of every class, and how many of them were recognized."""
    images = torch.bincount(answers.labels, minlength=len(names)).tolist()
    found = answers.labels[answers.best == answers.labels]
    right = torch.bincount(found, minlength=len(names)).tolist()
    return [
        ClassRecall(name, right[place], images[place], place in held_out)
        for place, name in enumerate(names)
    ]


def confusions(answers: Predictions, names: Sequence[str], *, count: int = 8) -> list[Confusion]:
    """What was most often taken for something else, most frequent first."""
    wrong = answers.best != answers.labels
    pairs = torch.stack([answers.labels[wrong], answers.best[wrong]])  # (2, wrong)
    kinds, images = pairs.unique(dim=1, return_counts=True)
    order = torch.argsort(images, descending=True, stable=True)[:count].tolist()
    return [
        Confusion(names[int(kinds[0, place])], names[int(kinds[1, place])], int(images[place]))
        for place in order
    ]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a report shows of a model beside its numbers."""

    masked: tuple[MaskedExample, ...] = ()
    drawn: Drawing | None = None
    """Of reductions that draw."""
    batch: Drawing | None = None
    """Of objectives that draw, where the model reads no captions."""
    classified: tuple[Example, ...] = ()
    retrieved: tuple[Example, ...] = ()
    contrasted: tuple[Example, ...] = ()
    classes: tuple[ClassRecall, ...] = ()
    confused: tuple[Confusion, ...] = ()
