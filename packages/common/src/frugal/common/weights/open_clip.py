"""open_clip's models: a folder with ``open_clip_config.json``, or a model name with a file.

What is written is a folder for ``open_clip.create_model_and_transforms("local-dir:FOLDER")``.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.data.tokenizers import ClipBpe, HuggingFace, Tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.data.vocabularies import BytePairs
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.bundle import ImageSpec, ModelBundle
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.fit import misfit
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.preprocess import Preparation, of_open_clip
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImagePooling, ImageTower
from frugal.common.models.weight_names import from_open_clip, to_open_clip
from frugal.common.weights.files import (
    State,
    part_with,
    read_content,
    read_weights,
    state_in,
    weights_in,
)
from frugal.common.weights.folding import fold_patch_bias
from frugal.common.weights.library import (
    NO_TEXT,
    Library,
    Target,
    UnsupportedOption,
    fill,
    refuse_for_folder,
    refuse_larger_than,
    refuse_unknown_ids,
    two_tower_bundle,
)
from frugal.common.weights.openai import NAME as OPENAI
from frugal.common.weights.openai import NUMBERS, is_openai, visual_state
from frugal.common.weights.transformers.tokenizer import CLEAN_UP, as_transformers, save
from frugal.common.weights.wrapped import RowTokenizer, wrap_clip
from frugal.common.weights.written import (
    Embedded,
    TwoTowers,
    embedding_difference,
    two_towers,
    unsupported_projector,
    unsupported_tower,
)

_NAME = "open_clip"
CONFIG = "open_clip_config.json"
_LOG = logging.getLogger("frugal")
WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
_TOP = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias",
    "nonscalar_logit_scale", "custom_text",
}  # fmt: skip
_VISION = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value",
    "patch_dropout", "no_ln_pre", "pos_embed_type", "final_ln_after_pool", "pool_type",
    "act_kwargs", "norm_kwargs",
}  # fmt: skip
_TEXT = {
    "context_length", "vocab_size", "hf_tokenizer_name", "width", "heads", "layers", "mlp_ratio",
    "ls_init_value", "pad_id", "eos_id", "no_causal_mask", "final_ln_after_pool", "pool_type",
    "act_kwargs", "norm_kwargs",
}  # fmt: skip
"""Options that our towers have too; any other that is not at its default makes a model open_clip's
own."""
_IMAGE_POOLING: dict[str, ImagePooling] = {"tok": "class", "avg": "mean"}


def knows(path: Path, name: str | None) -> bool:
    """A folder with open_clip's configuration, or a file and the name of one of its models."""
    if path.is_dir():
        return (path / CONFIG).is_file()
    return name is not None and path.is_file() and _config_of(name) is not None


def load(path: Path, name: str | None, key: str | None) -> ModelBundle:
    """The model of a folder that ``open_clip.create_model("local-dir:...")`` takes, or of a file.

    Raises:
        InputError: if there is none that can be read, or open_clip knows no such name.
    """
    if path.is_dir():
        refuse_for_folder(path, name, key)
        config, preprocess = _described(path)
        return _load(config, preprocess, path, weights_in(path, WEIGHTS), f"local-dir:{path}", key)
    assert name is not None  # knows() has seen it
    known = _config_of(name)
    if known is None:
        import open_clip

        near = [other for other in open_clip.list_models() if other[:5] == name[:5]][:6]
        raise InputError(
            f"open_clip has no model called {name!r}; python -c 'import open_clip; "
            f"print(open_clip.list_models())' lists them{f', such as {near}' if near else ''}"
        )
    return _load(known, {}, path, path, name, key)


