"""A folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.vocabularies import BytePairs
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_open_clip
from frugal.common.weights.folding import fold_patch_bias
from frugal.common.weights.transformers_tokenizer import CLEAN_UP, as_transformers, save
from frugal.common.weights.written import (
    Embedded,
    TwoTowers,
    UnsupportedOption,
    nearest_crop,
    unsupported_projector,
)

USAGE = """\
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

On the Hugging Face hub the same works with `hf-hub:NAME` once `hf_tokenizer_name` in
`open_clip_config.json`, where it stands, is that name.
"""


def usage(towers: TwoTowers) -> str:
    """How to load it, and which captions get other tokens there."""
    if isinstance(towers.tokenizer.vocabulary, BytePairs):
        return USAGE
    return (
        f"{USAGE}\nWith such a tokenizer {CLEAN_UP}; this model was towers without that. Captions "
        "in need of it, such as those with curly quotes, `&amp;` or ligatures, get other tokens.\n"
    )


def unsupported(towers: TwoTowers) -> UnsupportedOption | None:
    """The first option that open_clip cannot express."""
    image, text = towers.config.image, towers.config.text
    quick = [tower.activation == "quick_gelu" for tower in (image, text)]
    if (found := unsupported_projector(image)) is not None:
        return found
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
    """The ``model_cfg`` of open_clip for towers that :func:`unsupported` has nothing to say about.

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


def write(towers: TwoTowers, folder: Path) -> None:
    """Weights, configuration and tokenizer."""
    state, config = fold_patch_bias(towers.model.state_dict(), towers.config)
    save_file(
        to_open_clip(state, config),
        folder / "open_clip_model.safetensors",
        metadata={"format": "pt"},
    )
    save(as_transformers(towers.tokenizer, length=config.text.length), folder)
    crop = nearest_crop(towers.transform, config.image, "open_clip")
    is_carried = isinstance(towers.tokenizer.vocabulary, BytePairs)  # by open_clip itself
    own = None if is_carried else towers.tokenizer
    content = {
        "model_cfg": model_config(config, own),
        "preprocess_cfg": {
            "mean": config.image.mean,
            "std": config.image.std,
            "interpolation": crop.interpolation,
            "resize_mode": "squash" if crop.order == "stretch" else "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")


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
