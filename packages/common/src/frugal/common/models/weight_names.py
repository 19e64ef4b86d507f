"""Weights of other libraries under our names, and back.

Every layout is a table of rules, one per kind of tensor; reading and writing use the same table.
Nothing is dropped silently: a name that no rule knows is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.vit import ImageTower, image_table

State = dict[str, Tensor]
Shape = Literal["same", "transposed", "kernel", "vector", "table", "scalar"]


def _square_kernel(weight: Tensor) -> Tensor:
    side = round((weight.shape[1] / 3) ** 0.5)
    return weight.unflatten(1, (3, side, side))


_READ: dict[Shape, Callable[[Tensor], Tensor]] = {
    "same": lambda theirs: theirs,
    "transposed": lambda theirs: theirs.T,
    "kernel": lambda theirs: theirs.flatten(1),  # (D, 3, p, p) to (D, P)
    "vector": lambda theirs: theirs.reshape(1, 1, -1),  # (D,) to (1, 1, D)
    "table": lambda theirs: theirs.unsqueeze(0),  # (rows, D) to (1, rows, D)
    "scalar": lambda theirs: theirs.reshape(1),
}
_WRITE: dict[Shape, Callable[[Tensor], Tensor]] = {
    "same": lambda ours: ours,
    "transposed": lambda ours: ours.T,
    "kernel": _square_kernel,
    "vector": lambda ours: ours.flatten(),
    "table": lambda ours: ours.squeeze(0),
    "scalar": lambda ours: ours.squeeze(),
}


@dataclass(frozen=True)
class Rule:
    """One kind of tensor in both layouts; ``{i}`` stands for the number of a block.

    Where the other library keeps queries, keys and values apart, ``theirs`` names all three.
    """

    ours: str
    theirs: str | tuple[str, str, str]
    shape: Shape = "same"

    @property
    def their_names(self) -> tuple[str, ...]:
        """The other library's name or names."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{i(:02d)?\\\}", r"(\\d+)", re.escape(name)))


def _block(match: re.Match[str]) -> int:
    return int(match[1]) if match.re.groups else 0


def read_names(state: Mapping[str, Tensor], rules: Sequence[Rule], *, source: str) -> State:
    """Another library's state under our names, as contiguous tensors of the same values.

    Raises:
        InputError: if a name is unknown, or one of three that belong together is missing.
    """
    ours, left = {}, dict(state)
    for rule in rules:
        first = _pattern(rule.their_names[0])
        for match in [m for name in state if (m := first.fullmatch(name))]:
            names = [name.format(i=_block(match)) for name in rule.their_names]
            if missing := [name for name in names if name not in left]:
                raise InputError(f"{source} has {match[0]} but no {missing[0]}; it is incomplete")
            parts = [_READ[rule.shape](left.pop(name)) for name in names]
            ours[rule.ours.format(i=_block(match))] = torch.cat(parts).contiguous()
    if left:
        raise InputError(
            f"{source} holds {next(iter(left))!r}, which no tower of ours has; it was made by "
            "another kind of model"
        )
    return ours


def write_names(state: Mapping[str, Tensor], rules: Sequence[Rule], *, target: str) -> State:
    """The inverse of :func:`read_names`.

    Raises:
        InputError: if the other library has no place for one of our tensors.
    """
    theirs, left = {}, dict(state)
    for rule in rules:
        pattern = _pattern(rule.ours)
        for match in [m for name in state if (m := pattern.fullmatch(name))]:
            parts = left.pop(match[0]).chunk(len(rule.their_names))
            for name, part in zip(rule.their_names, parts, strict=True):
                theirs[name.format(i=_block(match))] = _WRITE[rule.shape](part).contiguous()
    if left:
        raise InputError(
            f"{target} has no place for {next(iter(left))!r}; this model cannot be written for it"
        )
    return theirs


