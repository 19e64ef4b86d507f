"""How other libraries prepare an image: what their files say of it, read by one rule for each.

Everything that takes a model of transformers, open_clip or timm asks here: evaluations, imports,
teachers, towers that training starts from. Every option is honored or refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from frugal.common.data.decoding import Interpolation
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, ImageTower
from frugal.common.reduction.image import Channels

_HALF = (0.5, 0.5, 0.5)
_BLACK_TO_WHITE = 255


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What the gray levels of an image become."""

    mean: Channels
    """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
    std: Channels


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a library does to an image before its tower sees it."""

    pixels: Pixels
    crop: CenterCrop
    told_by: str
    """The file that says so; or, where none does, whose defaults these are."""
    is_default: bool = False
    """No file says so."""


def describe(image: Any, crop: CenterCrop | None = None, *, told_by: str = "") -> str:
    """In one line what weights do not say of an image tower, and how its images are prepared.

    Args:
        image: an ``ImageTower``, or anything with ``height_width``, ``mean`` and ``std``.
        crop: how an image is cut and resized.
        told_by: see :class:`Preparation`.
    """
    words = []
    if isinstance(image, ImageTower):
        words += [
            f"heads {image.heads}",
            f"activation {image.activation}",
            f"epsilon {image.norm_epsilon:g}",
            f"pooled by {image.pooling}",
        ]
    words += [f"mean {_numbers(image.mean)}", f"std {_numbers(image.std)}"]
    if crop is not None:
        words.append(_in_words(crop, image.height_width))
    return ", ".join(words) + (f" (preparation of images: {told_by})" if told_by else "")


def _numbers(channels: Channels) -> str:
    return " ".join(f"{value:.4g}" for value in channels)


def _in_words(crop: CenterCrop, size: tuple[int, int]) -> str:
    height, width = size
    seen = f"{height}x{width} pixels"
    if crop.order == "crop_first":
        return f"the middle cut out, then resized to {seen} ({crop.interpolation})"
    rows, columns = (int(side / crop.share + 1e-9) for side in size)
    if crop.order == "stretch":
        resized = f"stretched to {rows}x{columns}"
    else:
        resized = f"the shorter side resized to {min(rows, columns)}"
    cut = "" if crop.order == "stretch" and crop.share == 1 else f", the middle {seen}"
    return f"{resized} ({crop.interpolation}){cut}"


def _refused(source: str, option: str, reason: str) -> InputError:
    return InputError(
        f"{source} prepares images with {option}, {reason}; give the file that belongs to the model"
    )


def _channels(value: Any, source: str, name: str) -> Channels:
    """Three numbers; one stands for all."""
    given = list(value) if isinstance(value, list | tuple) else [value]
    is_numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in given)
    if not is_numbers or isinstance(value, bool) or len(given) not in (1, 3):
        raise _refused(source, f"{name}={value}", "which is neither one number nor three")
    red, green, blue = map(float, given * 3 if len(given) == 1 else given)
    return red, green, blue


def _positive(std: Channels, source: str, name: str) -> Channels:
    if min(std) <= 0:
        raise _refused(source, f"{name}={list(std)}", "which must be positive")
    return std


def _cut_out(
    order: str, interpolation: str, seen: int, resized: int, *, half_pixel: str = "even"
) -> CenterCrop:
    """A crop of ``seen`` of the ``resized`` pixels of a side."""
    return CenterCrop(
        order=cast("Any", order),
        interpolation=cast("Interpolation", interpolation),
        share=seen / resized,
        half_pixel=cast("Any", half_pixel),
    )


