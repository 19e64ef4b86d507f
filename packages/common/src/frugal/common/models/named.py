"""Dual encoders as they were published, by name: sizes in one table, presets that combine them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from frugal.common.errors import InputError
from frugal.common.models.blocks import Activation
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD, ImageTower


@dataclass(frozen=True)
class _Transformer:
    width: int
    depth: int
    heads: int
    mlp_width: int


SIZES: dict[str, tuple[_Transformer, _Transformer, int]] = {
    # image tower, text tower, shared space
    "Ti": (_Transformer(192, 12, 3, 768), _Transformer(256, 10, 4, 1024), 256),
    "S": (_Transformer(384, 12, 6, 1536), _Transformer(384, 12, 6, 1536), 384),
    "B": (_Transformer(768, 12, 12, 3072), _Transformer(512, 12, 8, 2048), 512),
    "L": (_Transformer(1024, 24, 16, 4096), _Transformer(768, 12, 12, 3072), 768),
    "H": (_Transformer(1280, 32, 16, 5120), _Transformer(1024, 24, 16, 4096), 1024),
    "g": (_Transformer(1408, 40, 16, 6144), _Transformer(1024, 24, 16, 4096), 1024),
    "bigG": (_Transformer(1664, 48, 16, 8192), _Transformer(1280, 32, 20, 5120), 1280),
}
"""Ti: DeiT's image tower (arXiv:2012.12877, table 1) and the smallest text tower of open_clip's
configurations (ViT-S-16-alt). S and up: open_clip's ViT-S-16, ViT-B-16, ViT-L-14, ViT-H-14,
ViT-g-14 and ViT-bigG-14; S is DeiT's and MILAN's image tower too."""


def _size(name: str) -> tuple[_Transformer, _Transformer, int]:
    try:
        return SIZES[name]
    except KeyError:
        raise InputError(
            f"there is no tower of size {name!r}; choose from {', '.join(SIZES)}"
        ) from None


def _size_and_patch(name: str) -> tuple[str, int]:
    size, slash, patch = name.removeprefix("ViT-").partition("/")
    if not slash or not patch.isdecimal():
        raise InputError(
            f"{name!r} names no image tower; give a size and the side of a patch, such as B/16"
        )
    return size, int(patch)


def image_tower(name: str, **options: Any) -> ImageTower:
    """The image tower of a named size and patch, such as ``"B/16"``; options override fields.

    Raises:
        InputError: if the size is unknown.
    """
    size, patch = _size_and_patch(name)
    shape = _size(size)[0]
    return ImageTower(**{**vars(shape), "patch_size": patch, **options})


def text_tower(size: str, **options: Any) -> TextTower:
    """The text tower that goes with a named size, such as ``"B"``; options override fields.

    Raises:
        InputError: if the size is unknown.
    """
    return TextTower(**{**vars(_size(size)[1]), **options})


def clip_encoder(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    text_length: int = 77,
    quick_gelu: bool = False,
) -> DualEncoderConfig:
    """Ordinary CLIP as open_clip builds it: ``clip_encoder("B/16")`` is its ViT-B-16.

    Args:
        name: size and patch of the image tower.
        image_size: in pixels.
        text_length: most tokens of a caption.
        quick_gelu: the activation of OpenAI's weights.
    """
    size, _ = _size_and_patch(name)
    activation: Activation = "quick_gelu" if quick_gelu else "gelu"
    image = image_tower(
        name,
        image_size=image_size,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        patch_bias=False,
        pre_norm=True,
        norm_epsilon=1e-5,
        activation=activation,
    )
    text = text_tower(size, length=text_length, activation=activation)
    return DualEncoderConfig(image=image, text=text, embed_dim=_size(size)[2])


def flip_encoder(
    name: str, *, image_size: int | tuple[int, int] = 224, text_length: int = 32
) -> DualEncoderConfig:
    """FLIP's towers: ``B/16`` (base), ``L/16`` (large) and ``H/14`` (huge) were published.

    Source: arXiv:2212.00794 and its published configurations. Text attends to its padding and is
    pooled at the first word piece.
    """
    size, _ = _size_and_patch(name)
    image = image_tower(
        name,
        image_size=image_size,
        class_token="without_position",
        positions="sincos",
        activation="gelu_tanh",
        pooling="mean_all",
    )
    text = text_tower(
        size,
        vocabulary=30_523,
        length=text_length,
        causal=False,
        activation="gelu_tanh",
        norm_epsilon=1e-6,
        pooling="first",
    )
    return DualEncoderConfig(
        image=image, text=text, embed_dim=_size(size)[2], initialization="flip"
    )


def clipa_encoder(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    text_length: int = 32,
    as_in_open_clip: bool = False,
) -> DualEncoderConfig:
    """CLIPA-v2's towers (arXiv:2306.15658): ``L/14``, ``H/14`` and ``bigG/14`` were published.

    Args:
        name: size and patch of the image tower.
        image_size: in pixels.
        text_length: tokens of a caption, padding included.
        as_in_open_clip: the activation, epsilon and learned positions of open_clip's "-CLIPA"
            configurations, which differ from those the weights were trained with.
    """
    size, _ = _size_and_patch(name)
    activation: Activation = "gelu" if as_in_open_clip else "gelu_tanh"
    epsilon = 1e-5 if as_in_open_clip else 1e-6
    image = image_tower(
        name,
        image_size=image_size,
        patch_bias=False,
        positions="learned" if as_in_open_clip else "sincos_bigvision",
        activation=activation,
        norm_epsilon=epsilon,
        pooling="mean",
        norm_after_pooling=True,
    )
    text = text_tower(
        size,
        vocabulary=32_000,
        length=text_length,
        causal=False,
        activation=activation,
        norm_epsilon=epsilon,
        pooling="last",
    )
    return DualEncoderConfig(image=image, text=text, embed_dim=_size(size)[2])
