"""What an evaluation found image by image, so that its numbers can be drawn again from others.

Every number is a function of how often each image counts. With once each it is the number itself;
with counts drawn anew (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 6)
its spread says how much of it is the choice of the images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.evaluation.metrics import average_precision, roc_auc
from frugal.common.files import finite, parse_json, write_file

Kind = Literal["mean", "mean_of_groups", "mean_of_means", "roc_auc", "average_precision"]
_AT_ONCE = 1 << 22
"""Weights held at a time: 32 MiB."""


@dataclass(frozen=True)
class Measure:
    """How a number comes about from what is known of every row."""

    kind: Kind
    """mean: of the values. mean_of_groups: of the means of every group that occurs.
    mean_of_means: half the mean of two columns each. roc_auc: of the values against the groups 0
    and 1. average_precision: of (M, C) values against (M, C) groups."""
    values: str
    """Names a table of (M,) or (M, C) numbers."""
    groups: str = ""
    """Names a table of (M,) or (M, C) integers."""
    image: str = ""
    """Names a table of (M,) integers, the image of every row; by default row i is of image i."""


@dataclass(frozen=True)
class SampleResults:
    """What a task found beside its numbers."""

    facts: dict[str, Any]
    """What it was measured on, ready for JSON; ``data_sha256`` is among them."""
    num_images: int
    tables: dict[str, Tensor] = field(default_factory=dict)
    """On the CPU."""
    measures: dict[str, Measure] = field(default_factory=dict)
    """By the name of the number."""

    def number(self, name: str, weights: Tensor | None = None) -> Tensor:
        """(R,) float64: a number, every image counted as often as ``weights`` (R, N) says.

        Without them every image counts once, and R is 1.
        """
        measure = self.measures[name]
        values = self.tables[measure.values]
        if weights is None:
            weights = torch.ones(1, self.num_images, dtype=torch.float64)
        if measure.image:
            weights = weights[:, self.tables[measure.image]]  # (R, M)
        groups = self.tables[measure.groups] if measure.groups else None
        return _KINDS[measure.kind](values, groups, weights.double())

    def save(self, path: Path) -> None:
        """Write a file that :func:`load_sample_results` reads."""
        write_file(path, self.encoded())

    def encoded(self) -> bytes:
        """The bytes of a file that :func:`load_sample_results` reads."""
        content = {
            "facts": self.facts,
            "num_images": self.num_images,
            "measures": {name: vars(measure) for name, measure in self.measures.items()},
        }
        tables = {name: table.contiguous() for name, table in self.tables.items()}
        return save(tables, metadata={"outcomes": json.dumps(finite(content), allow_nan=False)})


def load_sample_results(path: Path) -> SampleResults:
    """What :meth:`SampleResults.save` wrote.

    Raises:
        InputError: if it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            content = parse_json(file.metadata()["outcomes"])
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        measures = {name: Measure(**value) for name, value in content["measures"].items()}
        return SampleResults(content["facts"], content["num_images"], tables, measures)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold what an evaluation found image by image ({error}); measure again"
        ) from None


def _mean(values: Tensor, groups: Tensor | None, weights: Tensor) -> Tensor:
    del groups
    return (weights @ values.double()) / weights.sum(1)


def _mean_of_groups(values: Tensor, groups: Tensor | None, weights: Tensor) -> Tensor:
    assert groups is not None
    occurring, place = groups.unique(return_inverse=True)
    sums = weights.new_zeros(2, len(weights), len(occurring))
    sums[0].index_add_(1, place, weights * values.double())
    sums[1].index_add_(1, place, weights)
    means = sums[0] / sums[1]  # (R, G), nan where no image of the group was drawn
    return means.nanmean(1)


def _mean_of_means(values: Tensor, groups: Tensor | None, weights: Tensor) -> Tensor:
    del groups
    return (weights @ values.double()).mean(1) / weights.sum(1)


def _roc_auc(values: Tensor, groups: Tensor | None, weights: Tensor) -> Tensor:
    assert groups is not None
    return roc_auc(values, groups == 1, weights)


def _average_precision(values: Tensor, groups: Tensor | None, weights: Tensor) -> Tensor:
    assert groups is not None
    return average_precision(values, groups == 1, weights).mean(1)


_KINDS: dict[Kind, Callable[[Tensor, Tensor | None, Tensor], Tensor]] = {
    "mean": _mean,
    "mean_of_groups": _mean_of_groups,
    "mean_of_means": _mean_of_means,
    "roc_auc": _roc_auc,
    "average_precision": _average_precision,
}


def resampled(num_images: int, *, times: int, generator: torch.Generator) -> Iterator[Tensor]:
    """How often each image is drawn when as many are drawn with replacement, again and again.

    Yields:
        (r, N) float64, ``times`` rows in all.
    """
    rows = max(1, _AT_ONCE // max(1, num_images))
    for start in range(0, times, rows):
        count = min(rows, times - start)
        weights = torch.zeros(count, num_images, dtype=torch.float64)
        for row in weights:
            drawn = torch.randint(num_images, (num_images,), generator=generator)
            row += torch.bincount(drawn, minlength=num_images)
        yield weights


def bootstrap(
    outcomes: list[SampleResults], name: str, *, times: int, generator: torch.Generator
) -> Tensor:
    """(models, times) float64: a number of several models, on the same drawn images each time.

    Args:
        outcomes: of every model, on the same images.
        name: of the number.
        times: samples of images that are drawn.
        generator: on the CPU.
    """
    parts = [
        torch.stack([each.number(name, weights) for each in outcomes])
        for weights in resampled(outcomes[0].num_images, times=times, generator=generator)
    ]
    return torch.cat(parts, dim=1)


def interval(drawn: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """The middle ``confidence`` of (times,) drawn numbers (percentile interval)."""
    tail = (1 - confidence) / 2
    whole = drawn[~drawn.isnan()]
    if not len(whole):
        return float("nan"), float("nan")
    low, high = torch.quantile(whole, torch.tensor([tail, 1 - tail], dtype=whole.dtype)).tolist()
    return low, high
