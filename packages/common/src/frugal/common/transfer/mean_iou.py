"""How well a segmenter finds the pixels of every class: the same on any number of processes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import Window, resize_window
from frugal.common.data.labeled import walk_batches
from frugal.common.data.loader import Loader
from frugal.common.data.samples import image_extensions
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import autocast, check_usable, evaluating
from frugal.common.evaluation.pictures import example_places
from frugal.common.evaluation.task import FolderEvaluation, Inputs
from frugal.common.files import write_file
from frugal.common.ranges import Count, Positive, PositiveShare
from frugal.common.transfer.masked_folder import (
    IGNORED,
    MOST_CLASSES,
    MaskedFolder,
    MaskMismatch,
    class_names,
    open_masked_folder,
)
from frugal.common.transfer.pixels import normalized, paint
from frugal.common.transfer.segmentation_data import fitted_size
from frugal.common.transfer.segmenter import Segmenter

_MOST_SCORES = 1 << 26
"""Scores at the resolution of a picture that exist at a time: 256 MiB."""
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class MeanIoU(FolderEvaluation):
    """How well the pixels of every class are found: intersection over union, averaged.

    Reads pictures and masks in ADE20K's layout, or a scenes folder with such pictures.
    Intersections and unions are summed over all pictures, at their own resolution, before they are
    divided.
    """

    name: str = "segmentation"
    """First part of the name of every number."""
    split: str = "validation"
    """Name of the folders in images/ and annotations/ that are measured on."""
    view: Literal["sliding", "whole"] = "sliding"
    """sliding: the picture, resized to fit 4 times 1 windows, is seen through windows of the size
    that the model was trained on, and scores are averaged where they overlap. whole: it is
    stretched to that size."""
    stride: PositiveShare = 2 / 3
    """From one window to the next, over the side of a window: 341 pixels of 512. The public
    configuration of MAE has one half."""
    scales: tuple[Positive, ...] = (1.0,)
    """Sizes of the picture, over that of published single-scale numbers; probabilities are
    averaged. 0.5, 0.75, ... 1.75 for multi-scale numbers."""
    flip: bool = False
    """Average with the mirrored picture."""
    windows: Count = 8
    """Windows that the model takes at a time."""
    image_extensions: tuple[str, ...] = image_extensions()
    """Of the pictures."""

    _part = "segmentation"
    _scores = ("miou", "pixel_accuracy", "mean_accuracy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales:
            raise InputError(f"MeanIoU.scales are {self.scales}; give positive factors")
        if self.view == "whole" and self.scales != (1.0,):
            raise InputError(
                f"MeanIoU.scales are {self.scales}, but view=whole has one size; use view=sliding"
            )

    @override
    def folder(self) -> Path | None:
        """Where the pictures are read from.

        Raises:
            InputError: if data is given and missing, laid out in another way, lacks masks, or has
                masks of other pictures.
        """
        folder = super().folder()
        if folder is not None:
            open_masked_folder(folder, self.split, self.image_extensions).check(MOST_CLASSES)
        return folder

    @override
    def measure(self, given: Inputs) -> dict[str, float | int]:
        """``miou``, ``pixel_accuracy``, ``mean_accuracy``, ``images`` and ``classes``.

        The means are over the classes that occur. The first process writes the numbers of every
        class to ``evaluation/{name}_classes.csv``.

        Raises:
            InputError: if a mask is none of its picture or of the model's classes.
        """
        run, ranks, folder = given.run, given.ranks, given.folder
        model: Any = given.bundle.model
        classes = model.config.num_classes
        names = class_names(folder, classes)
        data = open_masked_folder(folder, self.split, self.image_extensions)
        pictures = _Pictures(data, self, size=given.size, num_classes=classes)
        shown = set(example_places(len(data), _SHOWN))
        ranks.same_data(data, self.name)
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=run.device)
        broken = torch.zeros(len(data), dtype=torch.int64, device=run.device)

        def compute(views: list[Tensor], labels: Tensor, places: Tensor) -> tuple[Tensor]:
            place, passes = int(places), torch.zeros(1, dtype=torch.int64, device=run.device)
            with _noting_broken(model, passes):
                answer = segment(model, self, views, labels.shape, device=run.device)  # (H, W)
            confusion.add_(confusion_matrix(answer, labels.to(run.device), classes))
            if given.show is not None and place in shown:
                picture = _picture(data, place, labels, answer, classes)
                given.show(f"{self.name}/{place}", picture)
            return (passes,)

        with evaluating(model), autocast(given.bundle.precision, run.device):
            batches = pictures.batches(ranks, workers=self.workers)
            walk_batches(batches, compute, [broken], ranks=ranks)
        check_usable("scores", (int((broken > 0).sum()), len(data), "pictures"))
        quality = Quality.of(ranks.sum(confusion).cpu())
        if not quality.pixels.sum():
            raise InputError(
                f"no pixel of the pictures in {data.images} has a class; check the masks"
            )
        if run.is_main:
            _write_classes(run.dir / "evaluation" / f"{self.name}_classes.csv", names, quality)
        if absent := [name for name, iou in zip(names, quality.iou, strict=True) if iou.isnan()]:
            run.log.warning(
                "%s: %d of the %d classes are in no picture and no answer, and in no mean: %s%s",
                self.name,
                len(absent),
                classes,
                ", ".join(absent[:5]),
                " and others" if len(absent) > 5 else "",
            )
        return {
            "miou": _mean(quality.iou),
            "pixel_accuracy": quality.pixel_accuracy,
            "mean_accuracy": _mean(quality.accuracy),
            "images": len(data),
            "classes": int((~quality.iou.isnan()).sum()),
        }


@contextmanager
def _noting_broken(model: nn.Module, counter: Tensor) -> Iterator[None]:
    """Count in a (1,) int64 the passes of a model whose scores are not finite."""

    def count(module: nn.Module, arguments: Any, scores: Tensor) -> None:
        del module, arguments
        counter.add_((~scores.isfinite()).any())

    hook = model.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def confusion_matrix(answer: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: pixels of every class (rows) that were taken for every class (columns).

    Args:
        answer: (H, W) int64.
        labels: (H, W); pixels labeled ``IGNORED`` are left out.
        num_classes: C.
    """
    known = labels != IGNORED
    pairs = labels[known].long() * num_classes + answer[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class Quality:
    """What a confusion matrix says, in float64; NaN where a class never occurs."""

    iou: Tensor
    """(C,) pixels that are of a class and were found, over those that are or were taken for it."""
    accuracy: Tensor
    """(C,) pixels of a class that were found, over all of it."""
    pixels: Tensor
    """(C,) int64 pixels of a class."""
    pixel_accuracy: float
    """Pixels whose class was found, over all that have one."""

    @classmethod
    def of(cls, confusion: Tensor) -> Quality:
        """From (C, C) int64, as :func:`confusion_matrix` counts."""
        found, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        return cls(
            iou=found.double() / (truth + predicted - found),
            accuracy=found.double() / truth,
            pixels=truth,
            pixel_accuracy=int(found.sum()) / max(int(truth.sum()), 1),
        )


def _mean(values: Tensor) -> float:
    """The mean over the classes that occur."""
    return float(values.nanmean())


def _write_classes(path: Path, names: Sequence[str], quality: Quality) -> None:
    columns = (quality.iou, quality.accuracy, quality.pixels)
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["class", "name", "iou", "accuracy", "pixels"])
    for number, row in enumerate(zip(names, *(c.tolist() for c in columns), strict=True)):
        rows.writerow([number + 1, *("" if value != value else value for value in row)])
    write_file(path, text.getvalue())


