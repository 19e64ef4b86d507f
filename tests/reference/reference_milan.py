"""MILAN's numbers computed the plain way, in the order of the image.

Written from the paper (arXiv:2208.06049, section 3; MAE, arXiv:2111.06377, section 3): every patch
is embedded, every attention matrix is computed, tokens are put back in the order of the image in
every block. Weights are those of the modules that train; their forward is not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.common.models.attention import Attention
from frugal.common.models.blocks import Block
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.reduction.image import PatchView
from frugal.milan.decoders import (
    Decoder,
    PlainDecoder,
    PromptingBlock,
    PromptingDecoder,
    Split,
)
from frugal.milan.model import MaskedImageModel
from frugal.milan.targets import pixel_target


def restoring(split: Split) -> Tensor:
    """(B, N): where each patch of the image stands among the seen, then the hidden ones."""
    return torch.cat((split.visible, split.hidden), dim=1).argsort(dim=1)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, L, D) and (B, K) to (B, K, D), by an index as large as what it gives."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]).contiguous())


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """What queries gather (B, M, D), and how (B, H, M, L)."""
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)
    )  # (B, H, L, C)
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def self_attention(attention: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, D) to the same, and the whole attention matrix (B, H, L, L)."""
    query, key, value = attention.qkv(tokens)
    gathered, weights = attended(query, key, value, attention.heads)
    return attention.proj(gathered), weights


def block(layer: Block, tokens: Tensor) -> Tensor:
    """An ordinary block on (B, L, D)."""
    tokens = tokens + self_attention(layer.attn, layer.norm1(tokens))[0]
    return tokens + layer.mlp(layer.norm2(tokens))


def cut(images: Tensor, tower: ImageTower) -> Tensor:
    """(B, N, P): the pixels of every patch as a model takes them."""
    view = PatchView.of(images, tower)
    return view.normalized if images.dtype == torch.uint8 else view.pixels


def embedded(tower: ImageTransformer, images: Tensor) -> Tensor:
    """(B, N, D): every patch with its position."""
    patches = tower.patch_embed(cut(images, tower.config))
    return patches + tower.pos_embed[:, -tower.config.num_patches :]


def class_token(tower: ImageTransformer) -> Tensor:
    """(1, 1, D), with its position where it has one."""
    if tower.config.class_token == "with_position":
        return tower.cls_token + tower.pos_embed[:, :1]
    return tower.cls_token


def encode(tower: ImageTransformer, images: Tensor, split: Split) -> Tensor:
    """(B, 1 + K, D): class token and seen patches after the last norm."""
    patches = take(embedded(tower, images), split.visible)
    tokens = torch.cat((class_token(tower).expand(len(patches), -1, -1), patches), dim=1)
    for layer in cast("Iterable[Block]", tower.blocks):
        tokens = block(layer, tokens)
    return tower.norm(tokens)


def decode(decoder: Decoder, latent: Tensor, split: Split) -> Tensor:
    """(B, 1 + N, outputs) in the order of the image, class token first."""
    if isinstance(decoder, PromptingDecoder):
        tokens = prompted(decoder, latent, split)
    else:
        assert isinstance(decoder, PlainDecoder)
        tokens = filled_up(decoder, latent, split)
        for layer in cast("Iterable[Block]", decoder.blocks):
            tokens = block(layer, tokens)
    return decoder.head(decoder.norm(tokens))


def filled_up(decoder: Decoder, latent: Tensor, split: Split) -> Tensor:
    """(B, 1 + N, E): seen patches and mask tokens in the order of the image, with positions."""
    seen = decoder.embed(latent)
    masks = decoder.mask_token.expand(len(seen), split.hidden.shape[1], -1)
    patches = take(torch.cat((seen[:, 1:], masks), dim=1), restoring(split))
    return torch.cat((seen[:, :1], patches), dim=1) + decoder.pos_embed


def prompted(decoder: PromptingDecoder, latent: Tensor, split: Split) -> Tensor:
    """(B, 1 + N, E) in the order of the image: what the blocks of MILAN's decoder leave."""
    tokens = filled_up(decoder, latent, split)
    visible, hidden = split.visible + 1, split.hidden + 1
    fixed = torch.cat((tokens[:, :1], take(tokens, visible)), dim=1)
    updated = take(tokens, hidden)
    weights = zip(decoder.kv_weight, decoder.kv_bias, strict=True)
    for layer, (weight, bias) in zip(decoder.blocks, weights, strict=True):
        assert isinstance(layer, PromptingBlock)
        updated = prompting_block(layer, fixed, updated, split, weight=weight, bias=bias)
    return in_order(fixed, updated, split)


def in_order(fixed: Tensor, updated: Tensor, split: Split) -> Tensor:
    """(B, 1 + K, E) and (B, M, E) to (B, 1 + N, E) in the order of the image."""
    patches = take(torch.cat((fixed[:, 1:], updated), dim=1), restoring(split))
    return torch.cat((fixed[:, :1], patches), dim=1)


def prompting_block(
    layer: PromptingBlock,
    fixed: Tensor,
    updated: Tensor,
    split: Split,
    *,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Hidden tokens (B, M, E) gather from all tokens of the image, of which most stay fixed."""
    normed = layer.norm1(updated)
    tokens = in_order(fixed, normed, split)  # fixed tokens enter without a norm
    key, value = F.linear(tokens, weight, PromptingDecoder.without_key_gradient(bias)).chunk(2, -1)
    gathered, _ = attended(layer.query(normed), key, value, layer.heads)
    updated = updated + layer.proj(gathered)
    return updated + layer.mlp(layer.norm2(updated))


def teach(tower: ImageTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """A teacher's tokens (B, 1 + N, K) and its attention (B, 1 + N, 1 + N), mean over the heads."""
    patches = embedded(tower, images)
    tokens = torch.cat((class_token(tower).expand(len(patches), -1, -1), patches), dim=1)
    tokens = tower.norm_pre(tokens)
    *blocks, last = cast("Iterable[Block]", tower.blocks)
    for layer in blocks:
        tokens = block(layer, tokens)
    weights = self_attention(last.attn, last.norm1(tokens))[1]
    tokens = block(last, tokens)
    return tower.projection(tower.norm(tokens)), weights.mean(1)


def feature_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of unit vectors over all tokens, (B, 1 + N, K) each."""
    predicted, target = (F.normalize(side, dim=-1, eps=1e-12) for side in (predicted, target))
    return (2 - 2 * (predicted * target).sum(-1)).mean()


def pixel_loss(
    predicted: Tensor, pixels: Tensor, split: Split, *, normalize_patches: bool
) -> Tensor:
    """Mean squared error over hidden patches, (B, N, P) each in the order of the image."""
    target = pixel_target(pixels, normalize_patches=normalize_patches)
    is_hidden = torch.zeros_like(predicted[..., 0]).scatter_(1, split.hidden, 1)  # (B, N)
    errors = (predicted - target).square().mean(-1)
    return (errors * is_hidden).sum() / is_hidden.sum()


def predict(model: MaskedImageModel, images: Tensor, split: Split) -> Tensor:
    """(B, 1 + N, outputs) in the order of the image, class token first."""
    return decode(model.decoder, encode(model.image, images, split), split)
