"""Rules for the parts that the flax trees of FLIP and CLIPA have in common, big_vision's parts."""

from __future__ import annotations

from frugal.common.models.weight_names import Rule


def flax_dense(ours: str, theirs: str) -> list[Rule]:
    """A linear layer with bias, whose kernel flax keeps as (inputs, outputs)."""
    return [
        Rule(f"{ours}.weight", f"{theirs}/kernel", "transposed"),
        Rule(f"{ours}.bias", f"{theirs}/bias"),
    ]


def flax_norm(ours: str, theirs: str) -> list[Rule]:
    """A LayerNorm, whose weight flax calls scale."""
    return [Rule(f"{ours}.weight", f"{theirs}/scale"), Rule(f"{ours}.bias", f"{theirs}/bias")]


def flax_blocks(ours: str, theirs: str) -> list[Rule]:
    """The blocks of a tower of big_vision's kind.

    Args:
        ours: the tower's name.
        theirs: path of a block, with ``{i}`` or ``{i:02d}`` for its number.
    """
    mine = f"{ours}.blocks.{{i}}"
    attention = f"{theirs}/MultiHeadDotProductAttention_0"
    query, key, value = (f"{attention}/{name}" for name in ("query", "key", "value"))
    return [
        Rule(
            f"{mine}.attn.qkv.weight",
            (f"{query}/kernel", f"{key}/kernel", f"{value}/kernel"),
            "transposed",
        ),
        Rule(f"{mine}.attn.qkv.bias", (f"{query}/bias", f"{key}/bias", f"{value}/bias")),
        *flax_dense(f"{mine}.attn.proj", f"{attention}/out"),
        *flax_dense(f"{mine}.mlp.fc1", f"{theirs}/MlpBlock_0/Dense_0"),
        *flax_dense(f"{mine}.mlp.fc2", f"{theirs}/MlpBlock_0/Dense_1"),
        *flax_norm(f"{mine}.norm1", f"{theirs}/LayerNorm_0"),
        *flax_norm(f"{mine}.norm2", f"{theirs}/LayerNorm_1"),
    ]
