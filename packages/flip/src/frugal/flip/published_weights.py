"""FLIP's published flax parameters under our names, and back.

Names are the paths of the flax tree, joined by slashes. The tree keeps the fixed sin-cos table
of the images as if it were a parameter, with a row of zeros for the class token.

Both directions go through :func:`flax_views`: our tensors, seen as the tree. What reads an archive
writes through such views, so that no array of it is ever held beside the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.flax_names import flax_blocks, flax_norm
from frugal.common.models.vit import image_table
from frugal.common.models.weight_names import Rule, State

IMAGE_TABLE = "img_encoder/posembed_encoder/pos_embedding"
"""(1, 1 + N, D): no parameter of ours, which compute it."""
LOGIT_SCALE = "logit_scale"
"""Missing from trees that were trained with a fixed temperature."""
_PATCH_KERNEL = "img_encoder/embedding/kernel"
_TEXT_TABLE = "txt_encoder/posembed_encoder/pos_embedding"
_TOKEN_TABLE = "txt_encoder/token_embedding/embedding"
_IMAGE_HEAD = "img_mlp1/kernel"
_BLOCK = "{tower}/Transformer/encoderblock_{i:02d}"
_MLP_KERNEL = "MlpBlock_0/Dense_0/kernel"


def _tower(ours: str, theirs: str) -> list[Rule]:
    return [
        *flax_blocks(ours, f"{theirs}/Transformer/encoderblock_{{i:02d}}"),
        *flax_norm(f"{ours}.norm", f"{theirs}/Transformer/encoder_norm"),
    ]


_RULES = (
    Rule("image.patch_embed.weight", _PATCH_KERNEL),  # reshaped below
    Rule("image.patch_embed.bias", "img_encoder/embedding/bias"),
    Rule("image.cls_token", "img_encoder/cls"),
    *_tower("image", "img_encoder"),
    Rule("image.projection.weight", _IMAGE_HEAD, "transposed"),
    Rule("text.token_embedding.weight", _TOKEN_TABLE),
    Rule("text.pos_embed", _TEXT_TABLE),
    *_tower("text", "txt_encoder"),
    Rule("text.projection.weight", "txt_mlp1/kernel", "transposed"),
    Rule("logit_scale", LOGIT_SCALE),
)


def empty_state(config: DualEncoderConfig, *, device: str = "cpu") -> State:
    """Our ``DualEncoder``'s tensors by name, float32 and not yet filled (``meta``: shapes only)."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DualEncoder(config).state_dict().items()}
    return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}


