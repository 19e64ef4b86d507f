"""Trained image towers from files and folders of many kinds.

Ours: any run directory or checkpoint whose model has an image tower. OpenAI's CLIP (the published
archive, or its state saved again), open_clip (file or folder), SLIP, transformers' CLIP, ViT and
ViTMAE (folder or name), and plain vision transformers in timm's layout, among them DINO, MAE and
MILAN with or without decoder or head.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from frugal.common.checkpoint.store import MODEL_FILE
from frugal.common.errors import InputError
from frugal.common.files import read_json_object, reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.image_encoder import ImageEncoder, image_encoder
from frugal.common.models.preprocess import (
    Preparation,
    of_open_clip,
    of_transformers,
    transformers_file,
)
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD, ImageTower, image_table
from frugal.common.models.weight_names import (
    OPEN_CLIP,
    TRANSFORMERS_CLIP,
    from_timm,
    from_vit_mae,
    read_names,
)
from frugal.common.weights.files import (
    State,
    part_with,
    read_content,
    state_in,
    weights_in,
    without_prefix,
)
from frugal.common.weights.runs import load_run

_LOG = logging.getLogger("frugal")
_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""By width, where a head is not 64 wide: ViT-H, g and bigG."""
_TABLE_TOLERANCE = 1e-5
_ANY_SCALE = 1e-5
"""What layer scales start from is of no account where they are read."""
_WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # fmt: skip
_OPEN_CLIP = "open_clip_config.json"
_BESIDE_THE_ENCODER = re.compile(r"(decoder|head|fc_norm)[._].*|mask_token")


def read_encoder(
    source: Path | str, *, activation: Activation | None = None, heads: int | None = None
) -> ImageEncoder:
    """The image tower of a file, a folder, or a name on the Hugging Face hub, in float32.

    Args:
        source: see the module.
        activation: of its blocks, where the file does not say and is not to be guessed.
        heads: attention heads, where the file does not say.

    Raises:
        InputError: if there is no such thing, or it holds no tower of a known kind.
    """
    path = Path(source)
    if not path.exists():
        path = _fetched(str(source))
    if path.is_dir():
        # such a folder may say how it was trained
        exported = any((path / name).is_file() for name in ("config.json", _OPEN_CLIP))
        own = (
            ("checkpoints", "state.json") if exported else ("recipe.json", MODEL_FILE, "state.json")
        )
        if any((path / name).exists() for name in own) or path.name == "checkpoints":
            return _agreeing(_own_run(path), source, activation, heads)
        if (path / _OPEN_CLIP).is_file():
            return _agreeing(_open_clip_folder(path), source, activation, heads)
        if exported:
            found = _library_folder(path)
            if found.preparation is not None and found.preparation.is_default:
                found = replace(found, guessed=("mean", "std"))
            return _agreeing(found, source, activation, heads)
        raise InputError(
            f"the folder {path} holds no model; give a run directory, or a folder with a "
            "config.json or open_clip_config.json"
        )
    content = read_content(path)
    stored = _one_tower(state_in(content, source=str(path)), str(path))
    state = {n: t.float() if t.is_floating_point() else t for n, t in stored.items()}
    if "visual.conv1.weight" in state:
        keeps_training = isinstance(content, Mapping) and bool(
            {"epoch", "optimizer"} & content.keys()
        )
        is_openai = _is_openai(stored, named=path.name, keeps_training=keeps_training)
        chosen = activation or ("quick_gelu" if is_openai else "gelu")
        if activation is None:
            _LOG.info(
                "%s is taken for %s model, whose activation is %s",
                path, "OpenAI's" if is_openai else "open_clip's", chosen,
            )  # fmt: skip
        found = _clip_state(state, activation=chosen, heads=heads, source=str(path))
        unsaid: tuple[str, ...] = () if "input_resolution" in stored else _UNSAID
    else:
        found = encoder_of_state(
            state, activation=activation or "gelu", heads=heads, source=str(path)
        )
        unsaid = (*_UNSAID, *_UNSAID_POOLING)
    given = {"activation": activation, "heads": heads}
    return replace(found, guessed=tuple(name for name in unsaid if given.get(name) is None))


