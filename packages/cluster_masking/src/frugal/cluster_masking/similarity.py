"""How much patches resemble some of them, the anchors: by pixels, and by embeddings.

Source: Wei, Pan and Owens, "Efficient Vision-Language Pre-training by Cluster Masking",
arXiv:2405.08815, section 3. Only rows of anchors are ever computed: (B, A, N) numbers, where all
pairs of patches would be (B, N, N), thirty times as many at the published settings. Nothing here
has a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor


@torch.no_grad()
def pixel_similarity(patches: Tensor, anchors: Tensor, *, centered: bool = True) -> Tensor:
    """Pearson's correlation of the pixels of every patch with those of every anchor.

    The mean that is subtracted is one over pixels and channels, so that flat patches of different
    hue differ. A patch whose normalized values are all equal correlates with nothing.

    Args:
        patches: (B, N, P) normalized pixels.
        anchors: (B, A) patch numbers.
        centered: subtract the means; without it the cosine of the plain pixels.

    Returns:
        (B, A, N) float32; NaN where one of the two patches is constant.
    """
    vectors = patches.float()
    if not centered:
        return _cosines(vectors, anchors, torch.linalg.vector_norm(vectors, dim=2))
    least, most = vectors.aminmax(dim=2)  # (B, N) each
    vectors = vectors - vectors.mean(2, keepdim=True)
    lengths = torch.linalg.vector_norm(vectors, dim=2)
    # the mean of equal numbers is rounded: without this, what is left would be compared
    return _cosines(vectors, anchors, lengths.masked_fill(least == most, torch.nan))


@torch.no_grad()
def embedding_similarity(embeddings: Tensor, anchors: Tensor) -> Tensor:
    """Cosine of the embedding of every patch with that of every anchor.

    Args:
        embeddings: (B, N, D) of every patch, its position added.
        anchors: (B, A) patch numbers.

    Returns:
        (B, A, N) float32.
    """
    vectors = embeddings.float()
    return _cosines(vectors, anchors, torch.linalg.vector_norm(vectors, dim=2))


def mix_in(similarity: Tensor, of_embeddings: Tensor, weight: float | Tensor) -> Tensor:
    """One similarity and another, by the weight of the other: one for all images or (B,) for each.

    Args:
        similarity: (B, A, N).
        of_embeddings: (B, A, N).
        weight: from 0 to 1.
    """
    share = torch.as_tensor(weight, device=similarity.device).view(-1, 1, 1)
    return torch.lerp(similarity, of_embeddings, share.to(similarity))


def _cosines(vectors: Tensor, anchors: Tensor, lengths: Tensor) -> Tensor:
    """(B, A, N) from (B, N, P) vectors, (B, A) numbers of some and the (B, N) lengths of all."""
    rows = anchors.unsqueeze(2).expand(-1, -1, vectors.shape[2])
    with _exact_float32(vectors.device):
        products = vectors.gather(1, rows) @ vectors.transpose(1, 2)  # (B, A, N)
    return products / (lengths.gather(1, anchors).unsqueeze(2) * lengths.unsqueeze(1))


@contextlib.contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Products in IEEE float32, whatever the run computes in.

    Rounded to TF32 or half precision, similarities would be off by a thousandth, and patches near
    the threshold would change sides from one device to the next.
    """
    # not torch.set_float32_matmul_precision, which fails where one of these was set by itself
    of_cuda, of_cpu = cast("tuple[Any, Any]", (torch.backends.cuda, torch.backends.mkldnn))
    backends = (of_cuda.matmul, of_cpu.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
