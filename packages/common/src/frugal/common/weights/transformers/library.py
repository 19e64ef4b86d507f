"""transformers: which of its folders are known here, and which of its models ours become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.image_encoder import ImageEncoder, image_encoder
from frugal.common.models.vit import ImageTower
from frugal.common.quiet_transformers import quietly
from frugal.common.weights.encoder_config import tower_bundle
from frugal.common.weights.library import (
    NO_TEXT,
    Library,
    Target,
    UnsupportedOption,
    elsewhere,
    refuse_for_folder,
    refuse_larger_than,
)
from frugal.common.weights.transformers import clip, upernet, vision_text, vit, vit_mae
from frugal.common.weights.transformers.config_files import NAME
from frugal.common.weights.written import two_towers, unsupported_tower

_TWO_TOWERS = ("clip", "siglip", "vision-text-dual-encoder")
_ONE_TOWER = ("clip_vision_model", "vit", "vit_mae")
"""By transformers' names."""
_PIXELS = (
    "The image processors of transformers resize with torchvision, this model was measured with "
    "Pillow: some values of a photograph differ by one gray level of 255."
)


def knows(path: Path, name: str | None) -> bool:
    """Any folder with a config.json that is not timm's, whatever the name."""
    del name
    if not (path / "config.json").is_file():
        return False
    settings = read_json_object(path / "config.json")
    return settings.get("model_type") in _TWO_TOWERS or "architecture" not in settings


def load(folder: Path, name: str | None, key: str | None) -> ModelBundle:
    """The model of a folder; no code in it is ever run.

    Raises:
        InputError: if it is incomplete or damaged, or of a kind that is not known here; or if a
            name or a key is given.
    """
    refuse_for_folder(folder, name, key)
    settings = read_json_object(folder / "config.json")
    kind = settings.get("model_type")
    if kind in _TWO_TOWERS:
        return vision_text.load(folder)
    if kind in _ONE_TOWER:
        return tower_bundle(load_image_tower(folder), path=folder, library=NAME)
    if "auto_map" in settings:
        raise InputError(
            f"{folder} holds a model of type {kind!r} that brings its own code; models that bring "
            "their own code are not run"
        )
    raise InputError(
        f"{folder} holds a model of type {kind!r}; open_clip's, timm's and of transformers "
        f"{', '.join((*_TWO_TOWERS, *_ONE_TOWER))} can be loaded{elsewhere()}"
    )


def load_image_tower(folder: Path) -> ImageEncoder:
    """The image tower of a folder.

    Raises:
        InputError: if it is incomplete or damaged, or none of CLIP's and no vision transformer.
    """
    settings = read_json_object(folder / "config.json")
    kind = settings.get("model_type")
    if kind in ("vit", "vit_mae"):
        encoder = vit.load_image_tower(folder, settings)
    elif "clip" in str(kind or ""):
        encoder = clip.load_image_tower(folder, settings)
    else:
        raise _another_kind(folder, kind)
    refuse_larger_than(encoder.state, settings, source=folder / "config.json")
    return encoder


def _another_kind(folder: Path, kind: Any) -> InputError:
    return InputError(
        f"{folder} holds a model of type {kind!r}, not a CLIP model or a plain vision transformer; "
        "choose another one"
    )


def target(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    """How a model is written for one of :data:`LIBRARY`'s targets."""
    way = _two_towers(bundle, to) if bundle.text is not None else _one_tower(bundle, to)
    if isinstance(way, UnsupportedOption):
        return way
    return _quiet(replace(way, usage=f"{way.usage.rstrip()}\n\n{_PIXELS}\n"))


def _two_towers(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    towers = two_towers(bundle)
    if to != "huggingface":
        has = "no decoder" if to == "huggingface_mae" else "a text tower"
        return UnsupportedOption("the model", f"it has {has}")
    if unsupported_tower(bundle, "image", "text") is not None:
        return vision_text.target(bundle, towers)
    # not every image tower is CLIP's, and transformers joins others to CLIP's text tower
    return _first(clip.target(bundle, towers), vision_text.target(bundle, towers))


def _one_tower(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    if not isinstance(bundle.image, ImageTower):
        return NO_TEXT
    if to == "huggingface_mae":
        return vit_mae.target(bundle)
    encoder = image_encoder(bundle)
    if to == "huggingface_beit":
        return vit.beit_target(encoder)
    if upernet.is_segmenter(bundle):
        return upernet.target(bundle)
    return _first(vit.target(encoder), vit.beit_target(encoder))


def _first(*ways: Target | UnsupportedOption) -> Target | UnsupportedOption:
    """The first way that can be gone; where there is none, what speaks against the first."""
    return next((way for way in ways if isinstance(way, Target)), ways[0])


def _quiet(target: Target) -> Target:
    """The same without transformers' bars and reports."""

    def write(folder: Path) -> None:
        with quietly():
            target.write(folder)

    def difference(folder: Path) -> float:
        with quietly():
            return target.difference(folder)

    return replace(target, write=write, difference=difference)


LIBRARY = Library(
    name=NAME,
    knows=knows,
    load=load,
    image_tower=load_image_tower,
    targets=("huggingface", "huggingface_beit", "huggingface_mae"),
    target=target,
)
