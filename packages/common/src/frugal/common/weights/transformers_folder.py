"""A folder that ``CLIPModel.from_pretrained`` and ``CLIPProcessor.from_pretrained`` load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F  # noqa: N812 -- the name everyone knows
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_transformers_clip
from frugal.common.weights.folding import fold_layer_scale, fold_patch_bias
from frugal.common.weights.transformers_tokenizer import as_transformers, save
from frugal.common.weights.written import (
    Embedded,
    TwoTowers,
    UnsupportedOption,
    nearest_crop,
    unsupported_projector,
)

USAGE = """\
```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER")
processor = CLIPProcessor.from_pretrained("FOLDER")
```

Its crop lies one pixel beside that of the numbers below where the margin is an odd number of
pixels: transformers rounds half a pixel down.
"""
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
_RESAMPLING = {
    "nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5,
}  # fmt: skip
"""Pillow's numbers."""
_ARGMAX = 2
"""An end-of-text id that CLIPModel takes for "the highest id", for its oldest configurations."""


def unsupported(towers: TwoTowers) -> UnsupportedOption | None:
    """The first option that ``CLIPModel`` cannot express."""
    config, image, text = towers.config, towers.config.image, towers.config.text
    if (found := unsupported_projector(image)) is not None:
        return found
    if image.class_token == "none":
        return UnsupportedOption("model.image.class_token=none", "CLIPModel always has one")
    if image.pooling != "class":
        return UnsupportedOption(
            f"model.image.pooling={image.pooling}", "CLIPModel pools the class token"
        )
    if not image.pre_norm:
        return UnsupportedOption(
            "model.image.pre_norm=False", "CLIPModel has a norm before the blocks"
        )
    if image.grid[0] != image.grid[1]:
        return UnsupportedOption(
            f"model.image.image_size={image.image_size}", "CLIPModel takes square images"
        )
    if (found := unsupported_text(text)) is not None:
        return found
    if config.initial_logit_bias is not None:
        return UnsupportedOption(
            "model.initial_logit_bias", "CLIPModel's logits have a scale and no bias"
        )
    return unsupported_tokenizer(towers)


def unsupported_text(text: TextTower) -> UnsupportedOption | None:
    """The first option of a text tower that ``CLIPTextModel`` cannot express."""
    if not text.causal:
        return UnsupportedOption("model.text.causal=False", "CLIPModel's text tower is causal")
    if text.pooling != "end_of_text":
        return UnsupportedOption(
            f"model.text.pooling={text.pooling}", "CLIPModel pools the end-of-text token"
        )
    return None


def unsupported_tokenizer(towers: TwoTowers) -> UnsupportedOption | None:
    """Captions whose end ``CLIPTextModel`` cannot find."""
    if not towers.captions_end or towers.tokenizer.end_id == _ARGMAX:
        return UnsupportedOption(
            "data.tokenizer",
            "CLIPModel needs a token that ends every caption, stands nowhere else and has not the "
            f"number {_ARGMAX}; here it is {towers.tokenizer.end_id}",
        )
    return None


def model_config(config: DualEncoderConfig, **token_ids: Any) -> Any:
    """The ``CLIPConfig`` for towers that :func:`unsupported` has nothing to say about.

    Args:
        config: without a bias of the patch projection and layer scales.
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``.
    """
    from transformers import CLIPConfig

    image, text = config.image, config.text
    return CLIPConfig(
        vision_config={
            **_transformer(image, config.embed_dim),
            "image_size": image.height_width[0],
            "patch_size": image.patch_size,
        },
        text_config=text_config(text, config.embed_dim, **token_ids),
        projection_dim=config.embed_dim,
        logit_scale_init_value=config.initial_logit_scale,
        architectures=["CLIPModel"],
    )


def text_config(text: TextTower, embed_dim: int, **token_ids: Any) -> dict[str, Any]:
    """The fields of a ``CLIPTextConfig``."""
    return {
        **_transformer(text, embed_dim),
        "vocab_size": text.vocabulary,
        "max_position_embeddings": text.length,
        **token_ids,
    }


def _transformer(tower: ImageTower | TextTower, embed_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_epsilon,
        "projection_dim": embed_dim,
    }


def write(towers: TwoTowers, folder: Path) -> None:
    """Weights, configuration, and a processor with its tokenizer."""
    from transformers import CLIPProcessor

    state, config = fold_patch_bias(towers.model.state_dict(), towers.config)
    state, config = fold_layer_scale(state, config)
    save_file(
        to_transformers_clip(state, config), folder / "model.safetensors", metadata={"format": "pt"}
    )
    theirs = as_transformers(towers.tokenizer, length=config.text.length)
    model_config(config, **token_ids(towers.tokenizer)).save_pretrained(folder)
    pixels = image_processor(towers.transform, config.image)
    CLIPProcessor(image_processor=pixels, tokenizer=theirs).save_pretrained(folder)
    save(theirs, folder)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a ``CLIPTextConfig`` says of a tokenizer."""
    ids = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    return ids | ({"bos_token_id": tokenizer.prefix[0]} if tokenizer.prefix else {})


def image_processor(transform: CenterCrop, tower: ImageTower) -> Any:
    """What brings pictures to the size of a tower and normalizes them, as in evaluations."""
    from transformers import CLIPImageProcessor

    crop = nearest_crop(transform, tower, "transformers")
    height, width = tower.height_width
    rows, columns = (int(side / crop.share + 1e-9) for side in (height, width))
    is_stretched = crop.order == "stretch"
    return CLIPImageProcessor(
        size={"height": rows, "width": columns} if is_stretched else {"shortest_edge": rows},
        crop_size={"height": height, "width": width},
        do_center_crop=(rows, columns) != (height, width) or not is_stretched,
        resample=_RESAMPLING[crop.interpolation],
        image_mean=tower.mean,
        image_std=tower.std,
    )


def embed(folder: Path, pictures: Tensor, captions: list[str]) -> Embedded:
    """What transformers makes of (B, 3, H, W) uint8 pictures and of captions with this folder."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(
        images=list(pictures), text=captions, padding=True, truncation=True, return_tensors="pt"
    )
    made = model(**inputs)
    return Embedded(
        F.normalize(made.image_embeds, dim=-1),
        F.normalize(made.text_embeds, dim=-1),
        model.logit_scale.reshape(1),
    )