# ------------------------------------------------------------------------------------------------
# transformers

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where transformers keeps how images are prepared: since version 5, and before."""
_USUAL: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
    "default_to_square": True, "do_center_crop": False,
}  # fmt: skip
_AS_CLIP: dict[str, Any] = {
    "resample": 3, "size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True,
    "default_to_square": False, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip
_AS_VIT: dict[str, Any] = {
    "resample": 2, "size": {"height": 224, "width": 224}, "image_mean": _HALF, "image_std": _HALF,
}  # fmt: skip
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _AS_CLIP,
    "ChineseCLIP": _AS_CLIP,
    "Bit": _AS_CLIP,
    "ViT": _AS_VIT,
    "Siglip": {**_AS_VIT, "resample": 3, "default_to_square": False},
    "Beit": {**_AS_VIT, "resample": 3, "crop_size": 224},
    "DeiT": {
        **_AS_VIT, "resample": 3, "size": {"height": 256, "width": 256}, "crop_size": 224,
        "do_center_crop": True,
    },
}  # fmt: skip
"""What the image processors that resize, crop and normalize do where a file does not say."""
_PROCESSOR_OF = {
    "clip": "CLIP", "clip_vision_model": "CLIP", "chinese_clip": "ChineseCLIP", "siglip": "Siglip",
    "siglip_vision_model": "Siglip", "vit": "ViT", "vit_mae": "ViT", "beit": "Beit",
    "deit": "DeiT", "dinov2": "Bit",
}  # fmt: skip
"""By type of the model, where a file does not name its processor."""
_HONORED = frozenset({*_USUAL, *_AS_CLIP, "do_pad"})
_OF_NO_EFFECT = frozenset(
    {
        "image_processor_type", "feature_extractor_type", "processor_class", "auto_map",
        "do_convert_rgb", "data_format", "input_data_format", "return_tensors", "device",
        "disable_grouping", "pad_size", "do_reduce_labels", "reduce_labels", "use_fast", "backend",
        "model_input_names",
    }
)  # fmt: skip
"""On one image on its own: every image becomes RGB here, labels are none of ours."""
_RESAMPLE: dict[Any, Interpolation] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming",
}  # fmt: skip
"""Pillow's numbers."""
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad")


@dataclass(frozen=True)
class TransformersFile:
    """The settings of an image processor as they are written."""

    settings: Mapping[str, Any]
    source: str
    """The file, or in words that there is none."""
    is_there: bool


def transformers_file(folder: Path, *, model_type: str = "") -> TransformersFile:
    """What a folder says of its image processor.

    Args:
        folder: of a model.
        model_type: as its config.json has it.

    Raises:
        InputError: if a file is damaged.
    """
    files = [folder / name for name in PROCESSOR_FILES]
    read = [read_json_object(file) if file.is_file() else None for file in files]
    return transformers_settings(*read, source=folder, model_type=model_type)


def transformers_settings(
    newer: Mapping[str, Any] | None,
    older: Mapping[str, Any] | None,
    *,
    source: Path | str,
    model_type: str = "",
) -> TransformersFile:
    """The settings of an image processor among the two files that may hold them.

    As in transformers, a processor_config.json that has a section for images goes first.

    Args:
        newer: the content of processor_config.json.
        older: the content of preprocessor_config.json.
        source: the folder, or the name on the hub.
        model_type: as the config.json of the model has it.
    """
    nested = (newer or {}).get("image_processor")
    if isinstance(nested, Mapping):
        return TransformersFile(nested, f"{source}/{PROCESSOR_FILES[0]}", True)
    if older is not None:
        return TransformersFile(older, f"{source}/{PROCESSOR_FILES[1]}", True)
    usual = f"what is usual for {model_type}, as {source} has no {PROCESSOR_FILES[1]}"
    return TransformersFile({}, usual, False)


def of_transformers(
    file: TransformersFile, *, model_type: str, size: tuple[int, int]
) -> Preparation:
    """The preparation that transformers' image processor makes of a file.

    Args:
        file: see :func:`transformers_file`.
        model_type: as the config.json of the model has it.
        size: (height, width) that its image tower takes.

    Raises:
        InputError: naming the option that is not known here, or that does not fit the model.
    """
    settings, source = _with_defaults(file, model_type), file.source
    if not file.is_there:
        sides = dict(zip(("height", "width"), size, strict=True))
        edge = {"shortest_edge": min(size)}
        settings |= {"size": edge if settings["do_center_crop"] else sides, "crop_size": sides}
    for name, value in settings.items():
        is_known = name in _HONORED or name in _OF_NO_EFFECT or name.startswith("_")
        if not is_known and value not in (None, False):
            raise _refused(source, f"{name}={value}", "which is not known here")
    for name in _STEPS:
        if not isinstance(settings.get(name, False), bool):
            raise _refused(source, f"{name}={settings[name]}", "which is neither true nor false")
    if settings.get("do_pad"):
        raise _refused(source, "do_pad=true", "but nothing is padded here")
    if not settings["do_resize"]:
        raise _refused(source, "do_resize=false", "but images have to be of one size")
    crop = _crop_of_transformers(settings, source, size)
    pixels = _pixels_of_transformers(settings, source)
    return Preparation(pixels=pixels, crop=crop, told_by=source, is_default=not file.is_there)


