"""Towers of timm and transformers as parts of a recipe.

A tower says what it is made of in a text that is written into the recipe, so that a run needs the
folder or the hub that it was named by only once.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from frugal.common.errors import InputError
from frugal.common.files import read_json_object, reason_of
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.preprocess import (
    PROCESSOR_FILES,
    pixels_of_timm,
    pixels_of_transformers,
    timm_settings,
    transformers_settings,
)
from frugal.common.models.pretrained_models import (
    about_timm,
    forward_flops,
    probe,
    transformers_config,
)
from frugal.common.models.pretrained_towers import (
    TimmImageModule,
    TransformersImageModule,
    TransformersTextModule,
    build,
)
from frugal.common.models.vit import IMAGENET_MEAN, IMAGENET_STD, ImageTower
from frugal.common.ranges import Count, ShareBelowOne, check_ranges
from frugal.common.recipe import Recipe
from frugal.common.reduction.image import Channels, KeepAll

SIMCSE = "princeton-nlp/unsup-simcse-bert-base-uncased"
"""BERT base uncased, tuned without labels (Gao et al., arXiv:2104.08821)."""
_BERT_BASE = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_KNOWN = {SIMCSE: _BERT_BASE, "google-bert/bert-base-uncased": _BERT_BASE}
"""What need not be read, so that the recipes that name it can be built anywhere."""

Facts = Annotated[str, tyro.conf.Suppress]


def _facts(name: str, given: str, *, with_pixels: bool = False) -> str:
    """What a model is made of, as JSON: what is given, if that is of this name, or else read.

    Args:
        name: a folder, or a name on the hub.
        given: what a recipe says.
        with_pixels: with what transformers makes of the gray levels of an image.
    """
    if given and json.loads(given)["name"] == name:
        return given
    config = _KNOWN.get(name) or _read_json(name, "config.json")
    facts: dict[str, Any] = {"name": name, "config": config}
    if with_pixels:
        facts["pixels"] = pixel_facts(name, str((config or {}).get("model_type", "")))
    return json.dumps(facts, sort_keys=True)


def pixel_facts(name: str, model_type: str) -> dict[str, Channels]:
    """``image_mean`` and ``image_std`` of a model of transformers, on a scale from 0 to 1.

    Says what is taken where the model does not.

    Args:
        name: a folder, or a name on the hub.
        model_type: as its config.json has it.

    Raises:
        InputError: if it prepares images in a way that is not known here.
    """
    newer, older = (_read_json(name, file, needed=False) for file in PROCESSOR_FILES)
    file = transformers_settings(newer, older, source=name, model_type=model_type)
    pixels = pixels_of_transformers(file, model_type=model_type)
    if not file.is_there:
        logging.getLogger("frugal").warning(
            "%s does not say how images are prepared (no %s): mean %s and std %s are taken",
            name, " or ".join(PROCESSOR_FILES), list(pixels.mean), list(pixels.std),
        )  # fmt: skip
    return {"image_mean": pixels.mean, "image_std": pixels.std}


def _read_json(name: str, file: str, *, needed: bool = True) -> dict[str, Any] | None:
    """A file of a folder or of the hub; None where it may be missing and is.

    Raises:
        InputError: if it is needed and cannot be had, or is no JSON object.
    """
    path = Path(name) / file if Path(name).is_dir() else _fetched(name, file, needed=needed)
    if path is None or not path.is_file():
        if not needed:
            return None
        raise InputError(f"the folder {name} holds no {file}; give a folder that holds a model")
    return read_json_object(path)


def _fetched(name: str, file: str, *, needed: bool) -> Path | None:
    """A file of a model on the hub, downloaded if it is not here yet."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).suffix == ".json":
        raise InputError(f"there is no folder {name}; give one, or a name on the Hugging Face hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of every kind
        if not needed:
            return None
        raise InputError(
            f"there is no folder {name}, and its {file} cannot be fetched from the Hugging Face "
            f"hub: {reason_of(error)}"
        ) from None


def _check_alone(facts: str, part: str) -> None:
    """Refuse what is no single tower of transformers."""
    about = json.loads(facts)
    name, config = about["name"], about["config"]
    if "model_type" not in config:
        raise InputError(
            f"the config.json of {name} has no model_type, so that transformers cannot tell what "
            "it is; give the folder of a transformers model"
        )
    if "text_config" in config and "vision_config" in config:
        raise InputError(
            f"{name} is a {config['model_type']} of two towers; model.{part} takes the folder of "
            "one tower"
        )


class _Whole:
    """An image tower that sees images whole: no part of one can be left out."""

    image_size: int
    class_token = "none"
    grid = (1, 1)
    num_patches = 1

    @property
    def patch_size(self) -> int:
        """Side of what is seen or not, in pixels: the whole image."""
        return self.image_size

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the images, in pixels."""
        return (self.image_size, self.image_size)

    @property
    def pooled_width(self) -> int:
        """Of the vector that is projected into the space of texts."""
        return probe(self).width

    width = pooled_width

    def flops(self, seen: float) -> float:
        """Forward FLOPs of one image."""
        del seen
        return forward_flops(self, 1)


@dataclass(frozen=True, kw_only=True)
class TransformersImage(_Whole):
    """Any image model of transformers."""

    library: ClassVar[str] = "transformers"
    part: ClassVar[str] = "image"

    name: str
    """A folder with a config.json, or a name on the Hugging Face hub."""
    image_size: Count = 224
    """Side of the square images, in pixels."""
    pooling: Literal["pooler", "first", "mean"] = "pooler"
    """The model's own pooled output, the first token, or the mean of all, behind its last norm."""
    pretrained: bool = True
    """Start from the weights of that name; otherwise from random ones."""
    facts: Facts = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", _facts(self.name, self.facts, with_pixels=True))
        _check_alone(self.facts, "image")
        check_ranges(self, "image")

    @property
    def mean(self) -> Channels:
        """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
        return _channels(self.facts, "image_mean", IMAGENET_MEAN)

    @property
    def std(self) -> Channels:
        """Of the same."""
        return _channels(self.facts, "image_std", IMAGENET_STD)

    def module(self, embed_dim: int | None = None) -> TransformersImageModule:
        """The tower with weights that are yet to be drawn."""
        return TransformersImageModule(self, embed_dim)


@dataclass(frozen=True, kw_only=True)
class TimmImage(_Whole):
    """Any image model of timm, without its head."""

    library: ClassVar[str] = "timm"
    part: ClassVar[str] = "image"

    name: str
    """An architecture, with or without the tag of its weights (vit_base_patch16_224.augreg_in21k),
    or a folder in timm's layout."""
    weights: Path | None = None
    """A file of weights that the architecture starts from instead."""
    image_size: Count = 224
    """Side of the square images, in pixels."""
    pretrained: bool = True
    """Start from the weights of that name, or in that file; otherwise from random ones."""
    facts: Facts = ""

    def __post_init__(self) -> None:
        if Path(self.name).is_dir() or self.facts:
            object.__setattr__(self, "facts", self._folder_facts())
        check_ranges(self, "image")
        if self.weights is not None and not self.pretrained:
            raise InputError(
                f"model.image.weights is {self.weights}, but model.image.pretrained is off; choose "
                "one"
            )

    def _folder_facts(self) -> str:
        if not Path(self.name).is_dir() and json.loads(self.facts)["name"] != self.name:
            return ""
        facts = _facts(self.name, self.facts)
        if "architecture" not in json.loads(facts)["config"]:
            raise InputError(
                f"the config.json of {self.name} names no architecture, so that it is not a folder "
                "of timm; give another one"
            )
        return facts

    @property
    def about(self) -> dict[str, Any]:
        """architecture, model_args, mean and std."""
        if not self.facts:
            return about_timm(self.name)
        config = json.loads(self.facts)["config"]
        pixels = pixels_of_timm(timm_settings(config), source=f"the config.json of {self.name}")
        return {
            "architecture": config["architecture"],
            "model_args": config.get("model_args") or {},
            "mean": pixels.mean,
            "std": pixels.std,
        }

    @property
    def mean(self) -> Channels:
        """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
        red, green, blue = self.about["mean"]
        return red, green, blue

    @property
    def std(self) -> Channels:
        """Of the same."""
        red, green, blue = self.about["std"]
        return red, green, blue

    def module(self, embed_dim: int | None = None) -> TimmImageModule:
        """The tower with weights that are yet to be drawn."""
        return TimmImageModule(self, embed_dim)


@dataclass(frozen=True, kw_only=True)
class TransformersText:
    """Any text model of transformers; of one with a decoder, the encoder."""

    library: ClassVar[str] = "transformers"
    part: ClassVar[str] = "text"

    name: str = SIMCSE
    """A folder with a config.json, or a name on the Hugging Face hub."""
    length: Count = 32
    """Most tokens of a caption, special tokens included."""
    pooling: Literal["pooler", "first", "last", "mean"] = "pooler"
    """The model's own pooled output, or of what it says of every token the first, the last of the
    caption, or the mean of the caption."""
    pretrained: bool = True
    """Start from the weights of that name; otherwise from random ones."""
    dropout: ShareBelowOne | None = None
    """In training, in place of the dropouts that the model has."""
    facts: Facts = ""

    packed = False
    padding_matters = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", _facts(self.name, self.facts))
        _check_alone(self.facts, "text")
        check_ranges(self, "text")

    @property
    def vocabulary(self) -> int:
        """Rows of the token table."""
        return transformers_config(self.facts).vocab_size

    @property
    def pad_id(self) -> int:
        """What fills the right of a caption, as transformers' tokenizers of such models have it."""
        config = transformers_config(self.facts)
        ends = getattr(config, "eos_token_id", None)
        end = ends[0] if isinstance(ends, list) else ends
        candidates = (getattr(config, "pad_token_id", None), end, 0)
        return next(token for token in candidates if token is not None)

    @property
    def width(self) -> int:
        """Of the pooled vector."""
        return probe(self).width

    def flops(self, seen: float) -> float:
        """Forward FLOPs of one caption of which so many slots are computed."""
        return forward_flops(self, max(round(seen), 1))

    def module(self, embed_dim: int | None = None) -> TransformersTextModule:
        """The tower with weights that are yet to be drawn."""
        return TransformersTextModule(self, embed_dim)


def _channels(facts: str, name: str, default: Channels) -> Channels:
    red, green, blue = json.loads(facts).get("pixels", {}).get(name, default)
    return red, green, blue


@dataclass(frozen=True, kw_only=True)
class PretrainedDualEncoderConfig(DualEncoderConfig):
    """Two towers of any library, with projections that start as torch's linear layers do."""

    image: Any
    """:class:`ImageTower`, :class:`TransformersImage` or :class:`TimmImage`. (A union in its type
    would take the fields of the tower off the command line.)"""
    text: Any
    """:class:`~frugal.common.models.text.TextTower` or :class:`TransformersText`."""
    embed_dim: Count = 512

    def check(self, recipe: Recipe) -> None:
        """Refuse a token reduction that the image tower cannot follow."""
        reduction = recipe.reduction.image
        if not isinstance(self.image, ImageTower) and not isinstance(reduction, KeepAll):
            raise InputError(
                f"reduction.image {type(reduction).__name__} leaves patches out, but the tower "
                f"{self.image.name} is another library's and sees images whole; choose KeepAll, or "
                "one of Frugal's own towers"
            )

    def build(self, generator: torch.Generator | None = None) -> DualEncoder:
        """The model, on the CPU in float32, with weights drawn from ``generator``.

        Without a generator the seed is 0.
        """
        return build(self, generator)
