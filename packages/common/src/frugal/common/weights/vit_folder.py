"""A folder that transformers' ``AutoModel`` loads as a ``ViTModel``, a classifier included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import State, to_vit_mae
from frugal.common.weights.folding import fold_layer_scales
from frugal.common.weights.transformers_folder import ACTIVATIONS, image_processor
from frugal.common.weights.written import Seen, UnsupportedOption

USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("FOLDER", add_pooling_layer=False)
processor = AutoImageProcessor.from_pretrained("FOLDER")
tokens = model(**processor(images, return_tensors="pt")).last_hidden_state
```
"""
CLASSIFIER_USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
scores = model(**processor(images, return_tensors="pt")).logits
```
"""


def unsupported(encoder: ImageEncoder) -> UnsupportedOption | None:
    """The first option that ``ViTModel`` cannot express."""
    found = unsupported_tower(encoder.tower)
    if found is not None:
        return found
    if encoder.tower.norm_after_pooling or not encoder.has_norm:
        option = "norm_after_pooling=True" if encoder.has_norm else "norm"
        return UnsupportedOption(
            f"model.image.{option}", "ViTModel's last norm acts on every token"
        )
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


def write(encoder: ImageEncoder, folder: Path) -> None:
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
    return to_vit_mae(plain_state(encoder), encoder.tower, published=True)


def plain_state(encoder: ImageEncoder) -> State:
    """The tower by our names, without layer scales and with a patch bias, if only of zeros."""
    state = fold_layer_scales(encoder.state)
    state.setdefault("patch_embed.bias", torch.zeros(encoder.tower.width))
    return state


def transformer_settings(tower: ImageTower) -> dict[str, Any]:
    """The fields of a ``ViTConfig`` or ``ViTMAEConfig`` that say what the tower is like."""
    height, width = tower.height_width
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_epsilon,
        "image_size": height if height == width else (height, width),
        "patch_size": tower.patch_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def labels(count: int) -> dict[str, Any]:
    """The fields of any configuration that name classes, which are numbers here."""
    return {
        "id2label": {number: str(number) for number in range(count)},
        "label2id": {str(number): number for number in range(count)},
    }


def see(folder: Path, pictures: Tensor) -> Seen:
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


def processed(folder: Path, pictures: Tensor) -> Tensor:
    """(B, 3, H, W) as the folder's image processor normalizes them, neither resized nor cropped."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    as_they_are = {"do_resize": False, "do_center_crop": False}
    return processor(list(pictures), return_tensors="pt", **as_they_are).pixel_values
