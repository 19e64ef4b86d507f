"""Parts of a tower that a library lacks, moved into parts that it has; the function stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from frugal.common.models.config import DualEncoderConfig
from frugal.common.models.positions import image_table
from frugal.common.models.weight_names import State


def fold_patch_bias(
    state: Mapping[str, Tensor], config: DualEncoderConfig
) -> tuple[State, DualEncoderConfig]:
    """The bias of the patch projection as a part of the positions, which are added right after it.

    Returns:
        State and config of the same function with ``patch_bias`` off and learned positions.
    """
    tower, state = config.image, dict(state)
    if not tower.patch_bias:
        return state, config
    fixed = tower.positions != "learned"
    table = (image_table(tower) if fixed else state["image.pos_embed"]).clone()
    table[:, -tower.num_patches :] += state.pop("image.patch_embed.bias")
    state["image.pos_embed"] = table
    return state, replace(config, image=replace(tower, patch_bias=False, positions="learned"))


def fold_layer_scale(
    state: Mapping[str, Tensor], config: DualEncoderConfig
) -> tuple[State, DualEncoderConfig]:
    """The layer scales as factors on the rows of the projections whose output they multiply.

    Returns:
        State and config of the same function without ``layer_scale``.
    """
    state = dict(state)
    for name in [name for name in state if name.endswith(".gamma")]:
        block, scale, _ = name.rsplit(".", 2)
        projection = f"{block}.{'attn.proj' if scale == 'ls1' else 'mlp.fc2'}"
        gamma = state.pop(name)
        state[f"{projection}.weight"] = gamma[:, None] * state[f"{projection}.weight"]
        state[f"{projection}.bias"] = gamma * state[f"{projection}.bias"]
    return state, replace(
        config,
        image=replace(config.image, layer_scale=None),
        text=replace(config.text, layer_scale=None),
    )
