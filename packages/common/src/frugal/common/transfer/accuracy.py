"""How often a classifier is right: the same number on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from frugal.common.data.benchmark_layout import test_split
from frugal.common.data.damage import PassedOver
from frugal.common.data.labeled import LabeledImages, walk_images
from frugal.common.data.patterns import find_files
from frugal.common.data.samples import IMAGE_EXTENSIONS
from frugal.common.data.stores.class_folders import class_numbers, read_class_folders
from frugal.common.data.transforms import CenterCrop, normalize
from frugal.common.errors import InputError
from frugal.common.evaluation.class_names import held_out_classes
from frugal.common.evaluation.embed import autocast, check_usable, evaluating
from frugal.common.evaluation.metrics import ranked_classes, top_k_accuracy
from frugal.common.evaluation.remarks import Remarks
from frugal.common.evaluation.task import FolderEvaluation, Inputs
from frugal.common.models.bundle import ModelBundle
from frugal.common.ranges import Count
from frugal.common.run import Run
from frugal.common.transfer.classifier import VisionClassifier


@dataclass(frozen=True, kw_only=True)
class Accuracy(FolderEvaluation):
    """How often a classifier is right, on images with classes that it was not trained on.

    Class folders are brought together with those of the training by their names. Reads
    class-per-folder images, clip_benchmark's webdataset layout, or a scenes folder, of which the
    classes are left out that its training part does not have.
    """

    name: str = "accuracy"
    """First part of the name of every number."""
    crop: CenterCrop = field(default_factory=lambda: CenterCrop(share=0.875))
    """Which part of an image the model sees."""
    batch_size: Count = 64
    """Images read at a time; the model takes 64 at a time whatever this is."""

    _part = "zero_shot"
    _scores = ("top1", "top5")

    @override
    def check_classes(self, trained: Sequence[str]) -> None:
        """Refuse data with class folders that training does not have; calls for no model.

        Raises:
            InputError: if there is one with images.
        """
        folder = self.folder()
        if folder is None:
            return
        files = find_files(str(test_split(folder)))
        if not files[0].is_dir():
            return
        found = read_class_folders(files[0], IMAGE_EXTENSIONS, PassedOver())
        filled = [name for name in found.names if found.images[name]]
        class_numbers(trained, list(found.names), filled, source=files[0], of="the training data")

    @override
    def measure(self, given: Inputs) -> dict[str, float | int]:
        """``top1``, ``top5``, ``loss`` (the mean cross-entropy), ``images`` and ``classes``.

        Also ``classes_without_images`` and ``passed_over``, where there are such.

        Raises:
            InputError: if the classes of the data are not the model's.
        """
        bundle, run, folder = given.bundle, given.run, given.folder
        data = LabeledImages(folder, size=given.size, crop=self.crop)
        model: Any = bundle.model
        classes = model.config.num_classes
        trained = None if bundle.class_names is None else list(bundle.class_names)
        if trained is not None and data.class_folders is not None:
            filled = data.filled_folders
            of = f"the training of {bundle.source.path}"
            data.renumber(class_numbers(trained, data.class_folders, filled, source=folder, of=of))
        elif data.class_names is not None and len(data.class_names) != classes:
            raise InputError(
                f"{folder} has {len(data.class_names)} classes, the model {classes}; evaluate on "
                "the classes that it is trained on, or set model.num_classes"
            )
        _explain_numbers(data, trained, folder, bundle, run)
        if not len(data):
            raise InputError(f"{folder} holds no image; check the folder of the evaluation")
        given.ranks.same_data(data, self.name)
        with evaluating(model), autocast(bundle.precision, run.device):
            labels, ranked, losses = _predictions(self, data, model, given, classes=classes)
        held_out = held_out_classes(folder, classes)
        counted = ~torch.isin(labels, torch.tensor(held_out))
        labels, ranked, losses = labels[counted], ranked[counted], losses[counted]
        if not len(labels):
            raise InputError(f"{folder} holds held-out classes only; evaluate on others")
        numbers = {
            "top1": top_k_accuracy(ranked, labels, 1),
            "top5": top_k_accuracy(ranked, labels, 5),
            "loss": float(losses.mean()),
            "images": len(labels),
            "classes": classes,
        }
        without = sorted(set(range(classes)) - set(labels.tolist()) - set(held_out))
        remarks = Remarks(without_images=without, passed_over=data.passed_over)
        remarks.tell(self.name, trained or [f"class {n}" for n in range(classes)], run.log)
        return numbers | remarks.numbers()


def _explain_numbers(
    data: LabeledImages,
    trained: list[str] | None,
    folder: Path,
    bundle: ModelBundle,
    run: Run,
) -> None:
    """Say what is taken for what where one side has names and the other has numbers."""
    if trained is not None and data.class_folders is None:
        run.log.warning(
            "the images of %s have class numbers, and training had class folders: 0 is taken for "
            "%s, %d for %s",
            folder, trained[0], len(trained) - 1, trained[-1],
        )  # fmt: skip
    elif trained is None and data.class_folders:
        last = len(data.class_folders) - 1
        run.log.warning(
            "%s has class folders, and it is not known what the classes of %s were called: %s is "
            "taken for class 0, %s for class %d",
            folder, bundle.source.path, data.class_folders[0], data.class_folders[last], last,
        )  # fmt: skip


def _predictions(
    task: Accuracy, data: LabeledImages, model: VisionClassifier, given: Inputs, *, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and predictions of all images, in the order of the data, on every process.

    Returns:
        labels (N,) int64, the best classes (N, K) int64, best first, and the cross-entropies (N,)
        float64, on the CPU.
    """
    run = given.run
    # of every image its label, whether its scores are finite, and the ranked classes
    table = torch.zeros(len(data), 2 + min(5, classes), dtype=torch.int64, device=run.device)
    losses = torch.zeros(len(data), dtype=torch.float64, device=run.device)

    def compute(images: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        del places
        if int(labels.max()) >= classes:
            raise InputError(
                f"an image has the label {int(labels.max())}, but the model has {classes} classes; "
                "evaluate on the classes that it is trained on, or set model.num_classes"
            )
        labels = labels.to(run.device)
        scores = model(_as_the_model_takes(images.to(run.device), model)).float()  # (b, C)
        about = torch.stack([labels, scores.isfinite().all(1).long()], dim=1)
        rows = torch.cat([about, ranked_classes(scores)], dim=1)  # (b, 2 + K)
        return rows, F.cross_entropy(scores.double(), labels, reduction="none")

    walk_images(
        data,
        compute,
        [table, losses],
        ranks=given.ranks,
        batch_size=task.batch_size,
        workers=task.workers,
    )
    labels, finite, ranked = table.cpu().tensor_split((1, 2), dim=1)
    check_usable("scores", (int((finite == 0).sum()), len(data), "images"))
    return labels[:, 0], ranked, losses.cpu()


def _as_the_model_takes(images: Tensor, model: VisionClassifier) -> Tensor:
    """Bytes as they are; the float gray levels of crops with a kernel of TensorFlow, normalized."""
    if images.dtype == torch.uint8:
        return images
    tower = model.config.image
    return normalize(images, mean=tower.mean, std=tower.std)
