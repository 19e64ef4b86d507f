"""A linear classifier on embeddings: how it is fitted, and the search for its weight decay.

Source: Radford et al., arXiv:2103.00020, appendix A.3 (L-BFGS, a search that closes in on the best
weight decay), and clip_benchmark, which trains with AdamW and a cosine instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- the name everyone knows
from torch import Tensor

from frugal.common.evaluation.features import Features
from frugal.common.randomness import stable_key

WEIGHT_DECAYS = np.logspace(-6, 2, num=97).tolist()
"""What is searched; clip_benchmark's."""
_FIRST, _SPAN = 16, 8
"""Every 16th is tried first; then 8, 4, 2 and 1 to either side of the best."""
_ROWS_AT_ONCE = 1 << 16
"""Embeddings that are float64 at a time."""


@dataclass(frozen=True)
class Linear:
    """A linear classifier."""

    weight: Tensor
    """(C, E)."""
    bias: Tensor
    """(C,)."""

    def scores(self, embeddings: Tensor) -> Tensor:
        """(N, C), on the CPU."""
        parts = embeddings.split(_ROWS_AT_ONCE)
        return torch.cat([self._scores(part.to(self.weight)).cpu() for part in parts])

    def _scores(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, self.weight, self.bias)

    def accuracy(self, features: Features) -> float:
        """Fraction of the images whose class has the highest score."""
        best = self.scores(features.embeddings).topk(1, dim=1).indices[:, 0]
        return int((best == features.labels).sum()) / len(features)


def optimum(
    features: Features, num_classes: int, *, weight_decay: float, device: torch.device
) -> Linear:
    """The classifier of the least mean cross-entropy plus half the weight decay times its squares.

    The problem is convex: nothing is drawn, and the bias is not decayed.
    """
    options: Any = {"dtype": torch.float64, "device": device, "requires_grad": True}
    weight = torch.zeros(num_classes, features.embeddings.shape[1], **options)
    bias = torch.zeros(num_classes, **options)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1_000,
        max_eval=1_250,
        history_size=20,
        tolerance_grad=1e-5,  # ten times below scikit-learn's, which CLIP used
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        total = 0.5 * weight_decay * weight.square().sum()
        total.backward()
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            scores = F.linear(features.embeddings[rows].to(weight), weight, bias)
            labels = features.labels[rows].to(device)
            part = F.cross_entropy(scores, labels, reduction="sum") / len(features)
            part.backward()
            total = total.detach() + part.detach()
        return total

    solver.step(loss)  # type: ignore[arg-type]
    return Linear(weight.detach(), bias.detach())


def batches(num_images: int, *, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """The rows of every step, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(stable_key(seed, "probe order") % 2**63)
    for _ in range(epochs):
        yield from torch.randperm(num_images, generator=generator).split(size)


def trained(
    features: Features,
    num_classes: int,
    *,
    weight_decay: float,
    device: torch.device,
    solver: Literal["adamw", "sgd"],
    learning_rate: float,
    batch_size: int,
    epochs: int,
    seed: int,
) -> Linear:
    """Some epochs of AdamW, or of SGD with momentum, under a cosine without warm-up."""
    generator = torch.Generator().manual_seed(seed)
    width = features.embeddings.shape[1]
    bound = 1 / math.sqrt(width)  # torch's own for a linear layer
    drawn = [
        torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device)
        for shape in ((num_classes, width), (num_classes,))
    ]
    weight, bias = (part.requires_grad_() for part in drawn)
    optimizer: torch.optim.Optimizer
    both, rate, decay = [weight, bias], learning_rate, weight_decay
    if solver == "adamw":
        optimizer = torch.optim.AdamW(both, lr=rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(both, lr=rate, momentum=0.9, weight_decay=decay)
    steps = epochs * math.ceil(len(features) / batch_size)
    for step, rows in enumerate(batches(len(features), size=batch_size, epochs=epochs, seed=seed)):
        optimizer.param_groups[0]["lr"] = (
            0.5 * (1 + math.cos(math.pi * step / steps)) * learning_rate
        )
        optimizer.zero_grad()
        scores = F.linear(features.embeddings[rows].to(device), weight, bias)
        F.cross_entropy(scores, features.labels[rows].to(device)).backward()
        optimizer.step()
    return Linear(weight.detach(), bias.detach())


def search(accuracy: Callable[[float], float]) -> float:
    """The weight decay of the highest accuracy, closing in on it as clip_benchmark does.

    Of equal ones the first that was tried counts.
    """
    known: dict[int, float] = {}

    def best(places: list[int]) -> int:
        for place in places:
            if place not in known:
                known[place] = accuracy(WEIGHT_DECAYS[place])
        return max(places, key=lambda place: (known[place], -places.index(place)))

    last = len(WEIGHT_DECAYS) - 1
    peak, span = best(list(range(0, last + 1, _FIRST))), _SPAN
    while span:
        peak = best([max(peak - span, 0), peak, min(peak + span, last)])
        span //= 2
    return WEIGHT_DECAYS[peak]