def load_image_tower(folder: Path) -> ImageEncoder:
    """The image tower of a folder, whatever its text tower is.

    Raises:
        InputError: if it is incomplete or damaged, or a tower that ours cannot be.
    """
    config, preprocess = _described(folder)
    source = str(folder / CONFIG)
    weights = read_weights(weights_in(folder, WEIGHTS))
    refuse_larger_than(weights, config, source=source)
    prepared = of_open_clip(preprocess, size=image_size(config, source), source=source)
    tower = image_tower(config, prepared, source=source)
    if tower is None:
        raise InputError(
            f"the image tower of {folder} is none of CLIP's plain vision transformers; choose "
            "another one"
        )
    state = visual_state(weights, source=str(folder))
    return ImageEncoder(tower, state, str(folder), preparation=prepared)


def _config_of(name: str) -> dict[str, Any] | None:
    import open_clip

    return open_clip.get_model_config(name.replace("/", "-"))


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``model_cfg`` and ``preprocess_cfg``."""
    path = folder / CONFIG
    try:
        content = parse_json(read_bytes(path))
        config, preprocess = dict(content["model_cfg"]), dict(content.get("preprocess_cfg") or {})
        int(config["embed_dim"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not describe a model ({reason_of(error)}); copy it again"
        ) from None
    return config, preprocess


def _load(
    config: dict[str, Any],
    preprocess: dict[str, Any],
    path: Path,
    weights: Path,
    name: str,
    key: str | None,
) -> ModelBundle:
    content = None if weights.suffix == ".npz" else read_content(weights)
    state: State = {}
    if content is not None:
        state = state_in(content, source=str(weights), key=key)
        state = part_with(state, "logit_scale", source=weights)
        _refuse_contradiction(state, config, name, weights)
        state = {name: tensor for name, tensor in state.items() if name not in NUMBERS}
        refuse_larger_than(state, config, source=name)
    folder = path if path.is_dir() else None
    source = name if folder is None else str(folder / CONFIG)
    size = image_size(config, source)
    prepared = of_open_clip(preprocess, size=size, source=source)
    tokenizer = _tokenizer(config, folder, name)
    towers = None if tokenizer is None else _towers(config, prepared, tokenizer, source=name)
    if tokenizer is None or towers is None:
        meant = None if content is None else state
        return _wrapped(name, weights, meant, size, prepared, path)
    if isinstance(tokenizer, HuggingFace):
        _LOG.warning("%s: %s, which is not done here", name, CLEAN_UP)
    # models with custom_text keep their text tower apart
    state = {n.removeprefix("text."): t for n, t in state.items()}
    if towers.initial_logit_bias is None:  # the model is said to have none
        state.pop("logit_bias", None)
    with torch.device("meta"):
        needed = to_open_clip(DualEncoder(towers).state_dict(), towers)
    if what := misfit(state, needed):
        named = f"open_clip's {name}" if folder is None else f"{folder / CONFIG} says"
        raise InputError(
            f"the weights of {weights} are not of the model it is said to be ({named}): {what}"
        )
    model = fill(towers, from_open_clip(state, towers), source=str(weights))
    return two_tower_bundle(model, towers, tokenizer, prepared, path=path, library=_NAME)


def _refuse_contradiction(
    state: Mapping[str, Tensor], config: Mapping[str, Any], name: str, path: Path
) -> None:
    """Refuse to compute with plain GELU what was trained with quick GELU.

    Raises:
        InputError: if the file is OpenAI's and the name of another activation.
    """
    if config.get("quick_gelu"):
        return
    if name.startswith("local-dir:"):
        way = f"set quick_gelu to true in model_cfg of its {CONFIG}"
    else:
        way = f"give --model {_with_quick_gelu(name)}"
    if is_openai(state):
        raise InputError(
            f"{path} is a file of OpenAI's (it holds input_resolution), whose activation is quick "
            f"GELU, but that of {name} is plain GELU; {way}"
        )
    if any(tensor.dtype == torch.float16 for tensor in state.values()):
        _LOG.warning(
            "%s is in half precision, as OpenAI's files are, whose activation is quick GELU; %s "
            "computes with plain GELU: if the file is OpenAI's, %s", path, name, way,
        )  # fmt: skip


def _with_quick_gelu(name: str) -> str:
    """The name of the same model with OpenAI's activation."""
    quick = f"{name}-quickgelu"
    return OPENAI if _config_of(quick) is None else quick