_UNSAID = ("heads", "activation", "norm_epsilon", "mean", "std")
"""What the weights of CLIP's image towers do not say, unless OpenAI's numbers are beside them."""
_UNSAID_POOLING = ("pooling", "norm_after_pooling")
"""What those of plain vision transformers do not say either."""
_LANDMARKS = (
    "visual.conv1.weight", "visual.patch_embed.proj.weight", "patch_embed.proj.weight",
)  # fmt: skip
"""Names by which the towers that are known here are recognized."""


def _one_tower(state: State, source: str) -> State:
    """The tensors of the one model in a file that has an image tower of a known kind."""
    if any(landmark in state for landmark in _LANDMARKS):
        return state
    for landmark in _LANDMARKS:
        found = part_with(state, landmark, source=source)
        if found is not state:
            return found
    if {"conv1.weight", "class_embedding"} <= state.keys():  # CLIP's image tower alone
        return {f"visual.{name}": tensor for name, tensor in state.items()}
    found = part_with(state, "class_embedding", source=source)
    return state if found is state else _one_tower(found, source)


def _library_folder(folder: Path) -> ImageEncoder:
    settings = read_json_object(folder / "config.json")
    if "architecture" not in settings:
        return _transformers_folder(folder)
    from frugal.common.weights import timm_weights

    try:
        return _with_fixed_table(timm_weights.read_folder(folder).weights)
    except InputError:
        if settings.keys() - {"architecture"}:
            raise
    # timm writes more than a name; its shapes say more of such a tower than the name does
    _LOG.warning(
        "%s does not hold the %s that its config.json names, and says nothing else of it: heads, "
        "activation, epsilon, mean and std are the usual ones for its shapes",
        folder, settings["architecture"],
    )  # fmt: skip
    return read_encoder(weights_in(folder, _WEIGHT_FILES))


def _agreeing(
    found: ImageEncoder, source: Path | str, activation: Activation | None, heads: int | None
) -> ImageEncoder:
    """Refuse what contradicts a folder, which says it all."""
    for name, given in (("activation", activation), ("heads", heads)):
        said = getattr(found.tower, name)
        if given not in (None, said):
            raise InputError(
                f"{name} is given as {given}, but {source} says itself what its tower is like: "
                f"{said}; leave it out"
            )
    return found


