"""CiT's released models, and back: both towers, their projections and the scale in one file.

A folder has ``pytorch_model.bin`` and a ``config.json`` of a VisionTextDualEncoder whose vision
model is of one of three kinds that transformers does not know (moco, augreg, swag); a checkpoint of
a training run (``.pth``) has the same names under ``model``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.cit.published_vision import (
    KINDS,
    WEIGHT_FILES,
    is_released,
    to_swag,
    vision_of_state,
)
from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.clip import DualEncoder
from frugal.common.models.from_transformers import load_model
from frugal.common.models.in_words import some
from frugal.common.models.pretrained import (
    PretrainedDualEncoderConfig,
    TransformersImage,
    TransformersText,
    pixel_facts,
    transformers_config,
)
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_timm
from frugal.common.weights.files import (
    State,
    check_whole,
    read_content,
    state_in,
    weights_in,
    without_prefix,
)

_HALF = (0.5, 0.5, 0.5)
_LAYER = re.compile(r"encoder\.layer\.(\d+)\..*")
_PARTS = ("vision_model.", "visual_projection.", "text_model.", "text_projection.")
_IMAGE, _TEXT = "image.projection.weight", "text.projection.weight"


@dataclass(frozen=True)
class Released:
    """A released model."""

    model: PretrainedDualEncoderConfig
    state: State
    """By the names of :class:`DualEncoder`, float32."""
    step: int
    """Updates it was trained for, where the file says so; otherwise 0."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of towers of unusual widths; without them one per 64 channels."""

    image: int | None = None
    text: int | None = None


def read_released(path: Path, *, heads: Heads, length: int) -> Released:
    """A released folder or file, a checkpoint of its training, or any VisionTextDualEncoder folder.

    Args:
        path: the folder or the file; beside a file, its config.json is read where there is one.
        heads: what widths do not say.
        length: most tokens of a caption.

    Raises:
        InputError: if there is no such model, or it is damaged.
    """
    folder = path if path.is_dir() else path.parent
    about = folder / "config.json"
    settings = read_json_object(about) if about.is_file() else {}
    if path.is_dir() and settings and not is_released(settings):
        return _transformers_folder(path, settings, length=length)
    file = weights_in(path, WEIGHT_FILES) if path.is_dir() else path
    content = read_content(file)
    state = state_in(content, source=str(file))
    released = from_released(
        state,
        source=str(path),
        text_config=settings.get("text_config") if is_released(settings) else None,
        heads=heads,
        length=length,
    )
    step = content.get("step", 0) if isinstance(content, Mapping) else 0
    return replace(released, step=int(step) if isinstance(step, (int, float)) else 0)


def from_released(
    state: Mapping[str, Tensor],
    *,
    source: str,
    text_config: Mapping[str, Any] | None = None,
    heads: Heads | None = None,
    length: int = 32,
) -> Released:
    """The state of a released model as ours.

    Args:
        state: by the released names.
        source: for messages.
        text_config: of its BERT; without it, what the shapes of the weights tell.
        heads: what widths do not say.
        length: most tokens of a caption.

    Raises:
        InputError: if it is of another kind, or incomplete.
    """
    heads = heads or Heads()
    state = {n: t for n, t in state.items() if not n.endswith("embeddings.position_ids")}
    unknown = [n for n in state if not n.startswith(_PARTS) and n != "logit_scale"]
    needed = ("visual_projection.weight", "text_projection.weight", "logit_scale")
    if missing := [name for name in needed if name not in state]:
        raise InputError(
            f"{source} has no {missing[0]}; give a whole released model, or use the file of an "
            "image tower alone with --objective.image-weights"
        )
    if unknown:
        raise InputError(f"{source} holds {unknown[0]!r}, which no released model of CiT has")
    vision = vision_of_state(state, source=source, heads=heads.image)
    tower = vision.tower
    if any(name.startswith("vision_model.augreg.") for name in state):
        tower = replace(tower, mean=_HALF, std=_HALF)
    texts = without_prefix(state, "text_model.")
    config = dict(text_config) if text_config else _bert_of(texts, source, heads.text)
    facts = json.dumps({"name": source, "config": config}, sort_keys=True)
    model = PretrainedDualEncoderConfig(
        image=tower,
        text=TransformersText(name=source, length=length, pretrained=False, facts=facts),
        embed_dim=len(state["visual_projection.weight"]),
    )
    ours = {f"image.{name}": t for name, t in vision.state.items()}
    ours |= {f"text.model.{name}": t for name, t in texts.items()}
    ours |= {_IMAGE: state["visual_projection.weight"], _TEXT: state["text_projection.weight"]}
    ours["logit_scale"] = state["logit_scale"].reshape(1)
    ours = {n: t.float() if t.is_floating_point() else t for n, t in ours.items()}
    released = Released(model, ours, step=0)
    _check_whole(released, source)
    return released


