"""A library that nobody has: all that it takes to read its models and to write for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import CenterCrop
from frugal.common.evaluation.embed import Embedder
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.image_encoder import ImageEncoder, image_encoder
from frugal.common.models.preprocess import Pixels, Preparation
from frugal.common.recipe_json import from_json, to_json
from frugal.common.weights.library import (
    NO_TEXT,
    Library,
    Target,
    UnsupportedOption,
    fill,
    refuse_for_folder,
    two_tower_bundle,
)
from frugal.common.weights.written import Embedded, TwoTowers, embedding_difference, two_towers

_CROP = CenterCrop(interpolation="bilinear")
"""All that it can do to an image."""


def _knows(path: Path, name: str | None) -> bool:
    del name
    return (path / "toy.json").is_file()


def _load(path: Path, name: str | None, key: str | None) -> ModelBundle:
    refuse_for_folder(path, name, key)
    config = from_json(json.loads((path / "toy.json").read_text()), source=str(path / "toy.json"))
    assert isinstance(config, DualEncoderConfig)
    model = fill(config, load_file(path / "toy.safetensors"), source=str(path))
    pixels = Pixels(mean=config.image.mean, std=config.image.std)
    prepared = Preparation(pixels=pixels, crop=_CROP, told_by="toy's manual")
    return two_tower_bundle(model, config, ClipBpe(), prepared, path=path, library="toy")


def _image_tower(folder: Path) -> ImageEncoder:
    return image_encoder(_load(folder, None, None))


def _target(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    assert to == "toy"
    if bundle.text is None:
        return NO_TEXT
    towers = two_towers(bundle)
    if towers.config.image.pooling == "mean_all":
        return UnsupportedOption("model.image.pooling=mean_all", "toys pool no class token")
    return Target(
        usage='    model = toy.load("FOLDER")\n',
        write=lambda folder: _write(towers, folder),
        difference=lambda folder: embedding_difference(bundle, _embed, folder),
        transform=_CROP,
    )


def _write(towers: TwoTowers, folder: Path) -> None:
    save_file(towers.model.state_dict(), folder / "toy.safetensors")
    (folder / "toy.json").write_text(json.dumps(to_json(towers.config)))


def _embed(folder: Path, pictures: Tensor, captions: list[str]) -> Embedded:
    towers = two_towers(_load(folder, None, None))
    embedder = Embedder(
        towers.model,
        towers.tokenizer,
        context_length=towers.config.text.length,
        device=torch.device("cpu"),
    )
    return Embedded(embedder.images(pictures), embedder.texts(captions), towers.model.logit_scale)


LIBRARY = Library(
    name="toy",
    knows=_knows,
    load=_load,
    image_tower=_image_tower,
    targets=("toy",),
    target=_target,
)