def pixels_of_transformers(file: TransformersFile, *, model_type: str) -> Pixels:
    """What any image processor of transformers makes of gray levels, whatever else it does.

    Args:
        file: see :func:`transformers_file`.
        model_type: as the config.json of the model has it.

    Raises:
        InputError: if it says something that cannot be, or that is not known here.
    """
    usual = _AS_CLIP if _PROCESSOR_OF.get(model_type) in ("CLIP", "ChineseCLIP", "Bit") else _AS_VIT
    if model_type not in _PROCESSOR_OF or (model_type == "vit_mae" and not file.is_there):
        usual = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    given = _without_nulls(file.settings)
    for name in ("offset", "rescale_offset", "do_flip_channel_order"):
        if given.get(name):
            raise _refused(file.source, f"{name}={given[name]}", "which is not known here")
    return _pixels_of_transformers({**_USUAL, **usual, **given}, file.source)


def _with_defaults(file: TransformersFile, model_type: str) -> dict[str, Any]:
    given = file.settings
    named = given.get("image_processor_type") or given.get("feature_extractor_type")
    kind = str(named or _PROCESSOR_OF.get(model_type, model_type))
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind not in _PROCESSORS:
        raise _refused(
            file.source, f"the processor {named or model_type}", "which is not known here"
        )
    given = _without_nulls(file.settings)
    usual = {**_USUAL, **_PROCESSORS[kind]}
    if "crop_size" in given and _has_edge(given.get("size")):
        usual["do_center_crop"] = True  # without it such a file would fit no tower
    if not file.is_there and model_type == "vit_mae":  # none of MAE's was trained as ViT's were
        usual |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    return {**usual, **given}