def _bert_of(state: Mapping[str, Tensor], source: str, heads: int | None) -> dict[str, Any]:
    """The configuration that the shapes of BERT's weights tell."""
    try:
        rows, width = state["embeddings.word_embeddings.weight"].shape
        positions = len(state["embeddings.position_embeddings.weight"])
        kinds = len(state["embeddings.token_type_embeddings.weight"])
        inner = len(state["encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise InputError(
            f"{source} has no text_model.{error.args[0]}; it is incomplete, or its text model is "
            "no BERT"
        ) from None
    depth = 1 + max(int(match[1]) for name in state if (match := _LAYER.fullmatch(name)))
    return {
        "model_type": "bert",
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads or max(width // 64, 1),
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": kinds,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }


def _check_whole(released: Released, source: str) -> None:
    with torch.device("meta"):
        wanted = DualEncoder(released.model).state_dict()
    for name, tensor in wanted.items():
        found = released.state.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "is missing" if found is None else f"has the shape {tuple(found.shape)}"
            raise InputError(
                f"{source} does not hold a whole model: our {name} {shape}, needed is "
                f"{tuple(tensor.shape)}"
            )
    if surplus := sorted(released.state.keys() - wanted.keys()):
        raise InputError(f"{source} holds our {surplus[0]} besides, which no such model has")


def _transformers_folder(folder: Path, settings: Mapping[str, Any], *, length: int) -> Released:
    """A folder of which transformers knows both towers."""
    if settings.get("model_type") != "vision-text-dual-encoder":
        raise InputError(
            f"{folder} holds a model of type {settings.get('model_type')!r}, not a "
            "vision-text-dual-encoder; give a released model"
        )
    check_whole(weights_in(folder, WEIGHT_FILES))
    theirs, missing = load_model(folder, way_out="copy them again")
    if missing:
        raise InputError(f"the weights in {folder} lack {some(missing)}")
    pixels = pixel_facts(str(folder), theirs.config.vision_config.model_type)
    image, text = (
        json.dumps({"name": str(folder), "config": part.to_dict(), "pixels": pixels}, default=str)
        for part in (theirs.config.vision_config, theirs.config.text_config)
    )
    size = getattr(transformers_config(image), "image_size", 224)
    model = PretrainedDualEncoderConfig(
        image=TransformersImage(name=str(folder), image_size=size, pretrained=False, facts=image),
        text=TransformersText(name=str(folder), length=length, pretrained=False, facts=text),
        embed_dim=theirs.config.projection_dim,
    )
    ours = {f"image.model.{n}": t for n, t in theirs.vision_model.state_dict().items()}
    ours |= {f"text.model.{n}": t for n, t in theirs.text_model.state_dict().items()}
    ours[_IMAGE] = theirs.visual_projection.weight.detach()
    ours[_TEXT] = theirs.text_projection.weight.detach()
    ours["logit_scale"] = theirs.logit_scale.detach().reshape(1)
    released = Released(model, ours, step=0)
    _check_whole(released, str(folder))
    return released


# ------------------------------------------------------------------------------------------------
# Back


def kind_of(model: Any, wanted: str | None = None) -> str:
    """Which of the three kinds of released vision models a tower of ours is written as.

    Raises:
        InputError: if the towers are not of a kind that was released, or not of the wanted one.
    """
    image, text = model.image, model.text
    if not isinstance(image, ImageTower):
        raise InputError(
            "released models have a vision transformer of MoCo v3, AugReg or SWAG; model.image "
            f"{type(image).__name__} is none: python -m frugal.common.export --to huggingface "
            "writes it for transformers"
        )
    if not isinstance(text, TransformersText) or text.pooling != "pooler":
        raise InputError(
            "released models have a BERT that pools itself; model.text of this run is none"
        )
    if model.head_width is not None:
        raise InputError(
            f"released models have projections of one layer; model.head_width={model.head_width} "
            "has no place there: python -m frugal.common.export --to frugal keeps it"
        )
    kind = transformers_config(text.facts).model_type
    if kind != "bert":
        raise InputError(f"released models have a BERT; model.text of this run is a {kind}")
    plain = ImageTower(
        width=image.width,
        depth=image.depth,
        heads=image.heads,
        mlp_width=image.mlp_width,
        patch_size=image.patch_size,
    )
    options = ("patch_bias", "class_token", "pre_norm", "activation", "norm_epsilon", "pooling",
               "norm_after_pooling", "layer_scale")  # fmt: skip
    for name in options:
        if (value := getattr(image, name)) != getattr(plain, name):
            raise InputError(
                f"released models are plain vision transformers; model.image.{name}={value} has no "
                "place there"
            )
    has_projector = image.projector_width is not None
    allowed = ("moco",) if has_projector else ("augreg", "swag")
    if wanted is None:
        return "moco" if has_projector else "augreg" if image.mean == _HALF else "swag"
    if wanted not in allowed:
        raise InputError(
            f"--kind is {wanted}, but this tower has {'a' if has_projector else 'no'} projector, "
            f"as {' and '.join(allowed)} have; choose one of these"
        )
    return wanted


def to_released(
    state: Mapping[str, Tensor], model: PretrainedDualEncoderConfig, *, kind: str
) -> State:
    """The state of a :class:`DualEncoder` by the released names.

    A position table that is computed here is written out; AugReg's head of 21,843 classes, which
    nothing reads, is left out.
    """
    assert kind in KINDS
    image = without_prefix(state, "image.")
    del image["projection.weight"]
    head = {n: image.pop(n) for n in list(image) if n.startswith("projector.")}
    theirs = to_timm(image, replace(model.image, projector_width=None))
    if kind == "swag":
        with_table = {**image}
        if "pos_embed" not in with_table:
            with_table["pos_embed"] = theirs["pos_embed"]
        theirs = to_swag(with_table)
    theirs |= {f"head.{name.removeprefix('projector.')}": t for name, t in head.items()}
    named = {f"vision_model.{kind}.{name}": tensor for name, tensor in theirs.items()}
    prefix = "text.model."
    named |= {f"text_model.{n.removeprefix(prefix)}": t for n, t in state.items()
              if n.startswith(prefix)}  # fmt: skip
    named |= {"visual_projection.weight": state[_IMAGE], "text_projection.weight": state[_TEXT]}
    named["logit_scale"] = state["logit_scale"].squeeze()
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}


def released_settings(model: PretrainedDualEncoderConfig, *, kind: str) -> dict[str, Any]:
    """The config.json that goes with :func:`to_released`."""
    image = model.image
    text = json.loads(model.text.facts)["config"]
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": model.initial_logit_scale,
        "vision_config": {
            "model_type": kind,
            "config_name": f"vit_{image.width}_{image.depth}_patch{image.patch_size}",
            "hidden_size": image.pooled_width,
        },
        "text_config": text,
    }
