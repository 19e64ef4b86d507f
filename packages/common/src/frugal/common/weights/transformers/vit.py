"""transformers' ``ViTModel`` as an image tower, and a tower as a ``ViTModel`` or ``BeitModel``.

A classifier's linear layer comes and goes with its tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import State, from_vit_mae, to_vit_mae
from frugal.common.weights.folding import fold_layer_scales
from frugal.common.weights.library import Target, UnsupportedOption
from frugal.common.weights.transformers.config_files import (
    block_settings,
    blocks_of,
    configured,
    height_width,
    image_processor,
    labels,
    nearest_crop,
    patch_size,
    preparation_of,
    processed,
    weights_of,
)
from frugal.common.weights.written import Seen, tower_difference

_BESIDE_A_VIT = ("classifier.", "pooler.", "vit.pooler.", "decoder.")
_USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("FOLDER", add_pooling_layer=False)
processor = AutoImageProcessor.from_pretrained("FOLDER")
tokens = model(**processor(images, return_tensors="pt")).last_hidden_state
```
"""
_CLASSIFIER_USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
scores = model(**processor(images, return_tensors="pt")).logits
```
"""


# ------------------------------------------------------------------------------------------------
# Reading


def load_image_tower(folder: Path, settings: Mapping[str, Any]) -> ImageEncoder:
    """A ``ViTModel``, with classes or without, or a ``ViTMAEForPreTraining``.

    Args:
        folder: that holds it.
        settings: its config.json.

    Raises:
        InputError: if it is incomplete or damaged, or ours cannot be such a tower.
    """
    from transformers import ViTConfig, ViTMAEConfig

    kind = ViTConfig if settings["model_type"] == "vit" else ViTMAEConfig
    vit = configured(kind, settings, folder)
    blocks = blocks_of(vit, folder)
    size = height_width(vit, folder)
    prepared = preparation_of(folder, settings["model_type"], size)
    tower = ImageTower(
        **blocks,
        patch_size=patch_size(vit, folder),
        image_size=size[0] if size[0] == size[1] else size,
        mean=prepared.pixels.mean,
        std=prepared.pixels.std,
    )
    state = {name: tensor.float() for name, tensor in weights_of(folder).items()}
    encoder = {n: t for n, t in state.items() if not n.startswith(_BESIDE_A_VIT)}
    rest = {
        n.replace("classifier.", "head.", 1): t
        for n, t in state.items()
        if n.startswith(("classifier.", "decoder."))
    }
    named = from_vit_mae(encoder, tower)
    guessed = ("mean", "std") if prepared.is_default else ()
    return ImageEncoder(tower, named, str(folder), rest, prepared, guessed)


# ------------------------------------------------------------------------------------------------
# Writing a ViT


def target(encoder: ImageEncoder) -> Target | UnsupportedOption:
    """How an image tower is written as a ``ViTModel``."""
    return _unsupported(encoder) or Target(
        usage=_USAGE if encoder.head is None else _CLASSIFIER_USAGE,
        write=lambda folder: _write(encoder, folder),
        difference=lambda folder: tower_difference(encoder, _see, folder),
        transform=nearest_crop(encoder.transform, encoder.tower),
    )


def _unsupported(encoder: ImageEncoder) -> UnsupportedOption | None:
    """The first option that ``ViTModel`` cannot express."""
    if (option := unsupported_tower(encoder.tower)) is not None:
        return option
    if encoder.tower.norm_after_pooling or not encoder.has_norm:
        field = "norm_after_pooling=True" if encoder.has_norm else "norm"
        return UnsupportedOption(f"model.image.{field}", "ViTModel's last norm acts on every token")
    if encoder.head is not None and encoder.tower.pooling != "class":
        return UnsupportedOption(
            f"model.image.pooling={encoder.tower.pooling}",
            "ViTForImageClassification reads the class token",
        )
    return None


def unsupported_tower(tower: ImageTower) -> UnsupportedOption | None:
    """The first option of what comes before the last norm that it cannot express."""
    if tower.class_token == "none":
        return UnsupportedOption("model.image.class_token=none", "ViTModel always has one")
    if tower.pre_norm:
        return UnsupportedOption(
            "model.image.pre_norm=True", "ViTModel has no norm before the blocks"
        )
    return None


def _write(encoder: ImageEncoder, folder: Path) -> None:
    """Weights, configuration and image processor."""
    from transformers import ViTConfig

    state = encoder_state(encoder)
    settings = transformer_settings(encoder.tower)
    if encoder.head is None:
        settings["architectures"] = ["ViTModel"]
    else:
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
        weight, bias = encoder.head
        state |= {"classifier.weight": weight.contiguous(), "classifier.bias": bias}
        settings |= {"architectures": ["ViTForImageClassification"], **labels(len(bias))}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ViTConfig(**settings).save_pretrained(folder)
    image_processor(encoder.transform, encoder.tower).save_pretrained(folder)


def encoder_state(encoder: ImageEncoder) -> State:
    """The tower by the names of checkpoints."""
    return to_vit_mae(_plain_state(encoder), encoder.tower, published=True)


def _plain_state(encoder: ImageEncoder) -> State:
    """The tower by our names, without layer scales and with a patch bias, if only of zeros."""
    state = fold_layer_scales(encoder.state)
    state.setdefault("patch_embed.bias", torch.zeros(encoder.tower.width))
    return state


def transformer_settings(tower: ImageTower) -> dict[str, Any]:
    """The fields of a ``ViTConfig`` or ``ViTMAEConfig`` that say what the tower is like."""
    height, width = tower.height_width
    return {
        **block_settings(tower),
        "image_size": height if height == width else (height, width),
        "patch_size": tower.patch_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _see(folder: Path, pictures: Tensor) -> Seen:
    """What transformers makes of (B, 3, H, W) uint8 pictures with this folder."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    pixels = processed(folder, pictures)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokens = model(pixel_values=pixels).last_hidden_state
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    if not architecture.endswith("ForImageClassification"):
        return Seen(None, tokens)
    classifier = AutoModelForImageClassification.from_pretrained(folder).eval()
    return Seen(classifier(pixel_values=pixels).logits, tokens)


# ------------------------------------------------------------------------------------------------
# Writing a BEiT


def beit_target(encoder: ImageEncoder) -> Target | UnsupportedOption:
    """How an image tower is written as a ``BeitModel``.

    BEiT without relative positions is a plain vision transformer with two differences: its last
    norm may act on the mean of the patches, as it does in fine-tuned masked autoencoders, and keys
    have no bias. One would change nothing: it adds the same number to all scores of a query.
    """
    return _unsupported_beit(encoder) or Target(
        usage=_beit_usage(encoder.tower) if encoder.head is None else _CLASSIFIER_USAGE,
        write=lambda folder: _write_beit(encoder, folder),
        difference=lambda folder: tower_difference(encoder, _see, folder),
        transform=nearest_crop(encoder.transform, encoder.tower),
    )


def _beit_usage(tower: ImageTower) -> str:
    """How to load FOLDER, in Markdown."""
    return f"""\
```python
from transformers import AutoImageProcessor, AutoModel, BeitBackbone

