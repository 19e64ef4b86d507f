"""Image towers among the tensors of a file that says nothing else.

OpenAI's CLIP saved again, open_clip, SLIP, and plain vision transformers in timm's layout, among
them DINO, MAE and MILAN with or without decoder or head: names and shapes say what they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from frugal.common.errors import InputError
from frugal.common.models.blocks import Activation
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD, ImageTower, image_table
from frugal.common.models.weight_names import from_timm
from frugal.common.weights import open_clip, openai
from frugal.common.weights.encoder_config import encoder_of_shapes, tower_bundle
from frugal.common.weights.files import (
    State,
    part_with,
    read_content,
    read_weights,
    state_in,
    without_prefix,
)
from frugal.common.weights.library import Library, elsewhere

_LOG = logging.getLogger("frugal")
_NAME = "a file of weights"
_LANDMARK = "patch_embed.proj.weight"
"""A name that every vision transformer in timm's layout has."""
_TABLE_TOLERANCE = 1e-5
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".index.json")
_BESIDE_THE_ENCODER = re.compile(r"(decoder|head|fc_norm)[._].*|mask_token")
_UNSAID = ("heads", "activation", "norm_epsilon", "mean", "std")
"""What the weights of CLIP's image towers do not say, unless OpenAI's numbers are beside them."""
_UNSAID_POOLING = ("pooling", "norm_after_pooling")
"""What those of plain vision transformers do not say either."""
_LANDMARKS = (
    "visual.conv1.weight", "visual.patch_embed.proj.weight", "patch_embed.proj.weight",
)  # fmt: skip
"""Names by which the towers that are known here are recognized."""


def knows(path: Path, name: str | None) -> bool:
    """A file of tensors that no library says more of."""
    return path.is_file() and (name is not None or path.name.endswith((*_ENDINGS, ".npz")))


def load(path: Path, name: str | None, key: str | None) -> ModelBundle:
    """The model of a file: OpenAI's by its numbers, else an image tower in timm's layout.

    Raises:
        InputError: if it cannot be read, or does not say what it holds.
    """
    if name is not None:
        return open_clip.load(path, name, key)  # which says what there is
    if not path.name.endswith(_ENDINGS):
        raise InputError(f"{path} is no file of weights that is known here{elsewhere()}")
    state = read_weights(path, key=key)
    if openai.is_openai(state):
        return openai.of_state(part_with(state, "logit_scale", source=path), path)
    if any(name.endswith("text_projection") for name in state):
        raise InputError(
            f"{path} does not say which model its weights are of; give --model with open_clip's "
            f"name of it, such as ViT-B-16, or --model {openai.NAME} for a file of OpenAI's"
        )
    state = part_with(state, _LANDMARK, source=str(path))
    if _LANDMARK not in state:
        raise InputError(
            f"{path} does not say which model its weights are of, the first of them "
            f"{min(state)!r}; give --model with open_clip's or timm's name of it{elsewhere()}"
        )
    return tower_bundle(_whole(path, state), path=path, library=_NAME)


def _whole(path: Path, stored: State) -> ImageEncoder:
    """A file in timm's layout, every bit of its table, with the norm of what it pools."""
    state = _float32(stored)
    encoder = encoder_of_state(state, source=str(path))
    if encoder.tower.positions != "learned":  # nearly so, perhaps; here every bit stays
        tower = replace(encoder.tower, positions="learned")
        encoder = replace(
            encoder, tower=tower, state={**encoder.state, "pos_embed": state["pos_embed"]}
        )
    if "norm.weight" in encoder.state or "fc_norm.weight" not in encoder.rest:
        return encoder
    last = {f"norm.{leaf}": encoder.rest[f"fc_norm.{leaf}"] for leaf in ("weight", "bias")}
    return replace(
        encoder,
        tower=replace(encoder.tower, pooling="mean", norm_after_pooling=True),
        state={**encoder.state, **last},
        rest={n: t for n, t in encoder.rest.items() if not n.startswith("fc_norm.")},
    )


def _float32(state: State) -> State:
    return {n: t.float() if t.is_floating_point() else t for n, t in state.items()}


# ------------------------------------------------------------------------------------------------
# An image tower, whatever it is a part of


