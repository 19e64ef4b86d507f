"""What a file or folder of another library holds, as a recipe and weights of this one."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.bundle import ModelBundle, Source
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.in_words import in_words
from frugal.common.models.positions import ImagePositions
from frugal.common.models.vit import ImageTower, image_table
from frugal.common.weights import timm_weights
from frugal.common.weights.encoder_config import ImportedEncoder
from frugal.common.weights.files import State, part_with, read_weights
from frugal.common.weights.image_towers import encoder_of_state, read_encoder
from frugal.common.weights.libraries import (
    OPEN_CLIP_CONFIG,
    OPENAI,
    Foreign,
    load_foreign,
    refuse_for_folder,
)
from frugal.common.weights.openai import is_openai
from frugal.common.weights.torchscript import is_torchscript

_TWO_TOWERS = ("clip", "siglip", "vision-text-dual-encoder")
_ONE_TOWER = ("clip_vision_model", "vit", "vit_mae")
"""By transformers' names."""

_LOG = logging.getLogger("frugal")
_NOT_SAID = "the usual one, as a file of weights says nothing of it"


def read(source: Path, *, name: str | None = None, key: str | None = None) -> ModelBundle:
    """The model of a file or folder that another library wrote.

    Args:
        source: the file or folder; no code in it is ever run.
        name: of the model, for a file that does not say what it holds.
        key: which of several sets of weights in a file.

    Raises:
        InputError: if there is none, it cannot be read, or it is of a kind that is not known here.
    """
    if not source.exists():
        raise InputError(f"there is no file or folder {source}; check the path")
    if name is not None and source.is_file() and _is_timm(name):
        found = timm_weights.read_named(name, source, key=key)
        return _encoder(found.weights, found.crop, source, "timm", name)
    if source.is_dir():
        return _folder(source, name, key)
    return _file(source, name, key)


def converters() -> list[str]:
    """The commands by which installed methods read the files of their releases."""
    names = {(about.metadata["Name"] or "").replace("-", "_") for about in distributions()}
    methods = sorted(n.removeprefix("frugal_") for n in names if n.startswith("frugal_"))
    modules = [f"frugal.{method}.convert" for method in methods]
    return [f"python -m {module}" for module in modules if _exists(module)]


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _elsewhere() -> str:
    """Who may know what is not known here."""
    known = converters()
    return f"; {', '.join(known)} read what their methods released" if known else ""


def _is_timm(name: str) -> bool:
    import open_clip
    import timm

    return timm.is_model(name) and open_clip.get_model_config(name) is None


def _folder(folder: Path, name: str | None, key: str | None) -> ModelBundle:
    exported = any((folder / file).is_file() for file in (OPEN_CLIP_CONFIG, "config.json"))
    own = [folder / part for part in ("checkpoints", "state.json")]
    if any(path.exists() for path in own) or folder.name == "checkpoints":
        raise InputError(
            f"{folder} is a run directory or checkpoint of this library already; give it as it is "
            "to evaluate, export and --run.start-from"
        )
    if not exported:
        raise InputError(
            f"the folder {folder} holds no model that is known here: it has neither "
            f"{OPEN_CLIP_CONFIG} nor config.json{_elsewhere()}"
        )
    refuse_for_folder(folder, name, key)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _two_towers(load_foreign(folder), folder)
    about = read_json_object(folder / "config.json")
    kind = about.get("model_type")
    if kind in _TWO_TOWERS:
        return _two_towers(load_foreign(folder), folder)
    if "architecture" in about:
        found = timm_weights.read_folder(folder)
        return _encoder(found.weights, found.crop, folder, "timm")
    if kind in _ONE_TOWER:
        tower = read_encoder(folder)
        assert tower.preparation is not None
        return _encoder(tower, tower.preparation.crop, folder, "transformers")
    if "auto_map" in about:
        raise InputError(
            f"{folder} holds a model of type {kind!r} that brings its own code; models that bring "
            "their own code are not run"
        )
    raise InputError(
        f"{folder} holds a model of type {kind!r}; open_clip's, timm's and of transformers "
        f"{', '.join((*_TWO_TOWERS, *_ONE_TOWER))} can be loaded{_elsewhere()}"
    )


def _file(path: Path, name: str | None, key: str | None) -> ModelBundle:
    if name is not None or is_torchscript(path):
        return _two_towers(load_foreign(path, name=name, key=key), path)
    if not path.name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".index.json")):
        raise InputError(f"{path} is no file of weights that is known here{_elsewhere()}")
    state = read_weights(path, key=key)
    if is_openai(state):
        return _two_towers(load_foreign(path, name=OPENAI, key=key), path)
    if any(name.endswith("text_projection") for name in state):
        return _two_towers(load_foreign(path), path)  # which says what is missing
    state = part_with(state, "patch_embed.proj.weight", source=str(path))
    if "patch_embed.proj.weight" in state:
        return _encoder(_plain(path, state), CenterCrop(), path, "a file of weights")
    raise InputError(
        f"{path} does not say which model its weights are of, the first of them "
        f"{min(state)!r}; give --model with open_clip's or timm's name of it{_elsewhere()}"
    )


# ------------------------------------------------------------------------------------------------
# Two towers