def pairs(ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    """Rules for the weights and biases of modules that only have other names."""
    return [
        Rule(f"{ours}{mine}.{leaf}", f"{theirs}{other}.{leaf}")
        for mine, other in names.items()
        for leaf in ("weight", "bias")
    ]


def _open_clip_blocks(ours: str, theirs: str) -> list[Rule]:
    names = {
        "norm1": "ln_1",
        "attn.proj": "attn.out_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    mine, other = f"{ours}.blocks.{{i}}.", f"{theirs}transformer.resblocks.{{i}}."
    return [
        Rule(f"{mine}attn.qkv.weight", f"{other}attn.in_proj_weight"),
        Rule(f"{mine}attn.qkv.bias", f"{other}attn.in_proj_bias"),
        Rule(f"{mine}ls1.gamma", f"{other}ls_1.gamma"),
        Rule(f"{mine}ls2.gamma", f"{other}ls_2.gamma"),
        *pairs(mine, other, names),
    ]


OPEN_CLIP = (
    Rule("image.patch_embed.weight", "visual.conv1.weight", "kernel"),
    Rule("image.cls_token", "visual.class_embedding", "vector"),
    Rule("image.pos_embed", "visual.positional_embedding", "table"),
    Rule("image.projection.weight", "visual.proj", "transposed"),
    *pairs("image.", "visual.", {"norm_pre": "ln_pre", "norm": "ln_post"}),
    *_open_clip_blocks("image", "visual."),
    Rule("text.token_embedding.weight", "token_embedding.weight"),
    Rule("text.pos_embed", "positional_embedding", "table"),
    Rule("text.projection.weight", "text_projection", "transposed"),
    *pairs("text.", "", {"norm": "ln_final"}),
    *_open_clip_blocks("text", ""),
    Rule("logit_scale", "logit_scale", "scalar"),
    Rule("logit_bias", "logit_bias", "scalar"),
)
_NOT_WEIGHTS = frozenset(
    {"attn_mask", "input_resolution", "context_length", "vocab_size", "text_model.embeddings."
     "position_ids", "vision_model.embeddings.position_ids"}
)  # fmt: skip


def _without_fixed_table(state: State, name: str, tower: ImageTower, *, source: str) -> State:
    """A table that the tower computes must be the one in the file; it is not a weight of ours."""
    if tower.positions == "learned" or name not in state:
        return state
    theirs, ours = state[name].float(), image_table(tower)
    theirs = theirs[:, -tower.num_patches :]
    ours = ours[:, -tower.num_patches :]
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > 1e-4:
        raise InputError(
            f"the position table of {source} is not {tower.positions} on a grid of "
            f"{tower.grid[0]}x{tower.grid[1]}; set image.positions=learned to keep it"
        )
    return {key: value for key, value in state.items() if key != name}


def with_fixed_table(state: Mapping[str, Tensor], name: str, tower: ImageTower) -> State:
    """Our state with its position table, and a class row of zeros where there is none."""
    state = dict(state)
    if tower.positions != "learned":
        state[name] = image_table(tower)
    if tower.class_token == "without_position":
        table = state[name]
        state[name] = torch.cat((table.new_zeros(1, 1, tower.width), table), dim=1)
    return state


def from_open_clip(state: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """The state of open_clip's or OpenAI's ``CLIP`` as one of our ``DualEncoder``.

    Raises:
        InputError: if it is another kind of model.
    """
    weights = {key: value for key, value in state.items() if key not in _NOT_WEIGHTS}
    ours = read_names(weights, OPEN_CLIP, source="the open_clip checkpoint")
    return _without_fixed_table(
        ours, "image.pos_embed", config.image, source="the open_clip checkpoint"
    )


def to_open_clip(state: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """The state of our ``DualEncoder`` as one of open_clip's ``CLIP``.

    Raises:
        InputError: if open_clip has no such tower (a patch bias, no class token).
    """
    if config.image.class_token == "none":
        raise InputError("open_clip's vision transformer has a class token; this model has none")
    state = with_fixed_table(state, "image.pos_embed", config.image)
    return write_names(state, OPEN_CLIP, target="open_clip")


def _timm_rules(tower: ImageTower) -> list[Rule]:
    block = "blocks.{i}."
    same = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    last = "fc_norm" if tower.norm_after_pooling else "norm"
    return [
        Rule("patch_embed.weight", "patch_embed.proj.weight", "kernel"),
        Rule("patch_embed.bias", "patch_embed.proj.bias"),
        Rule("cls_token", "cls_token"),
        Rule("pos_embed", "pos_embed"),
        *pairs("", "", {"norm_pre": "norm_pre", "norm": last}),
        *pairs(block, block, {name: name for name in same}),
        *(Rule(f"{block}{scale}.gamma", f"{block}{scale}.gamma") for scale in ("ls1", "ls2")),
    ]


def from_timm(state: Mapping[str, Tensor], tower: ImageTower) -> State:
    """The state of a timm ``VisionTransformer`` as our ``ImageTransformer``; its head is left.

    Raises:
        InputError: if it is another kind of model.
    """
    encoder = {key: value for key, value in state.items() if not key.startswith("head.")}
    ours = read_names(encoder, _timm_rules(tower), source="the timm checkpoint")
    return _without_fixed_table(ours, "pos_embed", tower, source="the timm checkpoint")


def to_timm(state: Mapping[str, Tensor], tower: ImageTower) -> State:
    """The state of our ``ImageTransformer`` as a timm ``VisionTransformer`` without a head.

    A class token without position becomes one with a position of zeros; the projection is left.
    """
    encoder = {key: value for key, value in state.items() if key != "projection.weight"}
    encoder = with_fixed_table(encoder, "pos_embed", tower)
    return write_names(encoder, _timm_rules(tower), target="timm")


def _separate(ours: str, theirs: str, leaves: tuple[str, str, str]) -> list[Rule]:
    return [
        Rule(f"{ours}.{leaf}", tuple(f"{theirs}{name}.{leaf}" for name in leaves))  # type: ignore[arg-type]
        for leaf in ("weight", "bias")
    ]


def _clip_blocks(ours: str, theirs: str) -> list[Rule]:
    mine, other = f"{ours}.blocks.{{i}}.", f"{theirs}.encoder.layers.{{i}}."
    names = {
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    projections = ("q_proj", "k_proj", "v_proj")
    return [
        *_separate(f"{mine}attn.qkv", f"{other}self_attn.", projections),
        *pairs(mine, other, names),
    ]


TRANSFORMERS_CLIP = (
    Rule("image.patch_embed.weight", "vision_model.embeddings.patch_embedding.weight", "kernel"),
    Rule("image.cls_token", "vision_model.embeddings.class_embedding", "vector"),
    Rule("image.pos_embed", "vision_model.embeddings.position_embedding.weight", "table"),
    *pairs("image.", "vision_model.", {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}),
    *_clip_blocks("image", "vision_model"),
    Rule("image.projection.weight", "visual_projection.weight"),
    Rule("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rule("text.pos_embed", "text_model.embeddings.position_embedding.weight", "table"),
    *pairs("text.", "text_model.", {"norm": "final_layer_norm"}),
    *_clip_blocks("text", "text_model"),
    Rule("text.projection.weight", "text_projection.weight"),
    Rule("logit_scale", "logit_scale", "scalar"),
)


def from_transformers_clip(state: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """The state of a transformers ``CLIPModel`` as our ``DualEncoder``.

    Raises:
        InputError: if it is another kind of model.
    """
    weights = {key: value for key, value in state.items() if key not in _NOT_WEIGHTS}
    ours = read_names(weights, TRANSFORMERS_CLIP, source="the transformers checkpoint")
    return _without_fixed_table(
        ours, "image.pos_embed", config.image, source="the transformers checkpoint"
    )


def to_transformers_clip(state: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """The state of our ``DualEncoder`` as a transformers ``CLIPModel``.

    Raises:
        InputError: if ``CLIPModel`` has no such tower (a patch bias, no norm before the blocks).
    """
    if config.image.class_token == "none" or not config.image.pre_norm:
        raise InputError(
            "transformers' CLIPModel has a class token and a norm before the blocks; this model "
            "lacks one of them"
        )
    state = with_fixed_table(state, "image.pos_embed", config.image)
    return write_names(state, TRANSFORMERS_CLIP, target="transformers' CLIPModel")


_VIT_MAE_NAMES = {"norm1": "layernorm_before", "norm2": "layernorm_after"}


def _vit_mae_blocks(ours: str, theirs: str, *, published: bool) -> list[Rule]:
    """Names of checkpoints as published (transformers 4), or of modules in transformers 5."""
    names = dict(_VIT_MAE_NAMES)
    if published:
        apart = ("attention.query", "attention.key", "attention.value")
        names |= {
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }
    else:
        apart = ("q_proj", "k_proj", "v_proj")
        names |= {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    return [
        *_separate(f"{ours}attn.qkv", f"{theirs}attention.", apart),
        *pairs(ours, theirs, names),
    ]


def _vit_mae_rules(*, published: bool) -> list[Rule]:
    mine, other = "blocks.{i}.", "encoder.layer.{i}." if published else "layers.{i}."
    patch = "embeddings.patch_embeddings.projection"
    return [
        Rule("patch_embed.weight", f"{patch}.weight", "kernel"),
        Rule("patch_embed.bias", f"{patch}.bias"),
        Rule("cls_token", "embeddings.cls_token"),
        Rule("pos_embed", "embeddings.position_embeddings"),
        *pairs("", "", {"norm": "layernorm"}),
        *_vit_mae_blocks(mine, other, published=published),
    ]


VIT_MAE_DECODER = (
    Rule("mask_token", "mask_token"),
    Rule("pos_embed", "decoder_pos_embed"),
    *pairs("", "decoder_", {"embed": "embed", "norm": "norm", "head": "pred"}),
    *_vit_mae_blocks("blocks.{i}.", "decoder_layers.{i}.", published=True),
)
"""The decoder of a masked autoencoder with plain blocks, in checkpoints of
``ViTMAEForPreTraining``."""


def from_vit_mae(state: Mapping[str, Tensor], tower: ImageTower) -> State:
    """The encoder of a transformers ``ViTMAEModel`` or ``ViTMAEForPreTraining``.

    Returns:
        The state of our ``ImageTransformer``; the decoder is left.

    Raises:
        InputError: if it is another kind of model.
    """
    encoder = {
        key.removeprefix("vit."): value
        for key, value in state.items()
        if not key.startswith("decoder.")
    }
    published = any(key.startswith("encoder.layer.") for key in encoder)
    rules = _vit_mae_rules(published=published)
    ours = read_names(encoder, rules, source="the ViTMAE checkpoint")
    return _without_fixed_table(ours, "pos_embed", tower, source="the ViTMAE checkpoint")


def to_vit_mae(state: Mapping[str, Tensor], tower: ImageTower, *, published: bool = False) -> State:
    """The state of our ``ImageTransformer`` for transformers' ``ViTMAEModel`` and ``ViTModel``.

    Args:
        state: its projection is left.
        tower: its shape.
        published: with the names of checkpoints, which every version reads; else with those of the
            modules of version 5.
    """
    encoder = {key: value for key, value in state.items() if key != "projection.weight"}
    encoder = with_fixed_table(encoder, "pos_embed", tower)
    return write_names(encoder, _vit_mae_rules(published=published), target="transformers' ViT")
