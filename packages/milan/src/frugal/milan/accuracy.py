"""How often a classifier is right: the same number on any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from frugal.common.data.labelled import LabelledImages
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import autocast, check_usable, evaluating, grouped
from frugal.common.evaluation.metrics import ranked_classes, top_k_accuracy
from frugal.common.evaluation.ranks import Ranks, check_delivery
from frugal.common.evaluation.zero_shot import held_out_classes
from frugal.common.recipe import Recipe
from frugal.common.run import Run
from frugal.milan.classification import Accuracy


def evaluate(
    task: Accuracy, folder: Path, model: Any, recipe: Recipe, run: Run
) -> dict[str, float | int]:
    """See :meth:`frugal.milan.classification.Accuracy.evaluate`."""
    data = LabelledImages(folder, size=recipe.model.image.height_width, crop=task.crop)
    classes = recipe.model.num_classes
    if data.class_names is not None and len(data.class_names) != classes:
        raise InputError(
            f"{folder} has {len(data.class_names)} classes, the model {classes}; evaluate on the "
            "classes that it is trained on, or set model.num_classes"
        )
    if not len(data):
        raise InputError(f"{folder} holds no image; check the folder of the evaluation")
    Ranks.current().same_data(data, task.name)
    with evaluating(model), autocast(recipe.engine.precision, run.device):
        labels, ranked, losses = _answers(task, data, model, run, classes=classes)
    held_out = held_out_classes(folder, classes)
    asked = ~torch.isin(labels, torch.tensor(held_out))
    labels, ranked, losses = labels[asked], ranked[asked], losses[asked]
    if not len(labels):
        raise InputError(f"{folder} holds held-out classes only; evaluate on others")
    counts = torch.bincount(labels, minlength=classes)
    numbers = {
        "top1": top_k_accuracy(ranked, labels, 1),
        "top5": top_k_accuracy(ranked, labels, 5),
        "loss": float(losses.mean()),
        "images": len(labels),
        "classes": classes,
    }
    empty = [place for place in (counts == 0).nonzero()[:, 0].tolist() if place not in held_out]
    if empty:
        named = data.class_names or [str(place) for place in range(classes)]
        run.log.warning(
            "%s: %d of the %d classes have no image, such as %s",
            task.name,
            len(empty),
            classes,
            named[empty[0]],
        )
        numbers["classes_without_images"] = len(empty)
    return {f"{task.name}_{kind}": number for kind, number in numbers.items()}


def _answers(
    task: Accuracy, data: LabelledImages, model: Any, run: Run, *, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What is asked and said of every image, in the order of the data, on every process.

    Returns:
        labels (N,) int64, the best classes (N, K) int64, best first, and the cross-entropies (N,)
        float64, on the CPU.
    """
    ranks = Ranks.current()
    width = min(5, classes)
    # one row per image: how often it came, its label, whether its scores are finite, the ranks
    table = torch.zeros(len(data), 3 + width, dtype=torch.int64, device=run.device)
    losses = torch.zeros(len(data), dtype=torch.float64, device=run.device)
    batches = data.batches(ranks.rank, ranks.world_size, task.batch_size, task.workers)
    for images, labels, places in grouped(batches):
        if int(labels.max()) >= classes:
            raise InputError(
                f"an image has the label {int(labels.max())}, but the model has {classes} classes; "
                "evaluate on the classes that it is trained on, or set model.num_classes"
            )
        labels, places = labels.to(run.device), places.to(run.device)
        scores = model(_normalised(images.to(run.device), model)).float()  # (b, C)
        counted = [torch.ones_like(labels), labels, scores.isfinite().all(1).long()]
        rows = torch.cat([torch.stack(counted, dim=1), ranked_classes(scores)], dim=1)
        table.index_add_(0, places, rows)
        losses[places] = F.cross_entropy(scores.double(), labels, reduction="none")
    table, losses = ranks.sum(table).cpu(), ranks.sum(losses).cpu()
    check_delivery(table[:, 0])
    check_usable("scores", (int((table[:, 2] == 0).sum()), len(table), "images"))
    return table[:, 1], table[:, 3:], losses


def _normalised(images: Tensor, model: Any) -> Tensor:
    """Float grey levels, of crops with a kernel of TensorFlow, as the tower takes them."""
    if images.dtype == torch.uint8:
        return images
    tower = model.config.image
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    return (images / 255 - mean) / std
