"""timm's vision transformers as image towers: a folder for its ``local-dir:`` names, or a file.

What is written is a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from frugal.common.data.transforms import CenterCrop, normalize
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, read_json_object, reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.fit import misfit
from frugal.common.models.image_encoder import ImageEncoder, image_encoder, with_projection_as_head
from frugal.common.models.named import SIZES
from frugal.common.models.preprocess import Pixels, of_timm, pixels_of_timm, timm_settings
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.models.weight_names import State, from_timm, to_timm
from frugal.common.weights.encoder_config import tower_bundle
from frugal.common.weights.files import part_with, read_weights, weights_in
from frugal.common.weights.folding import fold_patch_bias_of_tower
from frugal.common.weights.image_states import encoder_of_file, with_fixed_table
from frugal.common.weights.library import (
    NO_TEXT,
    Library,
    Target,
    UnsupportedOption,
    refuse_for_folder,
    refuse_larger_than,
)
from frugal.common.weights.written import (
    Seen,
    tower_difference,
    two_towers,
    unsupported_projector,
    unsupported_tower,
)

_LOG = logging.getLogger("frugal")
_NAME = "timm"
_FILES = ("model.safetensors", "pytorch_model.bin")
_ACTIVATIONS: dict[str, Activation] = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}
_LANDMARK = "patch_embed.proj.weight"
"""A name that every vision transformer of timm's has."""
_LARGEST_DIFFERENCE = 1e-4
"""Between timm's tower and ours, over the largest number, where that is above 1."""


def knows(path: Path, name: str | None) -> bool:
    """A folder with an architecture of timm's, or a file and the name of one of its models."""
    if path.is_dir():
        about = path / "config.json"
        return about.is_file() and "architecture" in read_json_object(about)
    if name is None or not path.is_file():
        return False
    import timm

    return timm.is_model(name)


def load(path: Path, name: str | None, key: str | None) -> ModelBundle:
    """The model of a folder that ``timm.create_model("local-dir:...")`` takes, or of a file.

    Raises:
        InputError: if there is none that can be read, or no vision transformer that ours can be.
    """
    if path.is_dir():
        refuse_for_folder(path, name, key)
        return tower_bundle(_read_folder(path), path=path, library=_NAME)
    assert name is not None  # knows() has seen it
    encoder = _read(path, name, {}, None, source=f"timm's {name}", key=key)
    return tower_bundle(encoder, path=path, library=_NAME, name=name)


def load_image_tower(folder: Path) -> ImageEncoder:
    """The model of a folder; of one that says nothing but an architecture, by its shapes too.

    Raises:
        InputError: see :func:`load`.
    """
    try:
        return with_fixed_table(_read_folder(folder))
    except InputError:
        about = read_json_object(folder / "config.json")
        if about.keys() - {"architecture"}:
            raise
    # timm writes more than a name; its shapes say more of such a tower than the name does
    _LOG.warning(
        "%s does not hold the %s that its config.json names, and says nothing else of it: heads, "
        "activation, epsilon, mean and std are the usual ones for its shapes",
        folder, about["architecture"],
    )  # fmt: skip
    return encoder_of_file(weights_in(folder, _FILES))


def _read_folder(folder: Path) -> ImageEncoder:
    path = folder / "config.json"
    try:
        about = parse_json(read_bytes(path))
        name, args = about["architecture"], dict(about.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not describe a model of timm ({reason_of(error)})") from None
    settings = timm_settings(about)
    weights = weights_in(folder, _FILES)
    if "input_size" in settings:
        args.setdefault("img_size", tuple(settings["input_size"][1:]))
    for part in (settings, about):
        if part.get("global_pool"):
            args.setdefault("global_pool", part["global_pool"])
    args.pop("num_classes", None)  # the weights say how many
    return _read(weights, name, args, settings, source=str(path))


def _read(
    path: Path,
    name: str,
    args: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    *,
    source: str,
    key: str | None = None,
) -> ImageEncoder:
    """The weights of a file; without settings, images are prepared as timm does for the name."""
    import timm

    stored = part_with(read_weights(path, key=key), _LANDMARK, source=str(path))
    state = {n: t.float() for n, t in stored.items()}
    refuse_larger_than(state, args, source=source)
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=classes, **args)
        usual: Any = model.pretrained_cfg
    except Exception as error:  # noqa: BLE001 - an unknown name, an option of another version
        _refuse_other_kinds(_bare(name), name)  # which may not know these arguments
        reason = reason_of(error, last_line=True)
        raise InputError(f"timm cannot build {name!r} as a vision transformer: {reason}") from None
    _refuse_other_kinds(model, name)
    if what := misfit(state, model.state_dict()):
        raise InputError(f"{path} does not hold timm's {name}: {what}")
    model.load_state_dict(state, strict=True, assign=True)
    if settings is None:
        settings = usual if isinstance(usual, Mapping) else vars(usual)
    tower = _tower(model, name, pixels_of_timm(settings, source=source))
    named = from_timm({n: t for n, t in state.items() if not n.startswith("head.")}, tower)
    head = {n: t for n, t in state.items() if n.startswith("head.")}
    prepared = of_timm(settings, size=tower.height_width, source=source)
    guessed = ("mean", "std") if prepared.is_default else ()
    encoder = ImageEncoder(tower, named, str(path), head, prepared, guessed)
    _compare(model.eval(), encoder, name)
    return encoder


