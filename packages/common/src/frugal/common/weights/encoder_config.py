"""An image tower that another library trained: as a configuration, and as a model."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle, Source
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.positions import ImagePositions
from frugal.common.models.vit import ImageTower, image_table
from frugal.common.models.weight_names import State
from frugal.common.recipe import ModelConfig, ModelInputs, ObjectiveConfig, Recipe, model_of

_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""By width, where a head is not 64 wide: ViT-H, g and bigG."""
_ANY_SCALE = 1e-5
"""What layer scales start from is of no account where they are read."""
_USUAL = "the usual one, as a file of weights says nothing of it"


@dataclass(frozen=True, kw_only=True)
class ImportedEncoder(ModelConfig):
    """An image tower, and the linear layer on what it pools where it has one."""

    image: ImageTower
    num_classes: int | None = None
    """Numbers that the linear layer puts out; None without one."""

    @override
    def inputs(self) -> ModelInputs:
        """Images."""
        return ModelInputs(height_width=self.image.height_width, grid=self.image.grid)

    def build(self, generator: torch.Generator | None = None) -> nn.Sequential:
        """``image`` and ``head``, which weights are to be loaded into."""
        del generator  # nothing is drawn: such a model always comes with its weights
        parts: OrderedDict[str, nn.Module] = OrderedDict(image=self.image.module())
        if self.num_classes is not None:
            parts["head"] = nn.Linear(self.image.width, self.num_classes)
        return nn.Sequential(parts)


@dataclass(frozen=True, kw_only=True)
class TrainedElsewhere(ObjectiveConfig):
    """Stands where a recipe says what was minimized: nobody here did it, and nothing can go on."""

    def build(self, recipe: Recipe) -> Any:
        """What holds the model; it has no loss."""
        return nn.Sequential(OrderedDict(model=model_of(ImportedEncoder, recipe.model).build()))


def tower_bundle(
    encoder: ImageEncoder, *, path: Path, library: str, name: str | None = None
) -> ModelBundle:
    """An image tower that another library trained, on the CPU in float32, in evaluation mode.

    Args:
        encoder: the tower, and what was read beside it.
        path: where it was read.
        library: as its users call it.
        name: that its weights go by; without one, the library's.

    Raises:
        InputError: if the weights are not those of one whole tower.
    """
    state, rest, prepared = dict(encoder.state), dict(encoder.rest), encoder.preparation
    if "projection.weight" in state:  # into the space of texts that are not there
        rest["head.weight"] = state.pop("projection.weight")
    weight = rest.pop("head.weight", None)
    bias = rest.pop("head.bias", None)
    tower, state = with_computed_positions(encoder.tower, state, "pos_embed")
    if what := replace(encoder, tower=tower, state=state).misfit():
        raise InputError(f"{encoder.source} does not hold one whole image tower: {what}")
    named = {f"image.{name}": tensor.clone() for name, tensor in state.items()}
    if weight is not None:
        named["head.weight"] = weight.clone()
        named["head.bias"] = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    config = ImportedEncoder(image=tower, num_classes=None if weight is None else len(weight))
    model = config.build()
    model.load_state_dict(named)
    left_behind = tuple(sorted({name.split(".")[0] for name in rest}))
    return ModelBundle(
        model=model.eval(),
        config=config,
        image=tower,
        text=None,
        tokenizer_source=None,
        transform=encoder.transform if prepared is None else prepared.crop,
        source=Source(path=path, library=library, name=name or library, left_behind=left_behind),
        precision="auto",
        told_by=_USUAL if prepared is None else prepared.told_by,
    )


def with_computed_positions(
    tower: ImageTower, state: Mapping[str, Tensor], name: str
) -> tuple[ImageTower, State]:
    """The same, where a table of positions is bit for bit one that a tower can compute.

    Args:
        tower: with learned positions.
        state: weights, by any names.
        name: of the table among them.

    Returns:
        A tower that computes the table, and the weights without it.
    """
    table = state.get(name)
    if table is None or tower.width % 4 or tower.width < 8:
        return tower, dict(state)
    for kind in get_args(ImagePositions):
        computed = replace(tower, positions=kind)
        if kind != "learned" and torch.equal(image_table(computed), table):
            return computed, {n: t for n, t in state.items() if n != name}
    return tower, dict(state)


def encoder_of_shapes(
    state: State, source: str, *, patch_size: int, heads: int | None, **options: Any
) -> ImageEncoder:
    """The tower that weights under our names are of, by their shapes.

    Args:
        state: of an image tower with a class token and a square grid.
        source: for messages.
        patch_size: in pixels.
        heads: attention heads; without it one per 64 channels, and 16 for ViT-H, g and bigG.
        **options: of the tower, what shapes do not say.

    Raises:
        InputError: if something is missing, or the grid is no square.
    """
    try:
        width = state["cls_token"].shape[-1]
        rows = state["pos_embed"].shape[1]
        mlp_width = len(state["blocks.0.mlp.fc1.weight"])
    except KeyError as error:
        raise InputError(f"{source} holds no {error.args[0]}; it is no whole encoder") from None
    side = math.isqrt(rows - 1)
    if side * side != rows - 1:
        raise InputError(
            f"the position table of {source} has {rows} rows, which are not those of a square grid "
            "and a class token"
        )
    numbers = {int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))}
    heads = heads or _HEADS.get(width, max(width // 64, 1))
    tower = ImageTower(
        width=width,
        depth=max(numbers) + 1,
        heads=heads,
        mlp_width=mlp_width,
        patch_size=patch_size,
        image_size=patch_size * side,
        patch_bias="patch_embed.bias" in state,
        pre_norm="norm_pre.weight" in state,
        layer_scale=_ANY_SCALE if "blocks.0.ls1.gamma" in state else None,
        **options,
    )
    return ImageEncoder(tower, state, source)
