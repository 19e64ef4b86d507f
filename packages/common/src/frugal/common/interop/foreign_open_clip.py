"""open_clip's models: a folder with ``open_clip_config.json``, or a model name with a file."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.data.tokenizers import ClipBpe, HuggingFace
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.interop.foreign_models import OPEN_CLIP_CONFIG, OPENAI, Foreign, fill
from frugal.common.interop.foreign_openai import NUMBERS, is_openai
from frugal.common.interop.foreign_wrapped import (
    RowTokenizer,
    Wrapped,
    WrappedImage,
    WrappedModel,
    WrappedText,
)
from frugal.common.interop.stored_files import (
    State,
    part_with,
    read_content,
    state_in,
    weights_in,
)
from frugal.common.models.config import Activation, DualEncoderConfig, ImageTower, TextTower
from frugal.common.models.dual_encoder import DualEncoder
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.fit import misfit
from frugal.common.models.weight_names import from_open_clip, to_open_clip

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


def load_folder(folder: Path) -> Foreign:
    """The model of a folder that ``open_clip.create_model("local-dir:...")`` takes.

    Raises:
        InputError: if the folder is incomplete or damaged.
    """
    path = folder / OPEN_CLIP_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config, preprocess = dict(content["model_cfg"]), dict(content.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not describe a model ({error}); copy it again") from None
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
    merged = _preprocessing(config, preprocess, source=str(folder or name))
    crop = _crop(merged, source=str(folder or name))
    tokenizer = _tokenizer(config, folder, name)
    ours = None if tokenizer is None else _towers(config, merged, tokenizer, source=name)
    if ours is None:
        plain = content is None or _open_clip_reads(content, state)
        return _wrapped(name, weights, None if plain else state, merged, crop)
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
    return Foreign(model=model, config=ours, tokenizer=tokenizer, crop=crop, library=LIBRARY)


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


def _open_clip_reads(content: Mapping[str, Any], state: State) -> bool:
    """Whether open_clip's own reader finds these tensors in a file, and nothing else."""
    read = content.get("state_dict", content)
    names = {name.removeprefix("module."): tensor for name, tensor in read.items()}
    return names.keys() == state.keys() and all(names[n] is state[n] for n in state)


def _is_text(name: str) -> bool:
    """Models with ``custom_text`` keep their text tower apart."""
    return name.startswith("text.")


def _fitting(state: dict[str, Tensor], config: DualEncoderConfig) -> dict[str, Tensor]:
    """Without a bias of the logits where the model is said to have none."""
    if config.initial_logit_bias is None:
        return {name: tensor for name, tensor in state.items() if name != "logit_bias"}
    return state


def _preprocessing(
    config: Mapping[str, Any], given: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    """open_clip's defaults under what a folder says; the size is the model's."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    try:
        size = config["vision_cfg"].get("image_size", 224)
        return merge_preprocess_dict(asdict(PreprocessCfg()), {**given, "size": size})
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{source} does not describe an image tower; copy it again") from None


def _crop(preprocess: Mapping[str, Any], *, source: str) -> CenterCrop:
    order = {"shortest": "resize_first", "squash": "stretch"}.get(preprocess["resize_mode"])
    interpolation = preprocess["interpolation"]
    if interpolation == "random":  # in training; open_clip evaluates such models with bicubic
        interpolation = "bicubic"
    if order is None or interpolation not in ("bicubic", "bilinear"):
        raise InputError(
            f"{source} prepares images with resize_mode={preprocess['resize_mode']} and "
            f"interpolation={interpolation}; shortest and squash, bicubic and bilinear are known"
        )
    return CenterCrop(order=order, interpolation=interpolation)  # type: ignore[arg-type]


def _tokenizer(
    config: Mapping[str, Any], folder: Path | None, name: str
) -> ClipBpe | HuggingFace | None:
    """One of ours that gives the same ids; None where only open_clip's own does."""
    text = config.get("text_cfg") or {}
    if text.get("tokenizer_kwargs") or text.get("tokenizer_mode"):
        return None
    if hub := text.get("hf_tokenizer_name"):
        return HuggingFace(name=hub if folder is None else str(folder))
    return None if folder is None and "siglip" in name.lower() else ClipBpe()


def _towers(
    config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    tokenizer: ClipBpe | HuggingFace,
    *,
    source: str,
) -> DualEncoderConfig | None:
    """The towers as ours; None where only open_clip has them."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    try:
        vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    except TypeError as error:
        raise InputError(f"the configuration of {source} is none of open_clip's: {error}") from None
    quick = bool(config.get("quick_gelu"))
    image_act, text_act = (_activation(part.act_kwargs, quick=quick) for part in (vision, text))
    image_pool = {"tok": "class", "avg": "mean"}.get(vision.pool_type)
    text_pool = {
        "first": "first",
        "last": "last",
        "argmax": "end_of_text",
        "eos": "end_of_text",
    }.get(text.pool_type)
    named = isinstance(tokenizer, HuggingFace)
    misfits = (
        set(config) - _TOP,
        _beyond(vision, _VISION) or _beyond(text, _TEXT),
        not isinstance(vision.layers, int),
        None in (image_act, text_act, image_pool, text_pool),
        any(set(part.norm_kwargs or {}) - {"eps"} for part in (vision, text)),
        named != (text.pool_type == "eos") and text_pool == "end_of_text",
    )
    if any(misfits):
        return None
    loaded = tokenizer.load()
    if text.pool_type == "eos" and loaded.end_id != text.eos_id:
        return None
    size = vision.image_size
    image = ImageTower(
        **_transformer(vision, vision.width // vision.head_width),
        patch_size=vision.patch_size,
        image_size=size if isinstance(size, int) else tuple(size),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        patch_bias=False,
        pre_norm=not vision.no_ln_pre,
        activation=image_act,  # type: ignore[arg-type]
        pooling=image_pool,  # type: ignore[arg-type]
        norm_after_pooling=vision.final_ln_after_pool and image_pool != "class",
    )
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


def _wrapped(
    name: str,
    weights: Path,
    state: State | None,
    preprocess: Mapping[str, Any],
    crop: CenterCrop,
) -> Foreign:
    """open_clip's own model, built without fetching anything and filled from the file.

    Args:
        name: of the model.
        weights: the file.
        state: what of the file is meant, where open_clip would read something else.
        preprocess: how images are prepared.
        crop: the same.
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
                file = Path(aside) / "state.pt"
                torch.save(state, file)
            load_checkpoint(model, str(file), weights_only=True)
        refuse_not_finite(model.state_dict(), source=str(weights))
        tokenize = open_clip.get_tokenizer(name)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - a hub, a tower of another library, a misfit
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else error
        raise InputError(f"{weights} could not be loaded as open_clip's {name}: {reason}") from None
    size = preprocess["size"]
    config = WrappedModel(
        library=LIBRARY,
        image=WrappedImage(
            height_width=(size, size) if isinstance(size, int) else tuple(size),
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
        ),
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
        crop=crop,
        library=LIBRARY,
    )
