"""Accuracy, recall and precision, as clip_benchmark defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frugal.common.distributed import Ranks

_SCORES_AT_ONCE = 1 << 24
"""Similarities held at a time: 64 MiB of float32, twice that while they are float64."""


def similarity(queries: Tensor, candidates: Tensor) -> Tensor:
    """(Q, C) float32 dot products, computed in float64.

    A float32 product rounds differently with its shape, and TF32 differently again: equal
    candidates would tie or not depending on the size of the chunk. Rounded from float64 they tie.
    """
    return (queries.double() @ candidates.double().T).float()


def ranked_classes(scores: Tensor) -> Tensor:
    """(B, K) int64: the K = min(5, C) best classes of every image, best first.

    Ties fall as in ``clip_benchmark``, which asks for five at once, or for one where there are
    fewer than five classes.
    """
    classes = scores.shape[1]
    if classes >= 5:
        return scores.topk(5, dim=1).indices
    ranked = scores.topk(classes, dim=1).indices
    best = scores.topk(1, dim=1).indices
    others = ranked[ranked != best].view(len(scores), classes - 1)
    return torch.cat([best, others], dim=1)


def top_k_accuracy(ranked: Tensor, labels: Tensor, k: int) -> float:
    """Fraction of the images whose class is among the first k of (N, K) ``ranked`` classes.

    With no more than k classes, every class is among them.
    """
    found = (ranked[:, :k] == labels[:, None]).any(1)
    return int(found.sum()) / len(labels)


def mean_per_class_recall(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur in ``labels`` of the fraction predicted right."""
    occurring, place = labels.unique(return_inverse=True)
    images = torch.bincount(place, minlength=len(occurring))
    right = torch.bincount(place[predicted == labels], minlength=len(occurring))
    return float((right.double() / images.double()).mean())


def roc_auc(scores: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the receiver operating characteriztic; a tie counts half.

    Args:
        scores: (N,) higher for what is held to be positive.
        positive: (N,) bool.
        weights: (R, N) how often every image counts, R times over; once each by default.

    Returns:
        (R,) float64; nan where there is no positive, or nothing else.
    """
    if weights is None:
        weights = torch.ones(1, len(scores), dtype=torch.float64)
    weights = weights.double()
    values, place = scores.unique(return_inverse=True)  # ascending
    blocks = weights.new_zeros(2, len(weights), len(values))
    blocks[0].index_add_(1, place[~positive], weights[:, ~positive])
    blocks[1].index_add_(1, place[positive], weights[:, positive])
    others, own = blocks
    below = others.cumsum(1) - others / 2  # (R, values): what a positive there is right about
    return (own * below).sum(1) / (own.sum(1) * others.sum(1))


def average_precision(scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over an image's own ranks of the share of positives up to there, class by class.

    As clip_benchmark has it; a class without an image has 0.

    Args:
        scores: (N, C).
        targets: (N, C) bool: which classes every image is of.
        weights: (R, N) how often every image counts, R times over; once each by default.

    Returns:
        (R, C) float64.
    """
    if weights is None:
        weights = torch.ones(1, len(scores), dtype=torch.float64)
    found = []
    for own, is_of in zip(scores.T, targets.T, strict=True):
        order = own.sort(descending=True).indices
        counts = weights[:, order].double()  # (R, N)
        right = counts * is_of[order]
        precision = right.cumsum(1) / counts.cumsum(1).clamp_min(1e-12)
        found.append((right * precision).sum(1) / right.sum(1).clamp_min(1))
    return torch.stack(found, dim=1)


def found_among_nearest(
    queries: Tensor,
    candidates: Tensor,
    *,
    query_owner: Tensor,
    candidate_owner: Tensor,
    at: Sequence[int],
    ranks: Ranks,
    scores_at_once: int = _SCORES_AT_ONCE,
) -> Tensor:
    """Which queries have a candidate of their own owner among their k nearest, per k.

    Args:
        queries: (Q, E); the processes share them out in chunks.
        candidates: (C, E), all of them on every process.
        query_owner: (Q,) int64: the image a query is, or belongs to.
        candidate_owner: (C,) int64.
        at: the values of k; one beyond C counts as C.
        ranks: every one of these processes must call this.
        scores_at_once: bounds the memory; at least one row of C scores is held.

    Returns:
        (K, Q) bool.
    """
    rows = max(1, scores_at_once // max(1, len(candidates)))
    found = torch.zeros(len(at), len(queries), dtype=torch.int32, device=queries.device)
    for part in ranks.turns(len(queries), rows):
        scores = similarity(queries[part], candidates)  # (rows, C)
        owner = query_owner[part, None]  # (rows, 1)
        for place, k in enumerate(at):
            nearest = scores.topk(min(k, len(candidates)), dim=1).indices  # (rows, k)
            found[place, part] = (candidate_owner[nearest] == owner).any(1).int()
    return ranks.sum(found).bool()


@dataclass(frozen=True)
class Recall:
    """Recall at each k, both ways."""

    at: tuple[int, ...]
    """The values of k."""
    texts_found: Tensor
    """(K, M) bool, text to image: the captions whose image is among the k nearest images."""
    images_found: Tensor
    """(K, N) bool, image to text: the images with any of their captions among the k nearest."""

    @property
    def image_retrieval(self) -> dict[int, float]:
        """Text to image: the fraction of captions found, by k."""
        return _shares(self.at, self.texts_found)

    @property
    def text_retrieval(self) -> dict[int, float]:
        """Image to text: the fraction of images found, by k."""
        return _shares(self.at, self.images_found)


def _shares(at: Sequence[int], found: Tensor) -> dict[int, float]:
    return {k: int(row.sum()) / len(row) for k, row in zip(at, found, strict=True)}


def recall_at(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    *,
    at: Sequence[int] = (1, 5, 10),
    ranks: Ranks | None = None,
    scores_at_once: int = _SCORES_AT_ONCE,
) -> Recall:
    """Recall between (N, E) image and (M, E) text embeddings, complete on every process.

    Args:
        images: (N, E) unit-norm.
        texts: (M, E) unit-norm.
        image_of_text: (M,) int64: the image each text describes.
        at: the values of k.
        ranks: the processes that share the work; this one alone by default.
        scores_at_once: similarities held in memory at a time, never the whole N x M.
    """
    ranks = ranks or Ranks()
    image_of_text = image_of_text.to(images.device)
    image_numbers = torch.arange(len(images), device=images.device)

    def found(queries: Tensor, candidates: Tensor, owners: tuple[Tensor, Tensor]) -> Tensor:
        return found_among_nearest(
            queries,
            candidates,
            query_owner=owners[0],
            candidate_owner=owners[1],
            at=at,
            ranks=ranks,
            scores_at_once=scores_at_once,
        )

    return Recall(
        at=tuple(at),
        texts_found=found(texts, images, (image_of_text, image_numbers)),
        images_found=found(images, texts, (image_numbers, image_of_text)),
    )