def image_size(config: Mapping[str, Any], source: str) -> tuple[int, int]:
    """(height, width) that the image tower takes."""
    try:
        size = config["vision_cfg"].get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        if not (isinstance(height, int) and isinstance(width, int)):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{source} does not describe an image tower; copy it again") from None
    return height, width


def _tokenizer(
    config: Mapping[str, Any], folder: Path | None, name: str
) -> ClipBpe | HuggingFace | None:
    """One of ours that gives the same ids to clean captions; None where only open_clip's does."""
    text = config.get("text_cfg") or {}
    if text.get("tokenizer_kwargs") or text.get("tokenizer_mode"):
        return None
    if hub := text.get("hf_tokenizer_name"):
        return HuggingFace(name=hub if folder is None else str(folder))
    return None if folder is None and "siglip" in name.lower() else ClipBpe()


def _towers(
    config: Mapping[str, Any],
    prepared: Preparation,
    tokenizer: ClipBpe | HuggingFace,
    *,
    source: str,
) -> DualEncoderConfig | None:
    """The towers as ours; None where only open_clip has them."""
    from open_clip.model import CLIPTextCfg

    image = image_tower(config, prepared, source=source)
    text: Any = _part(CLIPTextCfg, config, "text_cfg", source)
    text_act = _activation(text.act_kwargs, quick=bool(config.get("quick_gelu")))
    text_pool = {
        "first": "first",
        "last": "last",
        "argmax": "end_of_text",
        "eos": "end_of_text",
    }.get(text.pool_type)
    named = isinstance(tokenizer, HuggingFace)
    misfits = (
        set(config) - _TOP,
        _beyond(text, _TEXT),
        None in (text_act, text_pool),
        set(text.norm_kwargs or {}) - {"eps"},
        named != (text.pool_type == "eos") and text_pool == "end_of_text",
    )
    if image is None or any(misfits):
        return None
    loaded = tokenizer.load()
    refuse_unknown_ids(loaded, text.vocab_size, source=source)
    if text.pool_type == "eos" and loaded.end_id != text.eos_id:
        return None
    words = TextTower(
        **_tower_options(text, text.heads),
        vocabulary=text.vocab_size,
        length=text.context_length,
        pad_id=loaded.pad_id,
        causal=not text.no_causal_mask,
        activation=text_act,  # type: ignore[arg-type]
        pooling=text_pool,  # type: ignore[arg-type]
    )
    bias = config.get("init_logit_bias")
    return DualEncoderConfig(
        image=image,
        text=words,
        embed_dim=config["embed_dim"],
        initial_logit_bias=None if bias is None else float(bias),
    )


