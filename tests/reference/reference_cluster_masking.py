"""What the published code of cluster masking computes, for comparison.

The reference of arXiv:2405.08815 keeps equally many patches of every image of a batch: where fewer
are visible, masked ones fill up. Meant is that nobody attends to these (:func:`blocking_bias`),
which gives the class token that packed visible tokens give; a mean over all tokens differs, because
the filling counts in it. What it does (:func:`published_bias`) is to add 1 to the logits between
visible tokens, of another sample of the batch than the one attending.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.cluster_masking.clusters import (
    ClusterMask,
    clusters_of,
    draw_anchors,
    most_kept,
    num_anchors,
)
from frugal.cluster_masking.similarity import embedding_similarity, mix_in, pixel_similarity
from frugal.common.models.attention import Attention
from frugal.common.models.blocks import Block
from frugal.common.models.vit import ImageTransformer
from frugal.common.reduction.image import PatchView


def cluster_mask(
    patches: Tensor,
    *,
    anchor_noise: Tensor,
    cut_off_noise: Tensor,
    anchor_ratio: float,
    threshold: float,
    min_mask_ratio: float,
    overflow: Literal["random", "index"] = "random",
    embeddings: Tensor | None = None,
    mix: float | Tensor = 0.0,
    centered: bool = True,
) -> ClusterMask:
    """From pixels and noise to a mask, with what only the published code does.

    Args:
        patches: (B, N, P) normalized pixels.
        anchor_noise: (B, N) uniform numbers.
        cut_off_noise: (B, N) uniform numbers.
        anchor_ratio: share of the patches that are anchors.
        threshold: on the similarity, from -1 to 1.
        min_mask_ratio: share of the patches that goes in any case.
        overflow: which visible patches go if too few are masked. random: those of the largest
            cut-off noise. index: the last, at the bottom of the image, as published.
        embeddings: (B, N, D) of every patch, to be mixed in.
        mix: weight of their similarity, from 0 to 1, for all images or (B,) for each.
        centered: subtract the mean of every patch's pixels.
    """
    anchors = draw_anchors(anchor_noise, num_anchors(patches.shape[1], anchor_ratio))
    similarity = pixel_similarity(patches, anchors, centered=centered)  # (B, A, N)
    if embeddings is not None:
        similarity = mix_in(similarity, embedding_similarity(embeddings, anchors), mix)
    most = most_kept(patches.shape[1], min_mask_ratio)
    return clusters_of(
        similarity, anchors, cut_off_noise, threshold=threshold, most=most, overflow=overflow
    )


def ids_keep(mask: ClusterMask) -> Tensor:
    """(B, K) patch numbers that the published layout keeps: visible ones, then masked ones.

    K is the largest of ``counts``, so that it takes a whole batch to tell. The share that goes is
    ``mask_ratio`` all the same: filling up changes how patches lie, not which are visible.
    """
    return mask.order[:, : int(mask.counts.max())]


def kept_hits(mask: ClusterMask) -> Tensor:
    """(B, 1 + K) int64: anchors that each kept token resembles, the class token none."""
    hits = mask.hits.gather(1, ids_keep(mask))  # (B, K)
    return torch.cat((hits.new_zeros(len(hits), 1), hits), dim=1)


def both_visible(hits: Tensor) -> Tensor:
    """(B, L, L) bool: pairs of tokens of which neither is masked, from (B, L) hits."""
    visible = hits == 0
    return visible.unsqueeze(2) & visible.unsqueeze(1)


def blocking_bias(hits: Tensor) -> Tensor:
    """What is added to the logits where nobody attends to a masked token: 0 or minus infinity.

    Masked tokens themselves attend to the visible ones; only a mean over all tokens reads them.

    Args:
        hits: (B, L) of the tokens.

    Returns:
        (B, 1, 1, L) float32.
    """
    return torch.zeros(hits.shape, device=hits.device).masked_fill(hits > 0, -torch.inf)[
        :, None, None
    ]


def published_bias(hits: Tensor, heads: int) -> Tensor:
    """What the released code adds: 1 where both tokens are visible, of sample (n H + h) mod B.

    Args:
        hits: (B, L) of the tokens.
        heads: H.

    Returns:
        (B, H, L, L) float32.
    """
    slots = torch.arange(len(hits) * heads, device=hits.device) % len(hits)
    return both_visible(hits).float()[slots].unflatten(0, (len(hits), heads))


def tower_with_bias(tower: ImageTransformer, images: Tensor, kept: Tensor, bias: Tensor) -> Tensor:
    """The vectors of images whose kept tokens attend under a bias, computed as the reference does.

    Every patch is embedded before some are left out, and every block computes every token.

    Args:
        tower: with a class token and learned positions; its weights are used, its forward is not.
        images: (B, 3, H, W).
        kept: (B, K) patches that stay.
        bias: (B, H or 1, 1 + K or 1, 1 + K), added to the logits of every block.

    Returns:
        (B, E).
    """
    tokens = tower.patch_embed(PatchView.of(images, tower.config).normalized)  # (B, N, D)
    tokens = tokens + tower.pos_embed[:, 1:]
    rows = kept.unsqueeze(2).expand(-1, -1, tokens.shape[2])
    first = (tower.cls_token + tower.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    tokens = tower.norm_pre(torch.cat((first, tokens.gather(1, rows)), dim=1))  # (B, 1 + K, D)
    for block in cast("Iterable[Block]", tower.blocks):
        tokens = tokens + _attended(block.attn, block.norm1(tokens), bias)
        tokens = tokens + block.mlp(block.norm2(tokens))
    pooled = tokens[:, 0] if tower.config.pooling == "class" else tokens.mean(1)
    return tower.projection(tower.norm(pooled))


def _attended(attention: Attention, tokens: Tensor, bias: Tensor) -> Tensor:
    """(B, L, D) to the same."""
    query, key, value = (
        part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in attention.qkv(tokens)
    )  # (B, H, L, C)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    return attention.proj(attended.transpose(1, 2).flatten(2))