def _without_nulls(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same; a step that is null is left out, as in transformers."""
    return {n: False if value is None and n in _STEPS else value for n, value in settings.items()}


def _has_edge(size: Any) -> bool:
    return isinstance(size, Mapping) and "shortest_edge" in size


def _pixels_of_transformers(settings: Mapping[str, Any], source: str) -> Pixels:
    """Steps that are left out, and another factor, as a mean and a deviation of 0 to 1."""
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise _refused(source, f"rescale_factor={factor}", "which is no positive number")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings["do_normalize"]:
        mean = _channels(settings["image_mean"], source, "image_mean")
        std = _positive(_channels(settings["image_std"], source, "image_std"), source, "image_std")
    brightest = _BLACK_TO_WHITE * factor  # what 255 becomes before it is normalized
    if math.isclose(brightest, 1.0, rel_tol=1e-9):
        return Pixels(mean=mean, std=std)
    return Pixels(
        mean=(mean[0] / brightest, mean[1] / brightest, mean[2] / brightest),
        std=(std[0] / brightest, std[1] / brightest, std[2] / brightest),
    )


def _crop_of_transformers(
    settings: Mapping[str, Any], source: str, size: tuple[int, int]
) -> CenterCrop:
    kernel = _RESAMPLE.get(settings["resample"])
    if kernel is None or isinstance(settings["resample"], bool):
        raise _refused(source, f"resample={settings['resample']}", "none of Pillow's 0 to 5")
    resized = _sides(settings["size"], source, "size", square=settings["default_to_square"])
    crops = settings["do_center_crop"]
    seen = _sides(settings["crop_size"], source, "crop_size") if crops else resized
    if isinstance(seen, int):
        raise _refused(source, f"size={settings['size']} and no crop", "so that sizes would differ")
    if seen != size:
        raise InputError(
            f"the preprocessing of {source} makes images of {_times(seen)}, the image tower takes "
            f"{_times(size)}; give the preprocessor_config.json that belongs to the model"
        )
    if not isinstance(resized, int):
        return _stretched(kernel, seen, resized, source)
    if seen[0] != seen[1] or resized < seen[0]:
        raise _refused(
            source,
            f"the shortest edge resized to {resized} and {_times(seen)} cut out",
            "which leaves borders; only squares no larger than the edge are known",
        )
    return _cut_out("resize_first", kernel, seen[0], resized, half_pixel="down")


def _stretched(
    kernel: Interpolation, seen: tuple[int, int], resized: tuple[int, int], source: str
) -> CenterCrop:
    if seen == resized:
        return CenterCrop(order="stretch", interpolation=kernel)
    crop = None
    if seen[0] <= resized[0] and seen[1] <= resized[1]:
        crop = _cut_out("stretch", kernel, seen[0], resized[0], half_pixel="down")
    if crop is None or int(seen[1] / crop.share + 1e-9) != resized[1]:
        raise _refused(
            source,
            f"images resized to {_times(resized)} and {_times(seen)} cut out",
            "which is not the same share of both sides",
        )
    return crop


def _sides(value: Any, source: str, name: str, *, square: bool = True) -> int | tuple[int, int]:
    """(height, width), or the shortest edge alone, of all the forms that a size may have."""
    if isinstance(value, Mapping):
        given = {side: length for side, length in value.items() if length is not None}
        if given.keys() == {"height", "width"}:
            return _length(given["height"], source, name), _length(given["width"], source, name)
        if given.keys() == {"shortest_edge"} and name == "size":
            return _length(given["shortest_edge"], source, name)
        raise _refused(source, f"{name}={dict(value)}", "a form of size that is not known here")
    if isinstance(value, list | tuple) and len(value) == 2:
        return _length(value[0], source, name), _length(value[1], source, name)
    side = _length(value, source, name)
    return (side, side) if square else side


def _length(value: Any, source: str, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refused(source, f"{name}={value}", "which is no number of pixels")
    return value


def _times(pair: tuple[int, int]) -> str:
    return "x".join(map(str, pair))


# ------------------------------------------------------------------------------------------------
# open_clip

_ORDERS = {"shortest": "resize_first", "squash": "stretch"}
_OPEN_CLIP: dict[str, Any] = {
    "mode": "RGB", "mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic",
    "resize_mode": "shortest",
}  # fmt: skip


def of_open_clip(
    preprocess: Mapping[str, Any], *, size: tuple[int, int], source: str
) -> Preparation:
    """The preparation of a ``preprocess_cfg``; its size is the model's, as in open_clip.

    Raises:
        InputError: naming the option that is not known here.
    """
    given = {name: value for name, value in preprocess.items() if value not in (None, [])}
    settings = {**_OPEN_CLIP, **given}
    order = _ORDERS.get(settings["resize_mode"])
    if order is None:
        raise _refused(
            source, f"resize_mode={settings['resize_mode']}", "but shortest and squash are known"
        )
    if settings["mode"] != "RGB":
        raise _refused(source, f"mode={settings['mode']}", "but only RGB is known")
    kernel = settings["interpolation"]
    if kernel not in ("bicubic", "bilinear", "random"):
        raise _refused(
            source, f"interpolation={kernel}", "but bicubic, bilinear and random are known"
        )
    # random is for training; and its resizing towards a shape that is no square knows bicubic only
    is_square = size[0] == size[1]
    if kernel == "random" or (order == "resize_first" and not is_square):
        kernel = "bicubic"
    said = [name for name in ("mean", "std", "interpolation", "resize_mode") if name in given]
    return Preparation(
        pixels=Pixels(
            mean=_channels(settings["mean"], source, "mean"),
            std=_positive(_channels(settings["std"], source, "std"), source, "std"),
        ),
        crop=CenterCrop(order=cast("Any", order), interpolation=kernel),
        told_by=source if said else f"open_clip's defaults, as {source} has no preprocess_cfg",
        is_default=not said,
    )


# ------------------------------------------------------------------------------------------------
# timm

_TIMM: dict[str, Any] = {
    "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 0.875,
    "crop_mode": "center",
}  # fmt: skip
_TIMM_ORDERS = {"center": "resize_first", "squash": "stretch"}


def timm_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json of timm's that says how images are prepared; it was all once."""
    nested = config.get("pretrained_cfg")
    return nested if isinstance(nested, Mapping) else config


def pixels_of_timm(settings: Mapping[str, Any], *, source: str) -> Pixels:
    """Mean and deviation of a ``pretrained_cfg``.

    Raises:
        InputError: if they cannot be.
    """
    mean, std = (settings.get(name) or _TIMM[name] for name in ("mean", "std"))
    return Pixels(
        mean=_channels(mean, source, "mean"),
        std=_positive(_channels(std, source, "std"), source, "std"),
    )


def of_timm(settings: Mapping[str, Any], *, size: tuple[int, int], source: str) -> Preparation:
    """The preparation of a ``pretrained_cfg``, as ``timm.data.create_transform`` makes it.

    Raises:
        InputError: naming the option that is not known here.
    """
    said = {name: settings[name] for name in _TIMM if settings.get(name)}
    about = {**_TIMM, **said}
    kernel, order = about["interpolation"], _TIMM_ORDERS.get(about["crop_mode"])
    if order is None:
        raise _refused(source, f"crop_mode={about['crop_mode']}", "but center and squash are known")
    if kernel not in _RESAMPLE.values():
        raise _refused(source, f"interpolation={kernel}", "which is not known here")
    share = about["crop_pct"]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise _refused(source, f"crop_pct={share}", "but it must lie above 0 and be at most 1")
    resized = math.floor(size[0] / share)
    if int(size[0] / share + 1e-9) != resized:  # timm does not forgive a rounding of the division
        share = size[0] / resized
    return Preparation(
        pixels=pixels_of_timm(settings, source=source),
        crop=CenterCrop(order=cast("Any", order), interpolation=kernel, share=share),
        told_by=source if said else f"timm's defaults, as {source} says nothing of it",
        is_default=not said,
    )
