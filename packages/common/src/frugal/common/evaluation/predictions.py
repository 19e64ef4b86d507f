"""The classes that a model gave to images, and the accuracies that they amount to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Measure, SampleResults
from frugal.common.evaluation.metrics import mean_per_class_recall, roc_auc, top_k_accuracy
from frugal.common.evaluation.suites import Metric


@dataclass(frozen=True)
class Predictions:
    """What the model said about every image, complete on every process."""

    labels: Tensor
    """(N,) int64, in the order of the data."""
    best: Tensor
    """(N,) int64: the class of the highest cosine; the first of them in a tie."""
    ranked: Tensor
    """(N, K) int64: the K = min(5, C) best classes, best first."""
    num_classes: int
    margin: Tensor | None = None
    """(N,) float32, of two classes: the cosine of the second less that of the first."""

    def numbers(self, metric: Metric | None = None) -> dict[str, float | int]:
        """Accuracies as fractions, and what they are fractions of.

        Raises:
            InputError: if the metric needs two classes and there are others.
        """
        numbers: dict[str, float | int] = {
            "top1": top_k_accuracy(self.ranked, self.labels, 1),
            "top5": top_k_accuracy(self.ranked, self.labels, 5),
            "mean_per_class_recall": mean_per_class_recall(self.best, self.labels),
        }
        if self.margin is not None:
            numbers["roc_auc"] = float(roc_auc(self.margin, self.labels == 1))
        if metric == "mean_top1_top5":
            numbers["score"] = (numbers["top1"] + numbers["top5"]) / 2
        elif metric is not None and metric not in numbers:
            raise InputError(
                f"the metric {metric} is of two classes, but there are {self.num_classes}; choose "
                "another"
            )
        elif metric is not None:
            numbers["score"] = numbers[metric]
        counts = {"images": len(self.labels), "classes": self.num_classes}
        if empty := self.num_classes - len(self.labels.unique()):
            counts["classes_without_images"] = empty
        return numbers | counts

    def results(
        self,
        number_name: Callable[[str], str],
        facts: dict[str, Any],
        *,
        metric: Metric | None = None,
        held_out: Sequence[int] = (),
    ) -> SampleResults:
        """Image by image, what the numbers are made of; see ``FolderEvaluation.number_name``."""
        first = self.ranked[:, 0] == self.labels
        tables = {
            "labels": self.labels,
            "top1": first.to(torch.uint8),
            "top5": (self.ranked == self.labels[:, None]).any(1).to(torch.uint8),
            "best": (self.best == self.labels).to(torch.uint8),
        }
        tables["both"] = torch.stack([tables["top1"], tables["top5"]], dim=1)
        measures = {
            "top1": Measure("mean", "top1"),
            "top5": Measure("mean", "top5"),
            "mean_per_class_recall": Measure("mean_of_groups", "best", groups="labels"),
            "mean_top1_top5": Measure("mean_of_means", "both"),
        }
        if self.margin is not None:
            tables["margin"] = self.margin
            measures["roc_auc"] = Measure("roc_auc", "margin", groups="labels")
        among = torch.isin(self.labels, torch.tensor(held_out, dtype=torch.int64)).nonzero()[:, 0]
        if len(among):
            tables |= {"held_out": tables["top1"][among], "held_out_image": among}
            measures["top1_held_out"] = Measure("mean", "held_out", image="held_out_image")
        both = measures.pop("mean_top1_top5")
        if metric is not None:
            measures["score"] = both if metric == "mean_top1_top5" else measures[metric]
        named = {number_name(kind): measure for kind, measure in measures.items()}
        return SampleResults(facts, len(self.labels), tables, named)

    def held_out_numbers(self, held_out: Sequence[int]) -> dict[str, float | int]:
        """The images of these classes alone, still answered among all classes."""
        among = torch.isin(self.labels, torch.tensor(held_out, device=self.labels.device))
        count = int(among.sum())
        if not count:
            return {}
        return {
            "top1_held_out": top_k_accuracy(self.ranked[among], self.labels[among], 1),
            "images_held_out": count,
            "classes_held_out": len(set(held_out)),
        }
