"""Pretraining checkpoints in the layout of the published code, and back.

Decoder and encoder lie side by side under MAE's names (arXiv:2111.06377), both with their fixed
position tables. The file is a dictionary with ``model``, perhaps ``optimizer``, ``epoch`` and the
settings of the run; its state of AdamW counts parameters in the order of the model, those without
weight decay first.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower, image_table
from frugal.common.models.weight_names import (
    Rule,
    from_timm,
    pairs,
    read_names,
    to_timm,
    write_names,
)
from frugal.common.weights.files import State
from frugal.common.weights.image_states import encoder_of_state
from frugal.milan.decoders import DecoderConfig
from frugal.milan.model import MaskedImageModel, MaskedModel

_HEAD_WIDTH = 32
"""Of the decoder: 16 heads at the published width of 512."""
_MOST_ROUNDING = 5e-3
"""That half precision leaves in a position table."""
_TABLES = ("pos_embed", "decoder_pos_embed")
_FIRST = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")
"""What stands before all modules in a published file."""
_ANY = ImageTower(width=4, depth=1, heads=1, mlp_width=4, patch_size=1, image_size=1)
"""Whose names are those of every tower with a norm before the pooling."""
_KV = re.compile(r"decoder_blocks\.(\d+)\.attn\.kv\.(weight|bias)")


def _decoder_rules(kind: str) -> list[Rule]:
    block, theirs = "blocks.{i}.", "decoder_blocks.{i}."
    attention = {"query": "attn.q", "proj": "attn.proj"}
    if kind == "plain":
        attention = {"attn.qkv": "attn.qkv", "attn.proj": "attn.proj"}
    return [
        Rule("mask_token", "mask_token"),
        *pairs("", "", {"embed": "decoder_embed", "norm": "decoder_norm", "head": "decoder_pred"}),
        *pairs(block, theirs, {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}),
        *pairs(block, theirs, attention),
    ]


@dataclass(frozen=True)
class Published:
    """Encoder and decoder as a published file has them."""

    model: MaskedModel
    outputs: int
    """Numbers predicted for every token."""
    state: State
    """By the names of :class:`MaskedImageModel`, float32."""

    def build(self) -> MaskedImageModel:
        """The model, on the CPU."""
        model = self.model.build(outputs=self.outputs)
        model.load_state_dict(self.state)
        return model


def from_published(
    state: Mapping[str, Tensor],
    *,
    source: str,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Published:
    """A published pretraining state as ours; its sizes and outputs are read from the shapes.

    Args:
        state: by the published names.
        source: for messages.
        heads: of the encoder; without it one per 64 channels, and 16 for ViT-H.
        decoder_heads: without it one per 32 channels.

    Raises:
        InputError: if it is of another kind or incomplete.
    """
    state = {name: tensor.float() for name, tensor in state.items()}
    encoder = encoder_of_state(state, source=source, heads=heads)
    if "mask_token" not in encoder.rest:
        raise InputError(
            f"{source} has an encoder but no decoder; as a start for fine-tuning it can be used, "
            "for pretraining it cannot"
        )
    ours = our_names({n: t for n, t in state.items() if n not in _TABLES}, source=source)
    if "decoder.head.weight" not in ours:
        raise InputError(f"{source} has a decoder without decoder_pred; it is incomplete")
    model = MaskedModel(
        image=replace(encoder.tower, positions="sincos"), decoder=_decoder_of(ours, decoder_heads)
    )
    _check_tables(state, model, source)
    published = Published(model, len(ours["decoder.head.weight"]), ours)
    _check_whole(published, source)
    return published


def our_names(state: Mapping[str, Tensor], *, source: str) -> State:
    """What belongs to the trained parameters (values, moments) under our names and in our shapes.

    Raises:
        InputError: if a name is unknown.
    """
    theirs = {n: t for n, t in state.items() if n.startswith(("decoder_", "mask_token"))}
    encoder = from_timm({n: t for n, t in state.items() if n not in theirs}, _ANY)
    both = {name: match for name in theirs if (match := _KV.fullmatch(name))}
    decoder = read_names(
        {name: t for name, t in theirs.items() if name not in both},
        _decoder_rules("prompting" if both else "plain"),
        source=source,
    )
    for leaf in ("weight", "bias"):
        found = {int(m[1]): theirs[name] for name, m in both.items() if m[2] == leaf}
        if found and sorted(found) == list(range(len(found))):
            decoder[f"kv_{leaf}"] = torch.stack([found[number] for number in sorted(found)])
    ours = {f"image.{name}": tensor for name, tensor in encoder.items()}
    return ours | {f"decoder.{name}": tensor for name, tensor in decoder.items()}


def _decoder_of(state: State, heads: int | None) -> DecoderConfig:
    width = state["decoder.mask_token"].shape[-1]
    blocks = {name.split(".")[2] for name in state if name.startswith("decoder.blocks.")}
    return DecoderConfig(
        kind="prompting" if "decoder.kv_weight" in state else "plain",
        width=width,
        depth=max(len(blocks), 1),
        heads=heads or max(width // _HEAD_WIDTH, 1),
    )


def _check_tables(state: State, model: MaskedModel, source: str) -> None:
    """The stored tables must be those that are computed here."""
    for name, tower in zip(_TABLES, (model.image, model.decoder.tower(model.image)), strict=True):
        stored, computed = state.get(name), image_table(tower)
        if stored is None:
            raise InputError(f"{source} has no {name}; it is incomplete")
        same_shape = stored.shape == computed.shape
        distance = float((stored - computed).abs().max()) if same_shape else torch.inf
        if distance > _MOST_ROUNDING:
            raise InputError(
                f"the position table {name} of {source} is not the fixed one of sines and cosines "
                "that a masked autoencoder has; only its encoder can be used, for fine-tuning"
            )
        if distance > 1e-5:
            logging.getLogger("frugal").warning(
                "the position table %s of %s is up to %.2g away from the computed one, which "
                "takes its place", name, source, distance,
            )  # fmt: skip


def _check_whole(published: Published, source: str) -> None:
    with torch.device("meta"):
        wanted = MaskedImageModel(published.model, outputs=published.outputs).state_dict()
    for name, tensor in wanted.items():
        found = published.state.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "is missing" if found is None else f"has the shape {tuple(found.shape)}"
            raise InputError(
                f"{source} does not hold a whole masked autoencoder: {name} {shape}, needed is "
                f"{tuple(tensor.shape)}"
            )
    if surplus := sorted(published.state.keys() - wanted.keys()):
        raise InputError(f"{source} holds {surplus[0]} besides, which no such model has")


def to_published(state: Mapping[str, Tensor], model: MaskedModel) -> State:
    """The state of a :class:`MaskedImageModel` under the published names, in their order."""
    theirs = _published_names(state, model)
    theirs["pos_embed"] = image_table(model.image)
    theirs["decoder_pos_embed"] = image_table(model.decoder.tower(model.image))
    return {name: theirs[name] for name in _published_order(model, theirs)}


def _published_names(state: Mapping[str, Tensor], model: MaskedModel) -> State:
    """The inverse of :func:`our_names`."""
    image = {n.removeprefix("image."): t for n, t in state.items() if n.startswith("image.")}
    theirs = {n: t for n, t in to_timm(image, model.image).items() if n != "pos_embed"}
    decoder = {n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")}
    stacked = {name: decoder.pop(name) for name in ("kv_weight", "kv_bias") if name in decoder}
    theirs |= write_names(decoder, _decoder_rules(model.decoder.kind), target="a published file")
    for name, tensor in stacked.items():
        for number, part in enumerate(tensor):
            leaf = name.removeprefix("kv_")
            theirs[f"decoder_blocks.{number}.attn.kv.{leaf}"] = part.clone()
    return theirs


def _published_order(model: MaskedModel, names: Mapping[str, Any]) -> list[str]:
    """The names in the order in which the published model registers its parameters."""
    attention = ("attn.qkv", "attn.q", "attn.kv", "attn.proj")
    layers = ("norm1", *attention, "norm2", "mlp.fc1", "mlp.fc2")
    modules = ["patch_embed.proj"]
    modules += [f"blocks.{i}.{layer}" for i in range(model.image.depth) for layer in layers]
    modules += ["norm", "decoder_embed"]
    modules += [
        f"decoder_blocks.{i}.{layer}" for i in range(model.decoder.depth) for layer in layers
    ]
    modules += ["decoder_norm", "decoder_pred"]
    every = [*_FIRST, *(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))]
    return [name for name in every if name in names]


# ------------------------------------------------------------------------------------------------
# AdamW's state


def from_published_moments(
    optimizer: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str
) -> tuple[dict[str, State], int]:
    """The moments of a published file by kind and our names, and how many steps they are of.

    Args:
        optimizer: what torch's AdamW saved, parameters counted without names.
        state: the model's, by the published names in the published order.
        source: for messages.

    Raises:
        InputError: if there are not as many parameters, or they have other shapes.
    """
    names = _counted(state)
    per_number = optimizer.get("state", {})
    kinds: dict[str, State] = {"exp_avg": {}, "exp_avg_sq": {}}
    steps = set()
    for number, name in enumerate(names):
        found = per_number.get(number)
        if found is None or found["exp_avg"].shape != state[name].shape:
            raise InputError(
                f"the optimizer of {source} does not belong to its model: number {number} should "
                f"be {name} of the shape {tuple(state[name].shape)}"
            )
        steps.add(int(found["step"]))
        for kind, tensors in kinds.items():
            tensors[name] = found[kind].float()
    if len(per_number) != len(names) or len(steps) != 1:
        raise InputError(
            f"the optimizer of {source} has {len(per_number)} parameters at {len(steps)} counts of "
            f"steps where its model has {len(names)} at one"
        )
    return {kind: our_names(part, source=source) for kind, part in kinds.items()}, steps.pop()


def to_published_moments(
    moments: Mapping[str, State], model: MaskedModel, *, updates: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The inverse of :func:`from_published_moments`.

    Args:
        moments: ``exp_avg`` and ``exp_avg_sq`` by our names.
        model: encoder and decoder.
        updates: steps they are of.
        settings: of both groups, such as ``lr``; ``weight_decay`` is the second group's.
    """
    named = {kind: _published_names(part, model) for kind, part in moments.items()}
    ordered = {n: named["exp_avg"][n] for n in _published_order(model, named["exp_avg"])}
    names = _counted(ordered)
    split = sum(_has_no_decay(name, ordered[name]) for name in names)
    groups = [
        {**settings, "weight_decay": 0.0, "params": list(range(split))},
        {**settings, "params": list(range(split, len(names)))},
    ]
    state = {
        number: {"step": torch.tensor(float(updates))} | {k: named[k][name] for k in named}
        for number, name in enumerate(names)
    }
    return {"state": state, "param_groups": groups}


def _has_no_decay(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 1 or name.endswith(".bias")


def _counted(state: Mapping[str, Tensor]) -> list[str]:
    """The trained parameters in the order in which the published optimizer counts them."""
    names = [name for name in state if name not in _TABLES]
    return sorted(names, key=lambda name: not _has_no_decay(name, state[name]))