def flax_views(state: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """Our tensors as FLIP's tree sees them: views, so that what is written there is written here.

    The image's fixed position table, which is none of our tensors, is not among them.

    Raises:
        InputError: if the tree has no place for one of our tensors.
    """
    views, left = {}, set(state)
    for rule in _RULES:
        depth = max(config.image.depth, config.text.depth) if "{i}" in rule.ours else 1
        for block in range(depth):
            name = rule.ours.format(i=block)
            if name not in left:
                continue
            left.remove(name)
            parts = state[name].chunk(len(rule.their_names))
            for theirs, part in zip(rule.their_names, parts, strict=True):
                views[theirs.format(i=block)] = part.T if rule.shape == "transposed" else part
    if left:
        raise InputError(
            f"FLIP's flax tree has no place for {min(left)!r}; it is of another kind of model"
        )
    if _PATCH_KERNEL in views:
        side = config.image.patch_size
        pixels = views[_PATCH_KERNEL].unflatten(1, (3, side, side))  # (D, 3, p, p)
        views[_PATCH_KERNEL] = pixels.permute(2, 3, 1, 0)  # (p, p, 3, D)
    return views


def check_names(
    found: Mapping[str, tuple[int, ...]], views: Mapping[str, Tensor], *, source: str
) -> None:
    """Refuse a tree that lacks a parameter or has it in another shape; others may be there.

    Args:
        found: shapes by name.
        views: what is wanted, as :func:`flax_views` gives it.
        source: begins the sentence.

    Raises:
        InputError: naming the first parameter that is missing or does not fit.
    """
    for name, view in views.items():
        if name not in found:
            raise InputError(f"{source} has no {name}; it is incomplete, or of another model")
        # a scalar may have been saved without its one dimension
        if found[name] != tuple(view.shape) and (found[name] or view.numel() != 1):
            raise InputError(
                f"{source} holds {name} of shape {found[name]} where the model needs "
                f"{tuple(view.shape)}; it is of another model"
            )


def check_image_table(table: Tensor, config: DualEncoderConfig, *, source: str) -> None:
    """Refuse weights of a model whose (1, 1 + N, D) position table is not the one we compute.

    Raises:
        InputError: if the grid is another, or the table is no sin-cos table.
    """
    expected = image_table(config.image)
    if table[:, 1:].shape != expected.shape or (table[:, 1:] - expected).abs().max() > 1e-4:
        raise InputError(
            f"{source} was trained on another grid than "
            f"{config.image.grid[0]}x{config.image.grid[1]} patches; set image.image_size and "
            "image.patch_size to its own"
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
    source = "the FLIP checkpoint"
    if IMAGE_TABLE in params:
        check_image_table(params[IMAGE_TABLE], config, source=source)
    state = empty_state(config)
    if LOGIT_SCALE not in params:
        del state["logit_scale"]
    views = flax_views(state, config)
    if unknown := sorted(params.keys() - views.keys() - {IMAGE_TABLE}):
        raise InputError(
            f"{source} holds {unknown[0]!r}, which no tower of ours has; it was made by another "
            "kind of model"
        )
    check_names({name: tuple(value.shape) for name, value in params.items()}, views, source=source)
    for name, view in views.items():
        view.copy_(params[name].reshape(view.shape))
    return state


def to_flax(state: Mapping[str, Tensor], config: DualEncoderConfig) -> State:
    """The inverse of :func:`from_flax`, the image's fixed position table included."""
    params = {name: view.contiguous() for name, view in flax_views(state, config).items()}
    table = image_table(config.image)
    params[IMAGE_TABLE] = torch.cat((table.new_zeros(1, 1, config.image.width), table), dim=1)
    return params


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the shapes of a tree tell of its model: everything but the heads and the options."""

    image_width: int
    image_depth: int
    image_mlp_width: int
    patch_size: int
    image_size: int
    text_width: int
    text_depth: int
    text_mlp_width: int
    vocabulary: int
    text_length: int
    embed_dim: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """Width, depth and MLP width of both towers, which tell published models apart."""
        return (
            self.image_width, self.image_depth, self.image_mlp_width,
            self.text_width, self.text_depth, self.text_mlp_width,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"image tower {self.image_width} wide, {self.image_depth} blocks, patches of "
            f"{self.patch_size}; text tower {self.text_width} wide, {self.text_depth} blocks"
        )


def sizes_of_config(config: DualEncoderConfig) -> Sizes:
    """The sizes of a model of ours for square images."""
    image, text = config.image, config.text
    return Sizes(
        image_width=image.width,
        image_depth=image.depth,
        image_mlp_width=image.mlp_width,
        patch_size=image.patch_size,
        image_size=image.height_width[0],
        text_width=text.width,
        text_depth=text.depth,
        text_mlp_width=text.mlp_width,
        vocabulary=text.vocabulary,
        text_length=text.length,
        embed_dim=config.embed_dim,
    )


def sizes_of_tree(shapes: Mapping[str, tuple[int, ...]], *, source: str) -> Sizes:
    """The sizes of the model whose parameters have these shapes.

    Args:
        shapes: by slash-joined path.
        source: begins the sentence of a refusal.

    Raises:
        InputError: if it is no FLIP model, or one of another kind of image.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dimensions:
            what = "has no" if found is None else f"has the shape {found} for"
            raise InputError(
                f"{source} {what} {name}; it is incomplete, or not one of FLIP's models"
            )
        return found

    rows, columns, channels, image_width = shape(_PATCH_KERNEL, 4)
    patches = shape(IMAGE_TABLE, 3)[1] - 1
    side = math.isqrt(max(patches, 0))
    if rows != columns or channels != 3 or side < 1 or side**2 != patches:
        raise InputError(
            f"{source} is of a model for {patches} patches of {rows}x{columns} pixels in "
            f"{channels} channels; only square color images in square patches are converted"
        )
    vocabulary, text_width = shape(_TOKEN_TABLE, 2)
    depth = {tower: _depth(shapes, tower, source) for tower in ("img_encoder", "txt_encoder")}
    mlp_width = {
        tower: shape(f"{_BLOCK.format(tower=tower, i=0)}/{_MLP_KERNEL}", 2)[1] for tower in depth
    }
    return Sizes(
        image_width=image_width,
        image_depth=depth["img_encoder"],
        image_mlp_width=mlp_width["img_encoder"],
        patch_size=rows,
        image_size=side * rows,
        text_width=text_width,
        text_depth=depth["txt_encoder"],
        text_mlp_width=mlp_width["txt_encoder"],
        vocabulary=vocabulary,
        text_length=shape(_TEXT_TABLE, 3)[1],
        embed_dim=shape(_IMAGE_HEAD, 2)[1],
    )


def _depth(shapes: Mapping[str, tuple[int, ...]], tower: str, source: str) -> int:
    """Blocks of a tower, none of which may be missing."""
    prefix = _BLOCK.partition("{i")[0].format(tower=tower)
    numbers = {
        int(number)
        for name in shapes
        if name.startswith(prefix)
        and (number := name.removeprefix(prefix).partition("/")[0]).isdecimal()
    }
    for block in range(max(numbers, default=0)):
        if block not in numbers:
            raise InputError(
                f"{source} has no {_BLOCK.format(tower=tower, i=block)} but later ones; it is "
                "incomplete"
            )
    return len(numbers)


def config_of_sizes(
    sizes: Sizes, like: DualEncoderConfig, *, image_heads: int, text_heads: int
) -> DualEncoderConfig:
    """A model of the given sizes and heads, in everything else like another one.

    Raises:
        InputError: if widths and heads do not go together.
    """
    return replace(
        like,
        image=replace(
            like.image,
            width=sizes.image_width,
            depth=sizes.image_depth,
            heads=image_heads,
            mlp_width=sizes.image_mlp_width,
            patch_size=sizes.patch_size,
            image_size=sizes.image_size,
        ),
        text=replace(
            like.text,
            width=sizes.text_width,
            depth=sizes.text_depth,
            heads=text_heads,
            mlp_width=sizes.text_mlp_width,
            vocabulary=sizes.vocabulary,
            length=sizes.text_length,
        ),
        embed_dim=sizes.embed_dim,
    )
