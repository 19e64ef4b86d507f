"""FLIP's published flax parameters under our names, and back.

Names are the paths of the flax tree, joined by slashes. The tree keeps the fixed sin-cos table
of the images as if it were a parameter, with a row of zeros for the class token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.models.config import DualEncoderConfig
from frugal.common.models.positions import image_table
from frugal.common.models.weight_names import Rule, State, read_names, write_names

_IMAGE_TABLE = "img_encoder/posembed_encoder/pos_embedding"
_PATCH_KERNEL = "img_encoder/embedding/kernel"


def _dense(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}.weight", f"{theirs}/kernel", "transposed"),
        Rule(f"{ours}.bias", f"{theirs}/bias"),
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.weight", f"{theirs}/scale"), Rule(f"{ours}.bias", f"{theirs}/bias")]


def _tower(ours: str, theirs: str) -> list[Rule]:
    mine = f"{ours}.blocks.{{i}}"
    block = f"{theirs}/Transformer/encoderblock_{{i:02d}}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    query, key, value = (f"{attention}/{name}" for name in ("query", "key", "value"))
    return [
        Rule(
            f"{mine}.attn.qkv.weight",
            (f"{query}/kernel", f"{key}/kernel", f"{value}/kernel"),
            "transposed",
        ),
        Rule(f"{mine}.attn.qkv.bias", (f"{query}/bias", f"{key}/bias", f"{value}/bias")),
        *_dense(f"{mine}.attn.proj", f"{attention}/out"),
        *_dense(f"{mine}.mlp.fc1", f"{block}/MlpBlock_0/Dense_0"),
        *_dense(f"{mine}.mlp.fc2", f"{block}/MlpBlock_0/Dense_1"),
        *_norm(f"{mine}.norm1", f"{block}/LayerNorm_0"),
        *_norm(f"{mine}.norm2", f"{block}/LayerNorm_1"),
        *_norm(f"{ours}.norm", f"{theirs}/Transformer/encoder_norm"),
    ]


_RULES = (
    Rule("image.patch_embed.weight", _PATCH_KERNEL),  # reshaped below
    Rule("image.patch_embed.bias", "img_encoder/embedding/bias"),
    Rule("image.cls_token", "img_encoder/cls"),
    *_tower("image", "img_encoder"),
    Rule("image.projection.weight", "img_mlp1/kernel", "transposed"),
    Rule("text.token_embedding.weight", "txt_encoder/token_embedding/embedding"),
    Rule("text.pos_embed", "txt_encoder/posembed_encoder/pos_embedding"),
    *_tower("text", "txt_encoder"),
    Rule("text.projection.weight", "txt_mlp1/kernel", "transposed"),
    Rule("logit_scale", "logit_scale"),
)


def from_flax(params: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """FLIP's parameters as the state of our ``DualEncoder``.

    Args:
        params: tensors by slash-joined path. A tree that was trained with a fixed temperature
            has no ``logit_scale``; the state has none then.
        config: of the model that takes them.

    Raises:
        InputError: if it is another kind of model, or was trained on another grid.
    """
    weights = dict(params)
    table = weights.pop(_IMAGE_TABLE, None)
    expected = image_table(config.image)
    if table is not None and (
        table[:, 1:].shape != expected.shape or (table[:, 1:] - expected).abs().max() > 1e-4
    ):
        raise InputError(
            f"the FLIP checkpoint was trained on another grid than "
            f"{config.image.grid[0]}x{config.image.grid[1]} patches; set image.image_size and "
            "image.patch_size to its own"
        )
    if _PATCH_KERNEL in weights:  # (p, p, 3, D) to (D, 3, p, p) to (D, P)
        weights[_PATCH_KERNEL] = weights[_PATCH_KERNEL].permute(3, 2, 0, 1).flatten(1)
    return read_names(weights, _RULES, source="the FLIP checkpoint")


def to_flax(state: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """The inverse of :func:`from_flax`, the image's fixed position table included."""
    params = write_names(state, _RULES, target="FLIP's flax tree")
    side = config.image.patch_size
    kernel = params[_PATCH_KERNEL].unflatten(1, (3, side, side))  # (D, 3, p, p)
    params[_PATCH_KERNEL] = kernel.permute(2, 3, 1, 0).contiguous()
    table = image_table(config.image)
    params[_IMAGE_TABLE] = torch.cat((table.new_zeros(1, 1, config.image.width), table), dim=1)
    return params