def image_tower(
    config: Mapping[str, Any], prepared: Preparation, *, source: str
) -> ImageTower | None:
    """The image tower of a ``model_cfg`` as ours; None where only open_clip has it.

    Raises:
        InputError: if it is none of open_clip's.
    """
    from open_clip.model import CLIPVisionCfg

    vision: Any = _part(CLIPVisionCfg, config, "vision_cfg", source)
    activation = _activation(vision.act_kwargs, quick=bool(config.get("quick_gelu")))
    pooling: ImagePooling | None = _IMAGE_POOLING.get(vision.pool_type)
    is_known = isinstance(vision.layers, int) and not _beyond(vision, _VISION)
    if not is_known or activation is None or pooling is None:
        return None
    if set(vision.norm_kwargs or {}) - {"eps"}:
        return None
    size = vision.image_size
    if any(side % vision.patch_size for side in (size if isinstance(size, list) else [size])):
        return None  # open_clip leaves the pixels beyond the last whole patch out
    return ImageTower(
        **_tower_options(vision, vision.width // vision.head_width),
        patch_size=vision.patch_size,
        image_size=size if isinstance(size, int) else tuple(size),
        mean=prepared.pixels.mean,
        std=prepared.pixels.std,
        patch_bias=False,
        pre_norm=not vision.no_ln_pre,
        activation=activation,
        pooling=pooling,
        norm_after_pooling=vision.final_ln_after_pool and pooling != "class",
    )


def _part(kind: Any, config: Mapping[str, Any], name: str, source: str) -> Any:
    """The settings of one tower with open_clip's defaults."""
    try:
        part = kind(**config[name])
        for number in ("width", "head_width", "heads", "layers", "patch_size"):
            value = getattr(part, number, 1)
            is_stages = number == "layers" and isinstance(value, list | tuple)
            if not (is_stages or (isinstance(value, int) and value > 0)):
                raise InputError(
                    f"the configuration of {source} has {number} {value!r} in {name}, which is no "
                    "positive whole number; copy it again"
                )
        return part
    except (TypeError, KeyError) as error:
        raise InputError(
            f"the configuration of {source} is none of open_clip's: in {name} "
            f"{_unknown_option(error)}"
        ) from None


def _unknown_option(error: Exception) -> str:
    """The option that Python's complaint about an unexpected argument names."""
    named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return f"it has the option {named[1]}" if named else "it has no plain options"


def _beyond(given: Any, known: set[str]) -> bool:
    """Whether an option that we do not have is set."""
    default = type(given)()
    return any(
        getattr(given, item.name) != getattr(default, item.name)
        for item in fields(given)
        if item.name not in known
    )


def _activation(options: Mapping[str, Any] | None, *, quick: bool) -> Activation | None:
    if quick:
        return None if options else "quick_gelu"
    known: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
    return known.get((options or {}).get("approximate", "none")) if len(options or {}) < 2 else None


def _tower_options(part: Any, heads: int) -> dict[str, Any]:
    if not math.isfinite(part.mlp_ratio):
        raise InputError(f"mlp_ratio is {part.mlp_ratio}, must be a number; correct the settings")
    return {
        "width": part.width,
        "depth": part.layers,
        "heads": heads,
        "mlp_width": int(part.width * part.mlp_ratio),
        "layer_scale": part.ls_init_value,
        "norm_epsilon": (part.norm_kwargs or {}).get("eps", 1e-5),
    }


def _tell_resized(state: State, model: Any, weights: Path) -> None:
    """Say which tables of positions open_clip resizes for a model of another size."""
    tables = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("positional_embedding") and name in tables:
            here = tables[name].shape
            if tensor.shape != here:
                _LOG.warning(
                    "%s of %s has %s rows and is resized to %s, as open_clip does it",
                    name, weights, len(tensor), here[0],
                )  # fmt: skip


def _wrapped(
    name: str,
    weights: Path,
    state: State | None,
    size: tuple[int, int],
    prepared: Preparation,
    path: Path,
) -> ModelBundle:
    """open_clip's own model, built without fetching anything and filled from the file.

    Args:
        name: of the model.
        weights: the file.
        state: what of the file is meant; None of a file that open_clip alone reads.
        size: (height, width) in pixels of what its image tower takes.
        prepared: how images are prepared.
        path: the file, or the folder that it lies in.
    """
    import open_clip
    from open_clip.factory import load_checkpoint

    try:
        model = open_clip.create_model(
            name, load_weights=False, pretrained_image=False, pretrained_text=False
        )
        with tempfile.TemporaryDirectory() as aside:
            file = weights
            if state is not None:
                _tell_resized(state, model, weights)
                file = Path(aside) / "state.pt"
                torch.save(state, file)
            load_checkpoint(model, str(file), weights_only=True)
        refuse_not_finite(model.state_dict(), source=str(weights))
        tokenize = open_clip.get_tokenizer(name)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - a hub, a tower of another library, a misfit
        reason = reason_of(error, last_line=True)
        raise InputError(f"{weights} could not be loaded as open_clip's {name}: {reason}") from None
    length = len(tokenize(["a"])[0])
    wrapped = wrap_clip(model, prepared.pixels, size=size, length=length, library=_NAME)
    tokenizer = RowTokenizer(tokenize)
    return two_tower_bundle(wrapped, wrapped.config, tokenizer, prepared, path=path, library=_NAME)


# ------------------------------------------------------------------------------------------------
# Writing

_USAGE = """\
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

On the Hugging Face hub the same works with `hf-hub:NAME` once `hf_tokenizer_name` in
`open_clip_config.json`, where it stands, is that name.
"""


def _usage(towers: TwoTowers) -> str:
    """How to load it, and which captions get other tokens there."""
    if isinstance(towers.tokenizer.vocabulary, BytePairs):
        return _USAGE
    return (
        f"{_USAGE}\nWith such a tokenizer {CLEAN_UP}; this model was towers without that. Captions "
        "in need of it, such as those with curly quotes, `&amp;` or ligatures, get other tokens.\n"
    )


def _unsupported(towers: TwoTowers) -> UnsupportedOption | None:
    """The first option that open_clip cannot express."""
    image, text = towers.config.image, towers.config.text
    quick = [tower.activation == "quick_gelu" for tower in (image, text)]
    if (option := unsupported_projector(image)) is not None:
        return option
    reads_one_caption_token = text.pooling in ("first", "end_of_text")
    if image.class_token == "none":
        return UnsupportedOption(
            "model.image.class_token=none", "its vision transformer always has one"
        )
    if image.pooling == "mean_all":
        return UnsupportedOption(
            "model.image.pooling=mean_all",
            "its vision transformer pools the class token or the mean of the patches without it",
        )
    if any(quick) and not all(quick):
        return UnsupportedOption(
            f"model.{'image' if quick[0] else 'text'}.activation=quick_gelu",
            "both towers have it or none",
        )
    if text.pooling in ("mean", "mean_all"):
        return UnsupportedOption(
            f"model.text.pooling={text.pooling}", "its text transformer reads one token"
        )
    if text.pad_mask and not (text.causal and reads_one_caption_token):
        return UnsupportedOption("model.text.pad_mask", "its text transformer attends to padding")
    if text.pooling == "end_of_text" and not towers.captions_end:
        return UnsupportedOption(
            "model.text.pooling=end_of_text",
            "it needs a token that ends every caption and stands nowhere else, which this "
            "tokenizer has not",
        )
    return None


def model_config(config: DualEncoderConfig, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The ``model_cfg`` of open_clip for towers that open_clip has no unsupported option of.

    Args:
        config: without a bias of the patch projection.
        tokenizer: saved in the same folder; None for CLIP's byte pairs, which open_clip carries.
    """
    image, text = config.image, config.text
    vision_cfg = {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "head_width": image.width // image.heads,
        "no_ln_pre": not image.pre_norm,
        "pos_embed_type": _position_type(image),
        "pool_type": "tok" if image.pooling == "class" else "avg",
        "final_ln_after_pool": image.pooling != "class" and image.norm_after_pooling,
    }
    pool_type = {"first": "first", "last": "last", "end_of_text": "argmax"}[text.pooling]
    text_cfg = {
        "context_length": text.length,
        "vocab_size": text.vocabulary,
        "heads": text.heads,
        "no_causal_mask": not text.causal,
        "pool_type": pool_type,
    }
    if tokenizer is not None:
        # open_clip looks into the folder as soon as a name is given, whatever the name
        text_cfg["hf_tokenizer_name"] = "in-this-folder"
    if tokenizer is not None and pool_type == "argmax":
        text_cfg |= {"pool_type": "eos", "eos_id": tokenizer.end_id}
    whole = {
        "embed_dim": config.embed_dim,
        "vision_cfg": vision_cfg | _transformer(image),
        "text_cfg": text_cfg | _transformer(text),
        "quick_gelu": image.activation == "quick_gelu",
        "init_logit_scale": config.initial_logit_scale,
    }
    if config.initial_logit_bias is not None:
        whole["init_logit_bias"] = config.initial_logit_bias
    return whole


def _position_type(image: ImageTower) -> str:
    """The weights hold any table; one of open_clip's own kind stays fixed when it trains on."""
    is_square = image.grid[0] == image.grid[1]
    return "sin_cos_2d" if image.positions == "sincos" and is_square else "learnable"


def _transformer(tower: ImageTower | TextTower) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "width": tower.width,
        "layers": tower.depth,
        "mlp_ratio": _ratio(tower.mlp_width, tower.width),
        "ls_init_value": tower.layer_scale,
    }
    if tower.activation == "gelu_tanh":
        settings["act_kwargs"] = {"approximate": "tanh"}
    if tower.norm_epsilon != torch.nn.LayerNorm(1).eps:
        settings["norm_kwargs"] = {"eps": tower.norm_epsilon}
    return settings


def _ratio(mlp_width: int, width: int) -> float:
    """What open_clip multiplies with the width and rounds down."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def nearest_crop(crop: CenterCrop, image: ImageSpec) -> CenterCrop:
    """The nearest to a crop that open_clip has."""
    height, width = image.height_width
    is_stretched = crop.order == "stretch"
    has_bicubic_alone = height != width and not is_stretched
    is_bilinear = crop.interpolation == "bilinear" and not has_bicubic_alone
    return CenterCrop(
        order="stretch" if is_stretched else "resize_first",
        interpolation="bilinear" if is_bilinear else "bicubic",
    )


def target(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    """How a dual encoder is written for open_clip."""
    del to  # there is one
    if bundle.text is None:
        return NO_TEXT
    towers = two_towers(bundle)
    return (
        unsupported_tower(bundle, "image", "text")
        or _unsupported(towers)
        or Target(
            usage=_usage(towers),
            write=lambda folder: write(towers, folder),
            difference=lambda folder: embedding_difference(bundle, embed, folder),
            transform=nearest_crop(bundle.transform, bundle.image),
        )
    )


def write(towers: TwoTowers, folder: Path) -> None:
    """Weights, configuration and tokenizer."""
    state, config = fold_patch_bias(towers.model.state_dict(), towers.config)
    save_file(
        to_open_clip(state, config),
        folder / "open_clip_model.safetensors",
        metadata={"format": "pt"},
    )
    save(as_transformers(towers.tokenizer, length=config.text.length), folder)
    crop = nearest_crop(towers.transform, config.image)
    is_carried = isinstance(towers.tokenizer.vocabulary, BytePairs)  # by open_clip itself
    content = {
        "model_cfg": model_config(config, None if is_carried else towers.tokenizer),
        "preprocess_cfg": {
            "mean": config.image.mean,
            "std": config.image.std,
            "interpolation": crop.interpolation,
            "resize_mode": "squash" if crop.order == "stretch" else "shortest",
        },
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def embed(folder: Path, pictures: Tensor, captions: list[str]) -> Embedded:
    """What open_clip makes of (B, 3, H, W) uint8 pictures and of captions with this folder."""
    import open_clip
    from PIL import Image

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    model.eval()
    logit = (
        [model.logit_scale] if model.logit_bias is None else [model.logit_scale, model.logit_bias]
    )
    return Embedded(
        model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True),
        model.encode_text(open_clip.get_tokenizer(name)(captions), normalize=True),
        torch.stack(logit),
    )


LIBRARY = Library(
    name=_NAME,
    knows=knows,
    load=load,
    image_tower=load_image_tower,
    targets=("open_clip",),
    target=target,
)