def _two_towers(foreign: Foreign, source: Path, name: str | None = None) -> ModelBundle:
    return foreign.bundle(source, name or foreign.library)


def with_fixed_positions(bundle: ModelBundle) -> ModelBundle:
    """The same, where a table of positions is bit for bit one that its tower can compute.

    Raises:
        InputError: if it has parts that towers of this library do not have.
    """
    config = bundle.config
    if isinstance(config, ImportedEncoder):
        return bundle  # which knows its own
    if not isinstance(config, DualEncoderConfig):
        kind = type(getattr(bundle.model, "model", bundle.model)).__name__
        path = bundle.source.path
        raise InputError(
            f"{path} is a {kind} of {bundle.source.library} with parts that towers of this library "
            f"do not have; python -m frugal.common.evaluate --checkpoint {path} measures it as "
            f"it is{_elsewhere()}"
        )
    state = dict(bundle.model.state_dict())
    image, state = _with_fixed_positions(config.image, state, "image.pos_embed")
    config = replace(config, image=image)
    model = config.build()
    model.load_state_dict(state)
    return replace(bundle, model=model.eval(), config=config, image=image)


def describe(bundle: ModelBundle) -> str:
    """What was read, in words."""
    config: Any = bundle.config
    state = bundle.model.state_dict()
    how = in_words(config, bundle.transform, told_by=bundle.told_by)
    if isinstance(config, ImportedEncoder):
        classes = config.num_classes
        head = "" if classes is None else f", with a linear layer to {classes:,} numbers"
        return f"{_words(config.image)}{head}; {_count(state)} parameters; {how}"
    if not isinstance(config, DualEncoderConfig):
        return how
    text = config.text
    return (
        f"{bundle.source.library}'s {_words(config.image)}; text tower {text.width} wide, "
        f"{text.depth} blocks, {text.length} tokens, pooled by {text.pooling}; {_count(state)} "
        f"parameters; {how}"
    )


def _with_fixed_positions(
    tower: ImageTower, state: Mapping[str, Tensor], name: str
) -> tuple[ImageTower, State]:
    """A tower whose table is, bit for bit, one that it can compute, computes it."""
    kinds = [kind for kind in get_args(ImagePositions) if kind != "learned"]
    table = state.get(name)
    if table is None or tower.width % 4 or tower.width < 8:
        return tower, dict(state)
    for kind in kinds:
        fixed = replace(tower, positions=kind)
        if torch.equal(image_table(fixed), table):
            return fixed, {n: t for n, t in state.items() if n != name}
    return tower, dict(state)


def _words(tower: ImageTower) -> str:
    height, width = tower.height_width
    return (
        f"image tower {tower.width} wide, {tower.depth} blocks, patches of {tower.patch_size}, "
        f"{height}x{width} pixels, pooled by {tower.pooling}"
    )


def _count(state: Mapping[str, Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in state.values()):,}"


# ------------------------------------------------------------------------------------------------
# An image tower alone


def _plain(path: Path, state: State) -> ImageEncoder:
    """A file in timm's layout; its shapes and what it holds besides say what it is."""
    numbers = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    found = encoder_of_state(numbers, source=str(path))
    table = numbers["pos_embed"]
    if found.tower.positions != "learned":  # nearly so, perhaps; here every bit stays
        found = replace(
            found,
            tower=replace(found.tower, positions="learned"),
            state={**found.state, "pos_embed": table},
        )
    if "norm.weight" in found.state or "fc_norm.weight" not in found.rest:
        return found
    last = {f"norm.{leaf}": found.rest[f"fc_norm.{leaf}"] for leaf in ("weight", "bias")}
    return replace(
        found,
        tower=replace(found.tower, pooling="mean", norm_after_pooling=True),
        state={**found.state, **last},
        rest={n: t for n, t in found.rest.items() if not n.startswith("fc_norm.")},
    )


def _encoder(
    found: ImageEncoder, crop: CenterCrop, path: Path, library: str, name: str | None = None
) -> ModelBundle:
    state, rest = dict(found.state), dict(found.rest)
    if "projection.weight" in state:  # into the space of texts that are not there
        rest["head.weight"] = state.pop("projection.weight")
    weight = rest.pop("head.weight", None)
    bias = rest.pop("head.bias", None)
    tower, state = _with_fixed_positions(found.tower, state, "pos_embed")
    if what := replace(found, tower=tower, state=state).misfit():
        raise InputError(f"{found.source} does not hold one whole image tower: {what}")
    named = {f"image.{name}": tensor.clone() for name, tensor in state.items()}
    if weight is not None:
        named["head.weight"] = weight.clone()
        named["head.bias"] = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    config = ImportedEncoder(image=tower, num_classes=None if weight is None else len(weight))
    model = config.build()
    model.load_state_dict(named)
    left = tuple(sorted({name.split(".")[0] for name in rest}))
    return ModelBundle(
        model=model.eval(),
        config=config,
        image=tower,
        text=None,
        tokenizer_source=None,
        transform=crop,
        source=Source(path=path, library=library, name=name or library, left_behind=left),
        precision="auto",
        told_by=found.preparation.told_by if found.preparation else _NOT_SAID,
    )