def encoder_of_file(
    path: Path, *, activation: Activation | None = None, heads: int | None = None
) -> ImageEncoder:
    """The image tower of a file, in float32; what the file does not say is guessed.

    Args:
        path: the file.
        activation: of its blocks, where it is not to be guessed.
        heads: attention heads, where they are not to be guessed.

    Raises:
        InputError: if it cannot be read, or holds no tower of a known kind.
    """
    content = read_content(path)
    stored = _one_tower(state_in(content, source=str(path)), str(path))
    state = _float32(stored)
    if "visual.conv1.weight" in state:
        keeps_training = isinstance(content, Mapping) and bool(
            {"epoch", "optimizer"} & content.keys()
        )
        is_openai = _is_openai(stored, named=path.name, keeps_training=keeps_training)
        chosen = activation or ("quick_gelu" if is_openai else "gelu")
        if activation is None:
            _LOG.info(
                "%s is taken for %s model, whose activation is %s",
                path, "OpenAI's" if is_openai else "open_clip's", chosen,
            )  # fmt: skip
        encoder = encoder_of_shapes(
            openai.visual_state(state, source=str(path)),
            str(path),
            patch_size=state["visual.conv1.weight"].shape[-1],
            heads=heads,
            activation=chosen,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            norm_epsilon=1e-5,
        )
        unsaid: tuple[str, ...] = () if openai.is_openai(stored) else _UNSAID
    else:
        encoder = encoder_of_state(
            state, activation=activation or "gelu", heads=heads, source=str(path)
        )
        unsaid = (*_UNSAID, *_UNSAID_POOLING)
    given = {"activation": activation, "heads": heads}
    return replace(encoder, guessed=tuple(name for name in unsaid if given.get(name) is None))


def _one_tower(state: State, source: str) -> State:
    """The tensors of the one model in a file that has an image tower of a known kind."""
    if any(landmark in state for landmark in _LANDMARKS):
        return state
    for landmark in _LANDMARKS:
        inner = part_with(state, landmark, source=source)
        if inner is not state:
            return inner
    if {"conv1.weight", "class_embedding"} <= state.keys():  # CLIP's image tower alone
        return {f"visual.{name}": tensor for name, tensor in state.items()}
    inner = part_with(state, "class_embedding", source=source)
    return state if inner is state else _one_tower(inner, source)


def _is_openai(stored: State, *, named: str, keeps_training: bool) -> bool:
    """Whether a CLIP state is OpenAI's; open_clip's has the same names and another activation."""
    if openai.is_openai(stored) or stored["visual.conv1.weight"].dtype == torch.float16:
        return True
    return not (keeps_training or named in open_clip.WEIGHTS)


def encoder_of_state(
    state: State, *, source: str, activation: Activation = "gelu", heads: int | None = None
) -> ImageEncoder:
    """The encoder among float32 tensors of DINO, MAE, MILAN and timm; SLIP's visual part.

    Raises:
        InputError: if there is none.
    """
    projection = state.get("image_projection")
    if "visual.patch_embed.proj.weight" in state:
        state = without_prefix(state, "visual.")
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4 or "blocks.0.attn.qkv.weight" not in state:
        raise InputError(
            f"{source} is not an image encoder of a known kind: it holds "
            f"{next(iter(sorted(state)))!r} and no patch projection with blocks behind it"
        )
    rest = {name: t for name, t in state.items() if _BESIDE_THE_ENCODER.fullmatch(name)}
    tensors = {name: tensor for name, tensor in state.items() if name not in rest}
    like = ImageTower(width=4, depth=1, heads=1, mlp_width=4, patch_size=1, image_size=1)
    named = from_timm(tensors, like)
    if projection is not None:
        named["projection.weight"] = projection.T.contiguous()
    side = kernel.shape[-1]
    encoder = encoder_of_shapes(named, source, patch_size=side, heads=heads, activation=activation)
    return with_fixed_table(replace(encoder, rest=rest))


def with_fixed_table(weights: ImageEncoder) -> ImageEncoder:
    """A position table that is that of a masked autoencoder is computed again."""
    if weights.tower.width % 4 or weights.tower.class_token != "with_position":
        return weights
    fixed = replace(weights.tower, positions="sincos")
    distance = (weights.state["pos_embed"] - image_table(fixed)).abs().max()
    if distance <= _TABLE_TOLERANCE:
        kept = {name: t for name, t in weights.state.items() if name != "pos_embed"}
        return replace(weights, tower=fixed, state=kept)
    if "mask_token" in weights.rest:
        _LOG.warning(
            "the position table of %s is up to %.2g away from the fixed one of a masked "
            "autoencoder; it is kept as it is", weights.source, distance,
        )  # fmt: skip
    return weights


LIBRARY = Library(name=_NAME, knows=knows, load=load)
