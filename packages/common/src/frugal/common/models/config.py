"""The towers as frozen values: every option of the five methods and of their checkpoints.

Named sizes stand in one table. Presets combine them into the dual encoders that were published.
Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from frugal.common.errors import InputError
from frugal.common.ranges import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    ShareBelowOne,
    check_ranges,
)

if TYPE_CHECKING:
    import torch

    from frugal.common.models.clip import DualEncoder
    from frugal.common.models.text import TextTransformer
    from frugal.common.models.vit import ImageTransformer

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""Exact GELU, its tanh approximation, or x * sigmoid(1.702 x)."""
ClassToken = Literal["none", "with_position", "without_position"]
ImagePositions = Literal["learned", "sincos", "sincos_bigvision", "sincos_moco"]
"""A learned table, or a fixed one: MAE's and FLIP's, big_vision's (frequencies end exactly at
1/10000), MoCo v3's (rows in the first half of the channels)."""
ImagePooling = Literal["class", "mean", "mean_all"]
"""The class token, the mean of the patches, or the mean of every token."""
TextPooling = Literal["first", "last", "end_of_text", "mean", "mean_all"]
"""The first slot, the last slot (padding included), the end-of-text token, the mean of the
caption, or the mean of every slot (padding included)."""
Initialization = Literal["flip", "open_clip"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_VOCABULARY = 49_408


def _check_choice(part: str, name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise InputError(
            f"{part}.{name} is {value!r}; choose from {', '.join(map(str, get_args(choices)))}"
        )


def _check_transformer(part: str, tower: ImageTower | TextTower) -> None:
    check_ranges(tower, part)
    if tower.width % tower.heads:
        raise InputError(
            f"{part}.width {tower.width} does not divide among {part}.heads = {tower.heads}; "
            "choose a multiple"
        )
    _check_choice(part, "activation", tower.activation, Activation)


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """A vision transformer."""

    width: Count
    depth: Count
    """Blocks."""
    heads: Count
    mlp_width: Count
    patch_size: Count
    """Side of a patch in pixels."""
    image_size: Count | tuple[Count, Count] = 224
    """Side of a square image, or (height, width), in pixels."""
    mean: tuple[NotNegative, NotNegative, NotNegative] = IMAGENET_MEAN
    """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    patch_bias: bool = True
    """Whether the patch projection has a bias."""
    class_token: ClassToken = "with_position"
    positions: ImagePositions = "learned"
    pre_norm: bool = False
    """A norm between the embedding and the blocks."""
    activation: Activation = "gelu"
    norm_epsilon: Positive = 1e-6
    pooling: ImagePooling = "class"
    norm_after_pooling: bool = False
    """The last norm acts on the pooled vector, not on every token."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    layer_scale: NotNegative | None = None
    """First value of the layer scales; without it there are none."""
    projector_width: Count | None = None
    """Hidden width of MoCo v3's projector (4096 there), three linear layers with batch norms on the
    pooled vector; without it there is none."""
    projector_outputs: Count = 256
    """Width of what the projector makes of the pooled vector."""

    def __post_init__(self) -> None:
        _check_transformer("image", self)
        for name, choices in (
            ("class_token", ClassToken),
            ("positions", ImagePositions),
            ("pooling", ImagePooling),
        ):
            _check_choice("image", name, getattr(self, name), choices)
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON has lists only
        self._check_grid()
        if self.positions != "learned" and self.width % 4:
            raise InputError(
                f"image.width {self.width} is not a multiple of 4, which "
                f"image.positions={self.positions} needs"
            )
        if self.positions == "sincos_bigvision" and self.width < 8:
            raise InputError("image.positions=sincos_bigvision needs image.width of at least 8")
        if self.pooling == "class" and self.class_token == "none":
            raise InputError(
                "image.pooling=class needs a class token; set image.class_token, or pool by mean"
            )

    def _check_grid(self) -> None:
        for side in self.height_width:
            if side < self.patch_size:
                raise InputError(
                    f"image.image_size {self.image_size} is smaller than a patch "
                    f"(image.patch_size = {self.patch_size}); use larger images or smaller patches"
                )
            if side % self.patch_size:
                raise InputError(
                    f"image.image_size {self.image_size} is not a multiple of image.patch_size = "
                    f"{self.patch_size}; use {side // self.patch_size * self.patch_size} or "
                    f"{(side // self.patch_size + 1) * self.patch_size}"
                )

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the images, in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.num_patches + (self.class_token == "with_position")

    @property
    def pooled_width(self) -> int:
        """Of the vector that is projected into the space of texts."""
        return self.width if self.projector_width is None else self.projector_outputs

    def module(self, embed_dim: int | None = None) -> ImageTransformer:
        """The tower, its weights as torch's layers start."""
        from frugal.common.models.vit import ImageTransformer

        return ImageTransformer(self, embed_dim)


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """A text transformer with learned positions."""

    width: Count
    depth: Count
    """Blocks."""
    heads: Count
    mlp_width: Count
    vocabulary: Count = CLIP_VOCABULARY
    """Rows of the token table."""
    length: Count = 77
    """Most tokens of a caption, special tokens included."""
    pad_id: CountOrZero = 0
    causal: bool = True
    """A token sees itself and what stands before it."""
    pad_mask: bool = False
    """No token sees padding."""
    activation: Activation = "gelu"
    norm_epsilon: Positive = 1e-5
    pooling: TextPooling = "end_of_text"
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    layer_scale: NotNegative | None = None
    """First value of the layer scales; without it there are none."""
    packed: bool = False
    """Compute captions without their padding; the numbers stay."""

    def __post_init__(self) -> None:
        _check_transformer("text", self)
        _check_choice("text", "pooling", self.pooling, TextPooling)
        if self.pad_id >= self.vocabulary:
            raise InputError(f"text.pad_id {self.pad_id} is outside of the vocabulary")
        if self.packed and self.padding_matters:
            raise InputError(
                "text.packed leaves the padding out, but here it changes the result "
                f"(text.causal={self.causal}, text.pad_mask={self.pad_mask}, "
                f"text.pooling={self.pooling}); set text.pad_mask, or leave text.packed off"
            )

    @property
    def padding_matters(self) -> bool:
        """Whether the slots behind a caption change its vector."""
        return self.pooling in ("last", "mean_all") or not (self.causal or self.pad_mask)

    def module(self, embed_dim: int | None = None) -> TextTransformer:
        """The tower, its weights as torch's layers start."""
        from frugal.common.models.text import TextTransformer

        return TextTransformer(self, embed_dim)


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """An image tower and a text tower that meet in one space."""

    image: ImageTower
    text: TextTower
    embed_dim: Count
    """Width of the space that both project to, without bias."""
    initial_logit_scale: float = math.log(1 / 0.07)
    """Logarithm of the factor on the cosines."""
    initial_logit_bias: float | None = None
    """Of the sigmoid loss; without it there is none."""
    norm_epsilon: NotNegative = 1e-8
    """Added to the length of a vector before dividing by it."""
    initialization: Initialization = "open_clip"

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        _check_choice("model", "initialization", self.initialization, Initialization)

    def build(self, generator: torch.Generator | None = None) -> DualEncoder:
        """The model, on the CPU in float32, with weights drawn from ``generator``.

        Without a generator the seed is 0.
        """
        from frugal.common.models.clip import build

        return build(self, generator)


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
