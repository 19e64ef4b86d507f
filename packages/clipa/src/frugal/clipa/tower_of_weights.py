"""The towers that published weights belong to: what a name says, what shapes and tables tell."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from frugal.clipa.named_models import clipa_v1_encoder, named_model
from frugal.clipa.published_weights import Published
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.named import SIZES, clipa_encoder
from frugal.common.models.positions import ImagePositions, sincos_table
from frugal.common.models.vit import ImagePooling, ImageTower
from frugal.common.models.weight_names import State

_TABLE = "image.pos_embed"
_FIXED: tuple[ImagePositions, ...] = ("sincos_bigvision", "sincos")
_SAME_TABLE = 1e-4
"""Largest difference of a fixed table from what we compute; the JAX code computes it in float32."""


def fit_towers(
    published: Published,
    *,
    name: str | None,
    image_size: int | tuple[int, int] | None,
    image_pooling: ImagePooling | None,
    heads: tuple[int, int] | None,
    as_in_open_clip: bool,
    source: str,
) -> tuple[DualEncoderConfig, State]:
    """The towers, and the weights that they take.

    Args:
        published: weights of a file.
        name: of the towers; None for what the shapes tell.
        image_size: in pixels; None for that of the name, of the position table, or 224.
        image_pooling: None for what this kind of tower pools as published.
        heads: of both towers; None for those of the file or of the published widths.
        as_in_open_clip: epsilon, GELU and learned positions of open_clip's configurations.
        source: begins a refusal.

    Raises:
        InputError: if the weights do not belong to such towers.
    """
    state = dict(published.state)
    if name is not None:
        model = named_model(name, as_in_open_clip=as_in_open_clip)
    else:
        model = _towers_of_shapes(
            state, heads or published.heads, as_in_open_clip=as_in_open_clip, source=source
        )
    image = model.image
    if image_size is not None:
        image = replace(image, image_size=image_size)
    elif name is None and _TABLE in state:
        image = replace(image, image_size=_square_side(state[_TABLE], source) * image.patch_size)
    if image_pooling is not None:
        image = replace(image, pooling=image_pooling, norm_after_pooling=image_pooling != "class")
    image = replace(image, positions=_positions(state, image, as_in_open_clip=as_in_open_clip))
    if image.positions == "learned" and _TABLE not in state:
        # an npz for the configuration of open_clip, whose table is a parameter
        state[_TABLE] = sincos_table(image.grid, image.width, _FIXED[0], class_row=True)[None]
    elif image.positions != "learned":
        state.pop(_TABLE, None)
    model = replace(model, image=image)
    _check_shapes(state, model, source)
    wanted = (model.image.heads, model.text.heads)
    if published.heads not in (None, wanted):
        raise InputError(
            f"{source} has {published.heads} attention heads where the towers have {wanted}; it "
            "is of another model: check --model and --heads"
        )
    return model, state


def _positions(state: State, image: ImageTower, *, as_in_open_clip: bool) -> ImagePositions:
    """Fixed where the file has no table or one that can be computed, else learned."""
    if as_in_open_clip:
        return "learned"
    if _TABLE not in state:
        return _FIXED[0]
    table = state[_TABLE][0]
    for flavour in _FIXED:
        fixed = sincos_table(image.grid, image.width, flavour, class_row=True)
        if table.shape == fixed.shape and (table - fixed).abs().max() < _SAME_TABLE:
            return flavour
    return "learned"


def _towers_of_shapes(
    state: State, heads: tuple[int, int] | None, *, as_in_open_clip: bool, source: str
) -> DualEncoderConfig:
    """Towers whose kind a norm before the blocks tells, and whose sizes the shapes do."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = state.get(name)
        if found is None or found.ndim != dimensions:
            raise InputError(
                f"{source} holds no {name} of {dimensions} dimensions under any name; it is "
                "incomplete, or not one of CLIPA's models"
            )
        return tuple(found.shape)

    width, pixels = shape("image.patch_embed.weight", 2)
    vocabulary, text_width = shape("text.token_embedding.weight", 2)
    is_first_version = "image.norm_pre.weight" in state
    if is_first_version and as_in_open_clip:
        raise InputError(
            f"{source} is of CLIPA's first version, which is the same in open_clip as it was "
            "trained; leave out --as-in-open-clip"
        )
    if is_first_version:
        # B/16, the only published one of this width, pools its class token
        like = clipa_v1_encoder("B/16", class_pooling=width == SIZES["B"][0].width)
    else:
        like = clipa_encoder("B/16", as_in_open_clip=as_in_open_clip)
    patch_size = math.isqrt(pixels // 3)
    grid_size = max(224 // patch_size, 1)
    return replace(
        like,
        image=replace(
            like.image,
            width=width,
            depth=_depth(state, "image"),
            heads=heads[0] if heads else _published_heads(width, 0, source),
            mlp_width=shape("image.blocks.0.mlp.fc1.weight", 2)[0],
            patch_size=patch_size,
            image_size=grid_size * patch_size,
        ),
        text=replace(
            like.text,
            width=text_width,
            depth=_depth(state, "text"),
            heads=heads[1] if heads else _published_heads(text_width, 1, source),
            mlp_width=shape("text.blocks.0.mlp.fc1.weight", 2)[0],
            vocabulary=vocabulary,
            length=shape("text.pos_embed", 3)[1],
        ),
        embed_dim=shape("image.projection.weight", 2)[0],
    )


def _depth(state: State, tower: str) -> int:
    prefix = f"{tower}.blocks."
    blocks = [name.split(".")[2] for name in state if name.startswith(prefix)]
    return 1 + max(map(int, blocks), default=0)


def _published_heads(width: int, tower: int, source: str) -> int:
    """Of the image (0) or text tower (1) with this width that was published."""
    towers = [(image, text)[tower] for image, text, _ in SIZES.values()]
    found = {size.heads for size in towers if size.width == width}
    if len(found) != 1:
        kind = ("image", "text")[tower]
        raise InputError(
            f"{source} does not say how many attention heads its {kind} tower of width {width} "
            "has; give --heads, of the image and the text tower"
        )
    return found.pop()


def _square_side(table: Tensor, source: str) -> int:
    patches = table.shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if side < 1 or side**2 != patches:
        raise InputError(
            f"the position table of {source} has {table.shape[1]} rows, which are not those of a "
            "square image and a class token; give --image-size HEIGHT WIDTH"
        )
    return side


def _check_shapes(state: State, model: DualEncoderConfig, source: str) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in DualEncoder(model).state_dict().items()}
    for name, shape in wanted.items():
        if name not in state:
            raise InputError(
                f"{source} lacks what the towers call {name}; it is incomplete, or of another model"
            )
        if tuple(state[name].shape) != shape:
            raise InputError(
                f"{source} has {tuple(state[name].shape)} for {name} where the towers need "
                f"{shape}; it is of another model, grid or text length: check --model and "
                "--image-size"
            )
    if unknown := sorted(state.keys() - wanted.keys()):
        raise InputError(
            f"{source} holds {unknown[0]} besides what the towers have; it is of another model"
        )