def segment(
    model: Segmenter,
    task: MeanIoU,
    views: Sequence[Tensor],
    size: Sequence[int],
    *,
    device: torch.device,
) -> Tensor:
    """The class of every pixel of one picture.

    Args:
        model: a segmenter, in evaluation mode.
        task: whether to mirror, how far from window to window.
        views: the picture (3, h, w) uint8 at each of the task's sizes.
        size: (height, width) of the answer.
        device: where the model is.

    Returns:
        (height, width) int64.
    """
    window = model.config.image.height_width
    stride = tuple(max(int(task.stride * side), 1) for side in window)
    parts = []
    for view, is_mirrored in product(views, (False, True) if task.flip else (False,)):
        image = normalized(view.to(device), model.config.image)
        image = image.flip(2) if is_mirrored else image
        scores = window_scores(model, image, window=window, stride=stride, at_once=task.windows)
        parts.append(scores.flip(2) if is_mirrored else scores)
    band = max(_MOST_SCORES // (len(parts[0]) * size[1]), 1)
    rows = torch.arange(size[0], device=device)
    return torch.cat([_best(parts, part, size) for part in rows.split(band)])


def _best(parts: Sequence[Tensor], rows: Tensor, size: Sequence[int]) -> Tensor:
    """(r, width) int64: the best class in some rows, by the mean probability over all parts."""
    if len(parts) == 1:
        return resized_rows(parts[0], rows, size).argmax(0)
    probabilities = (resized_rows(scores, rows, size).softmax(0) for scores in parts)
    return sum(probabilities, torch.zeros((), device=rows.device)).argmax(0)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover a length; the last ends where it ends."""
    last = max(length - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def window_scores(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    window: Sequence[int],
    stride: Sequence[int],
    at_once: int,
) -> Tensor:
    """The scores of an image that is seen through windows, averaged where they overlap.

    Args:
        model: from (b, 3, *window) to (b, C, *window).
        image: (3, H, W) normalized; what a window lacks beyond it is zero.
        window: (height, width).
        stride: rows and columns from one window to the next.
        at_once: windows that the model takes at a time.

    Returns:
        (C, H, W) float32.
    """
    height, width = image.shape[1:]
    missing = max(window[1] - width, 0), max(window[0] - height, 0)
    image = F.pad(image, (0, missing[0], 0, missing[1]))
    starts = [window_starts(*sides) for sides in zip(image.shape[1:], window, stride, strict=True)]
    places = [np.s_[..., y : y + window[0], x : x + window[1]] for y, x in product(*starts)]
    total, count = torch.zeros(()), torch.zeros(image.shape[1:], device=image.device)
    for first in range(0, len(places), at_once):
        chosen = places[first : first + at_once]
        scores = model(torch.stack([image[place] for place in chosen])).float()
        if not total.ndim:
            total = scores.new_zeros(scores.shape[1], *image.shape[1:])
        for place, part in zip(chosen, scores, strict=True):
            total[place] += part
            count[place] += 1
    return (total / count)[:, :height, :width]


def resized_rows(scores: Tensor, rows: Tensor, size: Sequence[int]) -> Tensor:
    """Some rows of scores at another size, as ``F.interpolate`` gives them, bilinear.

    Args:
        scores: (C, h, w) float32.
        rows: (r,) int64, of the result.
        size: (height, width) of the whole result.

    Returns:
        (C, r, width).
    """
    height = scores.shape[1]
    source = ((rows + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = source.long().clamp(max=height - 1)
    below = (above + 1).clamp(max=height - 1)
    band = torch.lerp(scores[:, above], scores[:, below], (source - above)[:, None])  # (C, r, w)
    return F.interpolate(
        band[None], size=(len(rows), size[1]), mode="bilinear", align_corners=False
    )[0]


class _Pictures(Dataset[dict[str, Any]]):
    """Pictures at the sizes of a task, with the classes of their pixels."""

    def __init__(
        self, data: MaskedFolder, task: MeanIoU, *, size: tuple[int, int], num_classes: int
    ) -> None:
        self._data = data
        self._task = task
        self._size = size
        self._num_classes = num_classes

    def __getitem__(self, place: int) -> dict[str, Any]:
        """``views``, (3, h, w) uint8 each, and ``labels`` (H, W) uint8; or a mistake."""
        try:
            image, labels = self._data.read(place, self._num_classes)
            height, width = labels.shape
            whole = Window(0, 0, height, width)
            views = [
                resize_window(image, whole, size, interpolation="bilinear")
                for size in self._sizes(height, width)
            ]
        except MaskMismatch as mismatch:
            return {"mistake": mismatch.sentence}
        except Damaged as damaged:
            path = self._data.image_path(place)
            return {"mistake": f"{path} cannot be evaluated ({damaged}); repair or remove it"}
        return {
            "place": place,
            "views": [torch.from_numpy(view.copy()) for view in views],
            "labels": torch.from_numpy(labels),
        }

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        if self._task.view == "whole":
            return [self._size]
        side = min(self._size)
        return [fitted_size(height, width, side=side, ratio=ratio) for ratio in self._task.scales]

    def batches(
        self, ranks: Ranks, *, workers: int
    ) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        """This process's part: views, labels and place (1,) of one picture after another."""
        places = range(ranks.rank, len(self._data), ranks.world_size)
        for fields in Loader(self, sampler=places, workers=workers):
            yield fields["views"], fields["labels"], torch.tensor([fields["place"]])


def _picture(
    data: MaskedFolder, place: int, labels: Tensor, answer: Tensor, num_classes: int
) -> np.ndarray:
    """A picture, its classes and the answer side by side: (3, H, 3 W) uint8."""
    image, _ = data.read(place, num_classes)
    height, width = labels.shape
    pixels = resize_window(
        image, Window(0, 0, height, width), (height, width), interpolation="bilinear"
    )
    classes = (paint(part.cpu().numpy(), num_classes) for part in (labels, answer))
    return np.concatenate([pixels, *classes], axis=2)