def _fetched(name: str) -> Path:
    """The folder of a model on the hub, downloaded if it is not here yet."""
    bare = name.removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", bare) or Path(bare).suffix:
        raise InputError(f"there is no file or folder {name}; check the path")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*config.json", *_WEIGHT_FILES]
        return Path(snapshot_download(bare, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of every kind
        raise InputError(
            f"there is no file or folder {name}, and it cannot be fetched from the Hugging Face "
            f"hub: {reason_of(error)}"
        ) from None


# ------------------------------------------------------------------------------------------------
# Our own


def _own_run(path: Path) -> ImageEncoder:
    bundle = load_run(path)
    if not isinstance(bundle.image, ImageTower):
        raise InputError(f"the run {path} trained no image tower; give another one")
    return image_encoder(bundle, with_pooled_norm=False)  # a head may be wanted with its norm


# ------------------------------------------------------------------------------------------------
# CLIP


def _is_openai(stored: State, *, named: str, keeps_training: bool) -> bool:
    """Whether a CLIP state is OpenAI's; open_clip's has the same names and another activation."""
    if "input_resolution" in stored or stored["visual.conv1.weight"].dtype == torch.float16:
        return True
    return not (keeps_training or named in _WEIGHT_FILES)


def _clip_state(
    state: State, *, activation: Activation, heads: int | None, source: str
) -> ImageEncoder:
    """The visual part of a state of OpenAI's or open_clip's ``CLIP``."""
    visual = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    ours = without_prefix(read_names(visual, OPEN_CLIP, source=source), "image.")
    side = state["visual.conv1.weight"].shape[-1]
    return _shaped(
        ours,
        source,
        patch_size=side,
        heads=heads,
        activation=activation,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        norm_epsilon=1e-5,
    )


def _open_clip_folder(folder: Path) -> ImageEncoder:
    from frugal.common.weights.open_clip import image_size, image_tower

    path = folder / _OPEN_CLIP
    settings = read_json_object(path)
    model, preprocess = settings.get("model_cfg") or {}, settings.get("preprocess_cfg") or {}
    if not isinstance(preprocess, Mapping):
        raise InputError(f"{path} holds a preprocess_cfg that is no object; copy it again")
    prepared = of_open_clip(preprocess, size=image_size(model, str(path)), source=str(path))
    tower = image_tower(model, prepared, source=str(path))
    if tower is None:
        raise InputError(
            f"the image tower of {folder} is none of CLIP's plain vision transformers; choose "
            "another one"
        )
    state = state_in(read_content(weights_in(folder, _WEIGHT_FILES)), source=str(folder))
    visual = {n: tensor.float() for n, tensor in state.items() if n.startswith("visual.")}
    ours = without_prefix(read_names(visual, OPEN_CLIP, source=str(folder)), "image.")
    return ImageEncoder(tower, ours, str(folder), preparation=prepared)


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip


def _transformers_folder(folder: Path) -> ImageEncoder:
    settings = read_json_object(folder / "config.json")
    if settings.get("model_type") in ("vit", "vit_mae"):
        return _vit_folder(folder, settings)
    if "clip" not in str(settings.get("model_type", "")):
        raise InputError(
            f"{folder} holds a model of type {settings.get('model_type')!r}, not a CLIP model or a "
            "plain vision transformer; choose another one"
        )
    from transformers import CLIPConfig, CLIPVisionConfig

    # a whole CLIP's may say it twice, in vision_config_dict too
    is_whole = not {"vision_config", "vision_config_dict"}.isdisjoint(settings)
    made = _configured(CLIPConfig if is_whole else CLIPVisionConfig, settings, folder)
    vision: Any = made.vision_config if is_whole else made
    size, patch_size = _height_width(vision, folder), _patch_size(vision, folder)
    if vision.hidden_act not in _ACTIVATIONS:
        raise InputError(f"the activation {vision.hidden_act!r} of {folder} is not known here")
    state = state_in(read_content(weights_in(folder, _WEIGHT_FILES)), source=str(folder))
    state = part_with(state, "vision_model.embeddings.class_embedding", source=folder)
    if "embeddings.class_embedding" in state:  # CLIPVisionModel, as transformers 5 saves it
        state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    kept = ("vision_model.", "visual_projection.")
    visual = {
        name: tensor.float()
        for name, tensor in state.items()
        if name.startswith(kept) and not name.endswith("position_ids")
    }
    ours = without_prefix(read_names(visual, TRANSFORMERS_CLIP, source=str(folder)), "image.")
    prepared = _prepared(folder, "clip", size)
    weights = _shaped(
        ours,
        str(folder),
        patch_size=patch_size,
        heads=vision.num_attention_heads,
        activation=_ACTIVATIONS[vision.hidden_act],
        mean=prepared.pixels.mean,
        std=prepared.pixels.std,
        norm_epsilon=vision.layer_norm_eps,
    )
    return replace(weights, preparation=prepared)


def _configured(kind: Any, settings: Mapping[str, Any], folder: Path) -> Any:
    """A configuration of transformers, whose default takes the place of what is left out.

    Raises:
        InputError: if transformers refuses it.
    """
    try:
        return kind(**{name: value for name, value in settings.items() if name != "model_type"})
    except Exception as error:  # noqa: BLE001 - every model checks its settings in its own way
        raise InputError(
            f"the config.json of {folder} describes no model of transformers "
            f"({reason_of(error, last_line=True)}); copy it again"
        ) from None


def _height_width(vit: Any, folder: Path) -> tuple[int, int]:
    return _pair(vit.image_size, "image_size", folder)


def _patch_size(vit: Any, folder: Path) -> int:
    height, width = _pair(vit.patch_size, "patch_size", folder)
    if height != width:
        raise InputError(
            f"the patches of {folder} have {height}x{width} pixels, but towers of this library "
            "have square ones; choose another model"
        )
    return height


def _pair(value: Any, name: str, folder: Path) -> tuple[int, int]:
    """(height, width) of a number or a pair in a config.json."""
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(
            f"the config.json of {folder} has {name} {value}, neither a number of pixels nor a "
            "pair of them; copy it again"
        )
    return sides[0], sides[1]


_BESIDE_A_VIT = ("classifier.", "pooler.", "vit.pooler.", "decoder.")


def _vit_folder(folder: Path, settings: Mapping[str, Any]) -> ImageEncoder:
    """A ``ViTModel``, with classes or without, or a ``ViTMAEForPreTraining``."""
    from transformers import ViTConfig, ViTMAEConfig

    kind = ViTConfig if settings["model_type"] == "vit" else ViTMAEConfig
    vit = _configured(kind, settings, folder)
    if vit.hidden_act not in _ACTIVATIONS:
        raise InputError(f"the activation {vit.hidden_act!r} of {folder} is not known here")
    size = _height_width(vit, folder)
    prepared = _prepared(folder, settings["model_type"], size)
    tower = ImageTower(
        width=vit.hidden_size,
        depth=vit.num_hidden_layers,
        heads=vit.num_attention_heads,
        mlp_width=vit.intermediate_size,
        patch_size=_patch_size(vit, folder),
        image_size=size[0] if size[0] == size[1] else size,
        activation=_ACTIVATIONS[vit.hidden_act],
        norm_epsilon=vit.layer_norm_eps,
        mean=prepared.pixels.mean,
        std=prepared.pixels.std,
    )
    stored = state_in(read_content(weights_in(folder, _WEIGHT_FILES)), source=str(folder))
    state = {name: tensor.float() for name, tensor in stored.items()}
    encoder = {n: t for n, t in state.items() if not n.startswith(_BESIDE_A_VIT)}
    rest = {
        n.replace("classifier.", "head.", 1): t
        for n, t in state.items()
        if n.startswith(("classifier.", "decoder."))
    }
    return ImageEncoder(tower, from_vit_mae(encoder, tower), str(folder), rest, prepared)


def _prepared(folder: Path, model_type: str, size: tuple[int, int]) -> Preparation:
    """How the folder says that images are prepared; says what is taken where it does not."""
    file = transformers_file(folder, model_type=model_type)
    prepared = of_transformers(file, model_type=model_type, size=size)
    if prepared.is_default:
        _LOG.warning(
            "%s does not say how images are prepared (no preprocessor_config.json or "
            "processor_config.json): mean %s and std %s are taken, as is usual for %s",
            folder, *map(list, (prepared.pixels.mean, prepared.pixels.std)), model_type,
        )  # fmt: skip
    return prepared


# ------------------------------------------------------------------------------------------------
# Plain vision transformers


def encoder_of_state(
    state: State, *, source: str, activation: Activation = "gelu", heads: int | None = None
) -> ImageEncoder:
    """The encoder among float32 tensors of DINO, MAE, MILAN and timm; SLIP's visual part.

    Raises:
        InputError: if there is none.
    """
    projection = state.get("image_projection")
    if "visual.patch_embed.proj.weight" in state:
        state = without_prefix(state, "visual.")
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4 or "blocks.0.attn.qkv.weight" not in state:
        raise InputError(
            f"{source} is not an image encoder of a known kind: it holds "
            f"{next(iter(sorted(state)))!r} and no patch projection with blocks behind it"
        )
    rest = {name: t for name, t in state.items() if _BESIDE_THE_ENCODER.fullmatch(name)}
    encoder = {name: tensor for name, tensor in state.items() if name not in rest}
    like = ImageTower(width=4, depth=1, heads=1, mlp_width=4, patch_size=1, image_size=1)
    ours = from_timm(encoder, like)
    if projection is not None:
        ours["projection.weight"] = projection.T.contiguous()
    weights = _shaped(ours, source, patch_size=kernel.shape[-1], heads=heads, activation=activation)
    weights = replace(weights, rest=rest)
    return _with_fixed_table(weights)


def _with_fixed_table(weights: ImageEncoder) -> ImageEncoder:
    """A position table that is that of a masked autoencoder is computed again."""
    if weights.tower.width % 4 or weights.tower.class_token != "with_position":
        return weights
    fixed = replace(weights.tower, positions="sincos")
    distance = (weights.state["pos_embed"] - image_table(fixed)).abs().max()
    if distance <= _TABLE_TOLERANCE:
        kept = {name: t for name, t in weights.state.items() if name != "pos_embed"}
        return replace(weights, tower=fixed, state=kept)
    if "mask_token" in weights.rest:
        _LOG.warning(
            "the position table of %s is up to %.2g away from the fixed one of a masked "
            "autoencoder; it is kept as it is", weights.source, distance,
        )  # fmt: skip
    return weights


def _shaped(
    state: State, source: str, *, patch_size: int, heads: int | None, **options: Any
) -> ImageEncoder:
    """The tower that weights under our names are of, its shape read from theirs.

    Raises:
        InputError: if they do not say it.
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
