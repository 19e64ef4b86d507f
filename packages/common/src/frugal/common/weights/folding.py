"""Parts of a tower that a library lacks, moved into parts that it has; the function stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.vit import ImageTower, image_table
from frugal.common.models.weight_names import State


def fold_patch_bias(
    state: Mapping[str, Tensor], config: DualEncoderConfig
) -> tuple[State, DualEncoderConfig]:
    """The bias of the patch projection as a part of the positions, which are added right after it.

    Returns:
        State and config of the same function with ``patch_bias`` off and learned positions.
    """
    prefix = "image."
    image = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    image, tower = fold_patch_bias_of_tower(image, config.image)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    folded = rest | {f"{prefix}{name}": tensor for name, tensor in image.items()}
    return folded, replace(config, image=tower)


def fold_patch_bias_of_tower(
    state: Mapping[str, Tensor], tower: ImageTower
) -> tuple[State, ImageTower]:
    """:func:`fold_patch_bias` for the state of an ``ImageTransformer``."""
    state = dict(state)
    if not tower.patch_bias:
        return state, tower
    fixed = tower.positions != "learned"
    table = (image_table(tower) if fixed else state["pos_embed"]).clone()
    table[:, -tower.num_patches :] += state.pop("patch_embed.bias")
    state["pos_embed"] = table
    return state, replace(tower, patch_bias=False, positions="learned")


def fold_layer_scale(
    state: Mapping[str, Tensor], config: DualEncoderConfig
) -> tuple[State, DualEncoderConfig]:
    """The layer scales as factors on the rows of the projections whose output they multiply.

    Returns:
        State and config of the same function without ``layer_scale``.
    """
    return fold_layer_scales(state), replace(
        config,
        image=replace(config.image, layer_scale=None),
        text=replace(config.text, layer_scale=None),
    )


def fold_layer_scales(state: Mapping[str, Tensor]) -> State:
    """:func:`fold_layer_scale` for the state of any towers."""
    state = dict(state)
    for name in [name for name in state if name.endswith(".gamma")]:
        block, scale, _ = name.rsplit(".", 2)
        projection = f"{block}.{'attn.proj' if scale == 'ls1' else 'mlp.fc2'}"
        gamma = state.pop(name)
        state[f"{projection}.weight"] = gamma[:, None] * state[f"{projection}.weight"]
        state[f"{projection}.bias"] = gamma * state[f"{projection}.bias"]
    return state
