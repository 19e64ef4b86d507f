"""A folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.data.transforms import normalize
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.named import SIZES
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import State, to_timm
from frugal.common.weights.folding import fold_patch_bias_of_tower
from frugal.common.weights.written import (
    Seen,
    UnsupportedOption,
    nearest_crop,
    unsupported_projector,
)

USAGE = """\
```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
```

`config.json` names the architecture; `timm.create_model` of it with the same `model_args` loads
`model.safetensors` strictly.
"""
_EPSILONS = {1e-6: "", 1e-5: "_clip"}
"""Of timm's norms, and what the architectures that have them are called."""
_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}


def unsupported(encoder: ImageEncoder) -> UnsupportedOption | None:
    """The first option that timm cannot express."""
    if (found := unsupported_projector(encoder.tower)) is not None:
        return found
    epsilon = encoder.tower.norm_epsilon
    if epsilon not in _EPSILONS:
        return UnsupportedOption(
            f"model.image.norm_epsilon={epsilon}", "its vision transformers have 1e-06 or 1e-05"
        )
    return None


def architecture(tower: ImageTower) -> str:
    """The name of timm's nearest model: of this size and patch, or else ViT-B/16."""
    import timm

    clip = _EPSILONS[tower.norm_epsilon]
    shape = (tower.width, tower.depth, tower.heads, tower.mlp_width)
    sizes = {(s.width, s.depth, s.heads, s.mlp_width): name for name, (s, _, _) in SIZES.items()}
    size = _SIZES.get(sizes.get(shape, ""))
    name = f"vit_{size}_patch{tower.patch_size}{clip}_224"
    return name if timm.is_model(name) else f"vit_base_patch16{clip}_224"


def model_args(tower: ImageTower, *, has_norm: bool = True) -> dict[str, Any]:
    """What is said beside the architecture, for ``timm.create_model``."""
    args: dict[str, Any] = {
        "img_size": tower.height_width,
        "patch_size": tower.patch_size,
        "embed_dim": tower.width,
        "depth": tower.depth,
        "num_heads": tower.heads,
        "mlp_ratio": _ratio(tower),
        "class_token": tower.class_token != "none",
        "pre_norm": tower.pre_norm,
        "global_pool": "token" if tower.pooling == "class" else "avg",
        "fc_norm": tower.norm_after_pooling,
    }
    if tower.activation != "gelu":
        args["act_layer"] = tower.activation
    if tower.layer_scale is not None:
        args["init_values"] = tower.layer_scale
    if tower.pooling == "mean_all" and tower.class_token != "none":
        args["pool_include_prefix"] = True
    if not has_norm:
        args["final_norm"] = False
    return args


def _ratio(tower: ImageTower) -> float:
    """What timm multiplies with the width and rounds down."""
    ratio = tower.mlp_width / tower.width
    if int(tower.width * ratio) != tower.mlp_width:
        ratio = (tower.mlp_width + 0.5) / tower.width
    return ratio


def write(encoder: ImageEncoder, folder: Path) -> None:
    """Weights, position table included, and configuration."""
    tower = encoder.tower
    state, numbers = _state(encoder), 0
    if encoder.head is not None:
        state["head.weight"], state["head.bias"] = (part.contiguous() for part in encoder.head)
        numbers = len(encoder.head[1])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    args = model_args(tower, has_norm=encoder.has_norm)
    height, width = tower.height_width
    crop = nearest_crop(encoder.transform, tower, "timm")
    content = {
        "architecture": architecture(tower),
        "num_classes": numbers,
        "num_features": tower.width,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": crop.interpolation,
            "crop_pct": crop.share,
            "crop_mode": "squash" if crop.order == "stretch" else "center",
            "mean": tower.mean,
            "std": tower.std,
            "num_classes": numbers,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _state(encoder: ImageEncoder) -> State:
    """By timm's names; its patches have a bias unless a norm follows them."""
    state, tower = dict(encoder.state), encoder.tower
    if tower.pre_norm:
        state, tower = fold_patch_bias_of_tower(state, tower)
    elif not tower.patch_bias:
        state["patch_embed.bias"] = torch.zeros(tower.width)
    return to_timm(state, tower)


def see(folder: Path, pictures: Tensor) -> Seen:
    """What timm makes of (B, 3, H, W) uint8 pictures with this folder."""
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    about = model.pretrained_cfg
    tokens = model.forward_features(normalize(pictures, mean=about["mean"], std=about["std"]))
    return Seen(model.forward_head(tokens), tokens)
