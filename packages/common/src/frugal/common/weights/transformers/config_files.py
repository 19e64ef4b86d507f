"""What stands in every folder of transformers: configuration, weights and image processor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.files import reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.bundle import ImageSpec
from frugal.common.models.preprocess import Preparation, of_transformers, transformers_file
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.weights.files import State, read_weights, weights_in
from frugal.common.weights.written import Embedded

_LOG = logging.getLogger("frugal")
NAME = "transformers"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ACTIVATIONS: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
}
ACTIVATION_OF = {name: activation for activation, name in ACTIVATIONS.items()}
_RESAMPLING = {
    "nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5,
}  # fmt: skip
"""Pillow's numbers."""

# ------------------------------------------------------------------------------------------------
# Reading


def configured(kind: Any, settings: Mapping[str, Any], folder: Path) -> Any:
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


def height_width(model: Any, folder: Path) -> tuple[int, int]:
    """Of the images of a model, by its configuration."""
    return _pair(model.image_size, "image_size", folder)


def patch_size(model: Any, folder: Path) -> int:
    """Side of the square patches of a model, by its configuration."""
    height, width = _pair(model.patch_size, "patch_size", folder)
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


def blocks_of(model: Any, folder: Path) -> dict[str, Any]:
    """The options of a tower of ours that say what its blocks are like, by a configuration.

    Raises:
        InputError: if our towers have no such activation.
    """
    if model.hidden_act not in ACTIVATION_OF:
        raise InputError(f"the activation {model.hidden_act!r} of {folder} is not known here")
    return {
        "width": model.hidden_size,
        "depth": model.num_hidden_layers,
        "heads": model.num_attention_heads,
        "mlp_width": model.intermediate_size,
        "activation": ACTIVATION_OF[model.hidden_act],
        "norm_epsilon": model.layer_norm_eps,
    }


def weights_of(folder: Path) -> State:
    """The tensors of a folder by name, in the precision in which they are stored."""
    return read_weights(weights_in(folder, WEIGHT_FILES))


def preparation_of(folder: Path, model_type: str, size: tuple[int, int]) -> Preparation:
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
# Writing


def block_settings(tower: ImageTower | TextTower) -> dict[str, Any]:
    """The fields of any configuration that say what the blocks of a tower are like."""
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_epsilon,
    }


def nearest_crop(crop: CenterCrop, image: ImageSpec) -> CenterCrop:
    """The nearest to a crop that transformers has."""
    height, width = image.height_width
    # its crops of another shape have borders
    is_stretched = crop.order == "stretch" or height != width
    return CenterCrop(
        order="stretch" if is_stretched else "resize_first",
        interpolation="bicubic" if crop.interpolation.startswith("tf") else crop.interpolation,
        share=crop.share,
        half_pixel="down" if crop.share < 1 or not is_stretched else "even",
    )


def image_processor(transform: CenterCrop, tower: ImageTower) -> Any:
    """What brings pictures to the size of a tower and normalizes them, as in evaluations."""
    from transformers import CLIPImageProcessor

    crop = nearest_crop(transform, tower)
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


def labels(count: int) -> dict[str, Any]:
    """The fields of any configuration that name classes, which are numbers here."""
    return {
        "id2label": {number: str(number) for number in range(count)},
        "label2id": {str(number): number for number in range(count)},
    }


def processed(folder: Path, pictures: Tensor) -> Tensor:
    """(B, 3, H, W) as the folder's image processor normalizes them, neither resized nor cropped."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    as_they_are = {"do_resize": False, "do_center_crop": False}
    return processor(list(pictures), return_tensors="pt", **as_they_are).pixel_values


def embedded(folder: Path, pictures: Tensor, captions: list[str]) -> Embedded:
    """What transformers makes of (B, 3, H, W) uint8 pictures and of captions with a folder."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    texts = AutoTokenizer.from_pretrained(folder)(
        captions, padding=True, truncation=True, return_tensors="pt"
    )
    made = model(pixel_values=processed(folder, pictures), **texts)
    return Embedded(
        F.normalize(made.image_embeds, dim=-1),
        F.normalize(made.text_embeds, dim=-1),
        model.logit_scale.reshape(1),
    )
