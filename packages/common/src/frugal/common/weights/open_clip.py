"""open_clip's models: a folder with ``open_clip_config.json``, or a model name with a file."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.data.tokenizers import ClipBpe, HuggingFace
from frugal.common.errors import InputError
from frugal.common.files import parse_json, reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.fit import misfit
from frugal.common.models.preprocess import Preparation, of_open_clip
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImagePooling, ImageTower
from frugal.common.models.weight_names import from_open_clip, to_open_clip
from frugal.common.weights.files import (
    State,
    part_with,
    read_content,
    state_in,
    weights_in,
)
from frugal.common.weights.libraries import (
    OPEN_CLIP_CONFIG,
    OPENAI,
    Foreign,
    fill,
    refuse_unknown_ids,
)
from frugal.common.weights.openai import NUMBERS, is_openai
from frugal.common.weights.transformers_tokenizer import CLEAN_UP
from frugal.common.weights.wrapped import (
    RowTokenizer,
    Wrapped,
    WrappedImage,
    WrappedModel,
    WrappedText,
)

LIBRARY = "open_clip"
_LOG = logging.getLogger("frugal")
_WEIGHTS = (
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


def load_folder(folder: Path) -> Foreign:
    """The model of a folder that ``open_clip.create_model("local-dir:...")`` takes.

    Raises:
        InputError: if the folder is incomplete or damaged.
    """
    path = folder / OPEN_CLIP_CONFIG
    try:
        content = parse_json(path.read_bytes())
        config, preprocess = dict(content["model_cfg"]), dict(content.get("preprocess_cfg") or {})
        int(config["embed_dim"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not describe a model ({reason_of(error)}); copy it again"
        ) from None
    weights = weights_in(folder, _WEIGHTS)
    return _load(config, preprocess, weights, folder=folder, name=f"local-dir:{folder}")


def load_named(name: str, path: Path, *, key: str | None = None) -> Foreign:
    """A checkpoint file as the model of this name, prepared as open_clip prepares such a file.

    Args:
        name: open_clip's, of the model.
        path: the file.
        key: which of several sets of weights in it.

    Raises:
        InputError: if open_clip knows no such model, or the file is of another one.
    """
    import open_clip

    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        near = [known for known in open_clip.list_models() if known[:5] == name[:5]][:6]
        raise InputError(
            f"open_clip has no model called {name!r}; python -c 'import open_clip; "
            f"print(open_clip.list_models())' lists them{f', such as {near}' if near else ''}"
        )
    return _load(config, {}, path, folder=None, name=name, key=key)


def _load(
    config: dict[str, Any],
    preprocess: dict[str, Any],
    weights: Path,
    *,
    folder: Path | None,
    name: str,
    key: str | None = None,
) -> Foreign:
    content = None if weights.suffix == ".npz" else read_content(weights)
    state: State = {}
    if content is not None:
        state = state_in(content, source=str(weights), key=key)
        state = part_with(state, "logit_scale", source=weights)
        _refuse_contradiction(state, config, name, weights)
        state = {name: tensor for name, tensor in state.items() if name not in NUMBERS}
    source = name if folder is None else str(folder / OPEN_CLIP_CONFIG)
    size = image_size(config, source)
    prepared = of_open_clip(preprocess, size=size, source=source)
    tokenizer = _tokenizer(config, folder, name)
    ours = None if tokenizer is None else _towers(config, prepared, tokenizer, source=name)
    if ours is None:
        return _wrapped(name, weights, None if content is None else state, size, prepared)
    if isinstance(tokenizer, HuggingFace):
        _LOG.warning("%s: %s, which is not done here", name, CLEAN_UP)
    state = {n.removeprefix("text.") if _is_text(n) else n: t for n, t in state.items()}
    state = _fitting(state, ours)
    with torch.device("meta"):
        wanted = to_open_clip(DualEncoder(ours).state_dict(), ours)
    if what := misfit(state, wanted):
        said = f"open_clip's {name}" if folder is None else f"{folder / OPEN_CLIP_CONFIG} says"
        raise InputError(
            f"the weights of {weights} are not of the model it is said to be ({said}): {what}"
        )
    model = fill(ours, from_open_clip(state, ours), source=str(weights))
    return Foreign(
        model=model,
        config=ours,
        tokenizer=tokenizer,
        crop=prepared.crop,
        told_by=prepared.told_by,
        library=LIBRARY,
    )


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
        way = f"set quick_gelu to true in model_cfg of its {OPEN_CLIP_CONFIG}"
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
    import open_clip

    quick = f"{name}-quickgelu"
    known = open_clip.get_model_config(quick.replace("/", "-")) is not None
    return quick if known else OPENAI


def _is_text(name: str) -> bool:
    """Models with ``custom_text`` keep their text tower apart."""
    return name.startswith("text.")


def _fitting(state: dict[str, Tensor], config: DualEncoderConfig) -> dict[str, Tensor]:
    """Without a bias of the logits where the model is said to have none."""
    if config.initial_logit_bias is None:
        return {name: tensor for name, tensor in state.items() if name != "logit_bias"}
    return state


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
        **_transformer(text, text.heads),
        vocabulary=text.vocab_size,
        length=text.context_length,
        pad_id=loaded.pad_id,
        causal=not text.no_causal_mask,
        activation=text_act,  # type: ignore[arg-type]
        pooling=text_pool,  # type: ignore[arg-type]
    )
    bias = config.get("init_logit_bias")
    return DualEncoderConfig(
        image=image, text=words, embed_dim=config["embed_dim"], initial_logit_bias=bias
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
    return ImageTower(
        **_transformer(vision, vision.width // vision.head_width),
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
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return f"it has the option {found[1]}" if found else "it has no plain options"


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


def _transformer(part: Any, heads: int) -> dict[str, Any]:
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
    wanted = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("positional_embedding") and name in wanted:
            here = wanted[name].shape
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
) -> Foreign:
    """open_clip's own model, built without fetching anything and filled from the file.

    Args:
        name: of the model.
        weights: the file.
        state: what of the file is meant; None of a file that open_clip alone reads.
        size: (height, width) in pixels of what its image tower takes.
        prepared: how images are prepared.
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
    config = WrappedModel(
        library=LIBRARY,
        image=WrappedImage(height_width=size, mean=prepared.pixels.mean, std=prepared.pixels.std),
        text=WrappedText(length=len(tokenize(["a"])[0])),
    )
    wrapped = Wrapped(
        model.float(),
        config,
        image=lambda model, images: model.encode_image(images),
        text=lambda model, token_ids, lengths: model.encode_text(token_ids),
    )
    return Foreign(
        model=wrapped.eval(),
        config=config,
        tokenizer=RowTokenizer(tokenize),
        crop=prepared.crop,
        told_by=prepared.told_by,
        library=LIBRARY,
    )
