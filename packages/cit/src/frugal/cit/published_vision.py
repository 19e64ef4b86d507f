"""Vision transformers from the files that CiT starts from, and from all others that Frugal reads.

MoCo v3's checkpoints (the base encoder with its projector; momentum encoder and predictor are
left), SWAG's, timm's (AugReg), folders of such towers as CiT's released code converts them, the
vision part of a released CiT model, ViT folders of transformers, and what
:mod:`frugal.common.weights.image_towers` reads: CLIP, DINO, MAE, MILAN, runs of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import Rule, pairs, read_names, write_names
from frugal.common.weights.files import (
    State,
    part_with,
    read_weights,
    weights_in,
    without_prefix,
)
from frugal.common.weights.image_states import encoder_of_state
from frugal.common.weights.image_towers import read_encoder

KINDS = ("moco", "augreg", "swag")
"""What CiT's released code calls its three families of towers."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_OF_A_FAMILY = re.compile(
    r"(vision_model\.)?(moco|augreg|swag)\.|base_encoder\.|conv_proj\.|head\.7\.running_mean"
)
"""Names that only files of the three families have."""
_WIDE_HEADS = {1280: 16}
"""By width, where a head is not 64 wide: ViT-H."""


_UNSAID = (
    "heads", "activation", "norm_epsilon", "pooling", "norm_after_pooling", "mean", "std",
)  # fmt: skip
"""Fields of a tower that these files do not say; its shapes and kind make one think so."""


def read_vision(source: str | Path) -> ImageEncoder:
    """The image tower of a file, a folder, a name on the hub or a run, in float32.

    Raises:
        InputError: if there is none of a known kind, or the file is damaged.
    """
    path = Path(source)
    if path.is_file():
        state = read_weights(path)
        if any(_OF_A_FAMILY.match(name) for name in state):
            return vision_of_state(state, source=str(path))
        return read_encoder(path)
    about = path / "config.json"
    settings = read_json_object(about) if about.is_file() else {}
    if settings.get("model_type") in KINDS or is_released(settings):
        return vision_of_state(read_weights(weights_in(path, WEIGHT_FILES)), source=str(path))
    return replace(read_encoder(source), source=str(source))


def is_released(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a released CiT model."""
    vision = settings.get("vision_config")
    return isinstance(vision, Mapping) and vision.get("model_type") in KINDS


def vision_of_state(
    state: Mapping[str, Tensor], *, source: str, heads: int | None = None
) -> ImageEncoder:
    """The image tower among named tensors of one of the known layouts.

    Args:
        state: as a file holds it.
        source: for messages.
        heads: attention heads; without it one per 64 channels, and 16 for ViT-H.

    Raises:
        InputError: if there is none.
    """
    state = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    if any(name.startswith("vision_model.") for name in state):
        state = without_prefix(state, "vision_model.")
    for kind in KINDS:
        if any(name.startswith(f"{kind}.") for name in state):
            state = without_prefix(state, f"{kind}.")
    if "patch_embed.proj.weight" not in state:  # in MoCo's files there are two encoders
        state = part_with(state, "patch_embed.proj.weight", source=source)
    if "conv_proj.weight" in state or "encoder.pos_embedding" in state:
        return _swag(state, source, heads)
    found = replace(encoder_of_state(state, source=source, heads=heads), guessed=_UNSAID)
    projector = {
        f"projector.{name.removeprefix('head.')}": tensor
        for name, tensor in found.rest.items()
        if re.fullmatch(r"head\.\d\..*", name)
    }
    if not projector:
        return found
    try:
        hidden, outputs = len(projector["projector.0.weight"]), len(projector["projector.6.weight"])
    except KeyError as error:
        missing = error.args[0].replace("projector", "head")
        raise InputError(f"{source} has a projector without {missing}; it is incomplete") from None
    tower = replace(found.tower, projector_width=hidden, projector_outputs=outputs)
    return replace(found, tower=tower, state=found.state | projector)


# ------------------------------------------------------------------------------------------------
# SWAG

_BLOCK = "encoder.layers.layer_{i}."
_SWAG = (
    Rule("patch_embed.weight", "conv_proj.weight", "kernel"),
    Rule("patch_embed.bias", "conv_proj.bias"),
    Rule("cls_token", "class_token"),
    Rule("pos_embed", "encoder.pos_embedding"),
    Rule("blocks.{i}.attn.qkv.weight", f"{_BLOCK}self_attention.in_proj_weight"),
    Rule("blocks.{i}.attn.qkv.bias", f"{_BLOCK}self_attention.in_proj_bias"),
    *pairs(
        "blocks.{i}.",
        _BLOCK,
        {
            "norm1": "ln_1",
            "attn.proj": "self_attention.out_proj",
            "norm2": "ln_2",
            "mlp.fc1": "mlp.linear_1",
            "mlp.fc2": "mlp.linear_2",
        },
    ),
    *pairs("", "", {"norm": "encoder.ln"}),
)


def _swag(state: Mapping[str, Tensor], source: str, heads: int | None) -> ImageEncoder:
    kept = {name: t for name, t in state.items() if not name.startswith(("head.", "heads."))}
    ours = read_names(kept, _SWAG, source=source)
    try:
        kernel = state["conv_proj.weight"]
        ours["pos_embed"] = ours["pos_embed"].transpose(0, 1).contiguous()  # (seq, 1, D) there
        width, patches = kernel.shape[0], ours["pos_embed"].shape[1] - 1
        mlp_width = len(ours["blocks.0.mlp.fc1.weight"])
    except KeyError as error:
        raise InputError(f"{source} has no {error.args[0]}; it is no whole tower") from None
    side = round(patches**0.5)
    if side * side != patches:
        raise InputError(
            f"the position table of {source} has {patches + 1} rows, which are not those of a "
            "square grid and a class token"
        )
    numbers = [int(name.split(".")[1]) for name in ours if name.startswith("blocks.")]
    tower = ImageTower(
        width=width,
        depth=max(numbers) + 1,
        heads=heads or _WIDE_HEADS.get(width, max(width // 64, 1)),
        mlp_width=mlp_width,
        patch_size=kernel.shape[-1],
        image_size=kernel.shape[-1] * side,
    )
    return ImageEncoder(tower, ours, source, guessed=_UNSAID, align_corners=True)


def to_swag(state: Mapping[str, Tensor]) -> State:
    """The state of one of our towers, without projection, by SWAG's names."""
    theirs = write_names(state, _SWAG, target="SWAG's layout")
    theirs["encoder.pos_embedding"] = theirs["encoder.pos_embedding"].transpose(0, 1).contiguous()
    return theirs