def _bare(name: str) -> Any:
    """The model of a name without weights and options; None where timm makes none."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except Exception:  # noqa: BLE001 - told by who asked for one with options
        return None


def _refuse_other_kinds(model: Any, name: str) -> None:
    """Refuse what is a model, but no plain vision transformer."""
    from timm.models.vision_transformer import VisionTransformer

    if model is not None and not isinstance(model, VisionTransformer):
        raise InputError(
            f"timm's {name} is none of its plain vision transformers, which alone can be read"
        )


def _tower(model: Any, name: str, pixels: Pixels) -> ImageTower:
    """Our tower that is to compute the same."""
    front = model.num_prefix_tokens
    height, width = model.patch_embed.img_size
    misfits = {
        "reg_tokens": model.num_reg_tokens > 0,
        "global_pool": model.global_pool not in ("token", "avg"),
        "pos_embed": model.pos_embed is None,
        "final_norm": isinstance(model.norm, nn.Identity)
        and isinstance(model.fc_norm, nn.Identity),
    }
    if odd := [option for option, misfit in misfits.items() if misfit]:
        raise InputError(
            f"timm's {name} has an option that towers of this library do not have: {odd[0]}"
        )
    after = not isinstance(model.fc_norm, nn.Identity)
    last: Any = model.fc_norm if after else model.norm
    block: Any = model.blocks[0]
    scale = None if isinstance(block.ls1, nn.Identity) else getattr(block.ls1, "init_values", 1e-5)
    if front == 0:
        class_token = "none"
    else:
        class_token = "without_position" if model.no_embed_class else "with_position"
    means = "mean_all" if model.pool_include_prefix else "mean"
    return ImageTower(
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        patch_size=model.patch_embed.patch_size[0],
        image_size=height if height == width else (height, width),
        mean=pixels.mean,
        std=pixels.std,
        patch_bias=model.patch_embed.proj.bias is not None,
        class_token=class_token,  # type: ignore[arg-type]
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        activation=_ACTIVATIONS.get(type(block.mlp.act).__name__, "gelu"),
        norm_epsilon=last.eps,
        pooling="class" if model.global_pool == "token" else means,  # type: ignore[arg-type]
        norm_after_pooling=after,
        layer_scale=scale,
    )


@torch.no_grad()
def _compare(model: Any, encoder: ImageEncoder, name: str) -> None:
    """Refuse what our tower computes otherwise, whatever option that is."""
    transformer = ImageTransformer(encoder.tower)
    if what := misfit(encoder.state, transformer.state_dict()):
        raise InputError(
            f"timm's {name} has an option that towers of this library do not have: {what}"
        )
    transformer.load_state_dict(encoder.state)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, 3, *encoder.tower.height_width), generator=generator)
    pooled = transformer.eval().forward_pooled(images)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    scale = max(1.0, float(expected.abs().max()))
    if not float((pooled - expected).abs().max()) / scale <= _LARGEST_DIFFERENCE:
        raise InputError(
            f"timm's {name} computes something that towers of this library do not, or its weights "
            "are not finite"
        )


# ------------------------------------------------------------------------------------------------
# Writing

_USAGE = """\
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


def _unsupported(encoder: ImageEncoder) -> UnsupportedOption | None:
    """The first option that timm cannot express."""
    if (option := unsupported_projector(encoder.tower)) is not None:
        return option
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


def _model_args(tower: ImageTower, *, has_norm: bool = True) -> dict[str, Any]:
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


def nearest_crop(crop: CenterCrop) -> CenterCrop:
    """The nearest to a crop that timm has."""
    kernel = "bicubic" if crop.interpolation.startswith("tf") else crop.interpolation
    return CenterCrop(
        order="stretch" if crop.order == "stretch" else "resize_first",
        interpolation=kernel,
        share=crop.share,
    )


def target(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    """How an image tower, if only that of a dual encoder, is written for timm."""
    del to  # there is one
    if bundle.text is not None:
        two_towers(bundle)
        if (option := unsupported_tower(bundle, "image")) is not None:
            return option
    elif not isinstance(bundle.image, ImageTower):
        return NO_TEXT
    encoder = with_projection_as_head(image_encoder(bundle))
    return _unsupported(encoder) or Target(
        usage=_USAGE,
        write=lambda folder: write(encoder, folder),
        difference=lambda folder: tower_difference(encoder, see, folder),
        transform=nearest_crop(bundle.transform),
        is_whole=bundle.text is None,
    )


def write(encoder: ImageEncoder, folder: Path) -> None:
    """Weights, position table included, and configuration."""
    tower = encoder.tower
    state, numbers = _state(encoder), 0
    if encoder.head is not None:
        state["head.weight"], state["head.bias"] = (part.contiguous() for part in encoder.head)
        numbers = len(encoder.head[1])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    args = _model_args(tower, has_norm=encoder.has_norm)
    height, width = tower.height_width
    crop = nearest_crop(encoder.transform)
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


LIBRARY = Library(
    name=_NAME,
    knows=knows,
    load=load,
    image_tower=load_image_tower,
    targets=("timm",),
    target=target,
)