model = AutoModel.from_pretrained("FOLDER")
backbone = BeitBackbone.from_pretrained("FOLDER", out_indices=[{tower.depth}])  # outputs of blocks
processor = AutoImageProcessor.from_pretrained("FOLDER")
tokens = model(**processor(images, return_tensors="pt")).last_hidden_state
```
"""


def _unsupported_beit(encoder: ImageEncoder) -> UnsupportedOption | None:
    """The first option that ``BeitModel`` or ``BeitForImageClassification`` cannot express."""
    tower = encoder.tower
    if (option := unsupported_blocks(tower)) is not None:
        return option
    if not encoder.has_norm:
        return UnsupportedOption("model.image.norm", "BeitModel has a norm behind its last block")
    of_mean = tower.pooling == "mean" and tower.norm_after_pooling
    if tower.norm_after_pooling and not of_mean:
        return UnsupportedOption(
            f"model.image.pooling={tower.pooling}",
            "a norm behind the pooling of BeitModel acts on the mean of the patches",
        )
    if encoder.head is not None and not of_mean and tower.pooling != "class":
        return UnsupportedOption(
            f"model.image.pooling={tower.pooling}",
            "BeitForImageClassification reads the class token or the norm of the patches' mean",
        )
    return None


def unsupported_blocks(tower: ImageTower) -> UnsupportedOption | None:
    """The first option of what comes before the last norm that BEiT cannot express."""
    if tower.grid[0] != tower.grid[1]:
        return UnsupportedOption(
            f"model.image.image_size={tower.image_size}",
            "a BEiT with one position for every patch takes square images",
        )
    return unsupported_tower(tower)


def _write_beit(encoder: ImageEncoder, folder: Path) -> None:
    """Weights, configuration and image processor."""
    from transformers import BeitConfig, BeitForImageClassification, BeitModel

    tower, state = encoder.tower, block_state(encoder)
    settings = beit_settings(tower, use_mean_pooling=tower.norm_after_pooling)
    if tower.norm_after_pooling:
        for leaf in ("weight", "bias"):
            state[f"pooler.layernorm.{leaf}"] = state.pop(f"layernorm.{leaf}")
    if encoder.head is None:
        model: Any = BeitModel(BeitConfig(**settings))
    else:
        weight, bias = encoder.head
        state = {f"beit.{name}": tensor for name, tensor in state.items()}
        state |= {"classifier.weight": weight, "classifier.bias": bias}
        settings |= labels(len(bias))
        model = BeitForImageClassification(BeitConfig(**settings))
    model.load_state_dict(state)
    model.save_pretrained(folder)
    image_processor(encoder.transform, tower).save_pretrained(folder)


def block_state(encoder: ImageEncoder) -> State:
    """The tower by the names of ``BeitModel``'s modules, its last norm called ``layernorm``."""
    state = to_vit_mae(_plain_state(encoder), encoder.tower)
    return {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}


def beit_settings(tower: ImageTower, **more: Any) -> dict[str, Any]:
    """The fields of a ``BeitConfig`` that say what the tower is like up to its last block."""
    return transformer_settings(tower) | {
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
        **more,
    }
