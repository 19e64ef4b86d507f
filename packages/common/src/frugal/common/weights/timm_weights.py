"""timm's vision transformers as image towers: a folder for its ``local-dir:`` names, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.files import parse_json, reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.fit import misfit
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.preprocess import Pixels, of_timm, pixels_of_timm, timm_settings
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.models.weight_names import from_timm
from frugal.common.weights.files import part_with, read_weights, weights_in

_FILES = ("model.safetensors", "pytorch_model.bin")
_ACTIVATIONS: dict[str, Activation] = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}
_LANDMARK = "patch_embed.proj.weight"
"""A name that every vision transformer of timm's has."""
_LARGEST_DIFFERENCE = 1e-4
"""Between timm's tower and ours, over the largest number, where that is above 1."""


@dataclass(frozen=True)
class TimmWeights:
    """A vision transformer of timm's."""

    weights: ImageEncoder
    crop: CenterCrop
    """How timm prepares an image for it."""


def read_folder(folder: Path) -> TimmWeights:
    """The model of a folder that ``timm.create_model("local-dir:...")`` takes.

    Raises:
        InputError: if it is incomplete, damaged, or no vision transformer that ours can be.
    """
    path = folder / "config.json"
    try:
        about = parse_json(path.read_bytes())
        name, args = about["architecture"], dict(about.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not describe a model of timm ({reason_of(error)})") from None
    settings = timm_settings(about)
    weights = weights_in(folder, _FILES)
    if "input_size" in settings:
        args.setdefault("img_size", tuple(settings["input_size"][1:]))
    for said in (settings, about):
        if said.get("global_pool"):
            args.setdefault("global_pool", said["global_pool"])
    args.pop("num_classes", None)  # the weights say how many
    return _read(weights, name, args, settings, source=str(path))


def read_named(name: str, path: Path, *, key: str | None = None) -> TimmWeights:
    """A file of weights as the model that timm calls so.

    Args:
        name: as timm knows it.
        path: the file.
        key: which of several sets of weights in it.

    Raises:
        InputError: if it cannot be read, or is of another model.
    """
    return _read(path, name, {}, None, source=f"timm's {name}", key=key)


def _read(
    path: Path,
    name: str,
    args: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    *,
    source: str,
    key: str | None = None,
) -> TimmWeights:
    """The weights of a file; without settings, images are prepared as timm does for the name."""
    import timm

    stored = part_with(read_weights(path, key=key), _LANDMARK, source=str(path))
    state = {n: t.float() for n, t in stored.items()}
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    try:
        with torch.device("meta"):
            theirs: Any = timm.create_model(name, num_classes=classes, **args)
        usual: Any = theirs.pretrained_cfg
    except Exception as error:  # noqa: BLE001 - an unknown name, an option of another version
        reason = reason_of(error, last_line=True)
        raise InputError(f"timm cannot build {name!r} as a vision transformer: {reason}") from None
    if what := misfit(state, theirs.state_dict()):
        raise InputError(f"{path} does not hold timm's {name}: {what}")
    theirs.load_state_dict(state, strict=True, assign=True)
    if settings is None:
        settings = usual if isinstance(usual, Mapping) else vars(usual)
    tower = _tower(theirs, name, pixels_of_timm(settings, source=source))
    ours = from_timm({n: t for n, t in state.items() if not n.startswith("head.")}, tower)
    head = {n: t for n, t in state.items() if n.startswith("head.")}
    prepared = of_timm(settings, size=tower.height_width, source=source)
    weights = ImageEncoder(tower, ours, str(path), head, prepared)
    _compare(theirs.eval(), weights, name)
    return TimmWeights(weights, prepared.crop)


def _tower(theirs: Any, name: str, pixels: Pixels) -> ImageTower:
    """Our tower that is to compute the same."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(theirs, VisionTransformer):
        raise InputError(
            f"timm's {name} is none of its plain vision transformers, which alone can be read"
        )
    front = theirs.num_prefix_tokens
    height, width = theirs.patch_embed.img_size
    misfits = {
        "reg_tokens": theirs.num_reg_tokens > 0,
        "global_pool": theirs.global_pool not in ("token", "avg"),
        "pos_embed": theirs.pos_embed is None,
        "final_norm": isinstance(theirs.norm, nn.Identity)
        and isinstance(theirs.fc_norm, nn.Identity),
    }
    if odd := [option for option, misfit in misfits.items() if misfit]:
        raise InputError(
            f"timm's {name} has an option that towers of this library do not have: {odd[0]}"
        )
    after = not isinstance(theirs.fc_norm, nn.Identity)
    last: Any = theirs.fc_norm if after else theirs.norm
    block: Any = theirs.blocks[0]
    scale = None if isinstance(block.ls1, nn.Identity) else getattr(block.ls1, "init_values", 1e-5)
    if front == 0:
        class_token = "none"
    else:
        class_token = "without_position" if theirs.no_embed_class else "with_position"
    means = "mean_all" if theirs.pool_include_prefix else "mean"
    return ImageTower(
        width=theirs.embed_dim,
        depth=len(theirs.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        patch_size=theirs.patch_embed.patch_size[0],
        image_size=height if height == width else (height, width),
        mean=pixels.mean,
        std=pixels.std,
        patch_bias=theirs.patch_embed.proj.bias is not None,
        class_token=class_token,  # type: ignore[arg-type]
        pre_norm=not isinstance(theirs.norm_pre, nn.Identity),
        activation=_ACTIVATIONS.get(type(block.mlp.act).__name__, "gelu"),
        norm_epsilon=last.eps,
        pooling="class" if theirs.global_pool == "token" else means,  # type: ignore[arg-type]
        norm_after_pooling=after,
        layer_scale=scale,
    )


@torch.no_grad()
def _compare(theirs: Any, weights: ImageEncoder, name: str) -> None:
    """Refuse what our tower computes otherwise, whatever option that is."""
    transformer = ImageTransformer(weights.tower)
    if what := misfit(weights.state, transformer.state_dict()):
        raise InputError(
            f"timm's {name} has an option that towers of this library do not have: {what}"
        )
    transformer.load_state_dict(weights.state)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, 3, *weights.tower.height_width), generator=generator)
    ours = transformer.eval().forward_pooled(images)
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    scale = max(1.0, float(expected.abs().max()))
    if not float((ours - expected).abs().max()) / scale <= _LARGEST_DIFFERENCE:
        raise InputError(
            f"timm's {name} computes something that towers of this library do not, or its weights "
            "are not finite"
        )
