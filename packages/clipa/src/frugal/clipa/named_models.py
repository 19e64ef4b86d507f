"""CLIPA's towers under the names that its checkpoints go by.

The second version's (arXiv:2306.15658) are ``ViT-L-14-CLIPA``, ``ViT-H-14-CLIPA-336`` and so on,
as in open_clip. open_clip's configurations of these names have an epsilon of 1e-5 and the exact
GELU where the weights were trained with 1e-6 and the tanh approximation; embeddings differ by more
than rounding. Ours are as trained unless asked otherwise.

The first version's (arXiv:2305.07017) are ordinary CLIP towers with short captions, most of them
pooled by the mean over all tokens (GAP): ``ViT-L-16-CL16-GAP`` and so on, CL being the length of
a caption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder, clipa_encoder


def clipa_v1_encoder(
    name: str,
    *,
    image_size: int = 224,
    text_length: int = 16,
    class_pooling: bool = False,
    **image: Any,
) -> DualEncoderConfig:
    """The towers of CLIPA's first version, such as ``clipa_v1_encoder("L/16")``.

    Args:
        name: size and patch of the image tower.
        image_size: in pixels.
        text_length: most tokens of a caption.
        class_pooling: pool the class token, as B/16 does; else the mean over all tokens, class
            token included, which the last norm comes after.
        image: other fields of the image tower, such as its positions.
    """
    model = clip_encoder(name, image_size=image_size, text_length=text_length)
    if not class_pooling:
        image = {"pooling": "mean_all", "norm_after_pooling": True, **image}
    return replace(model, image=replace(model.image, **image))


_V1: dict[str, Callable[..., DualEncoderConfig]] = {
    "ViT-B-16-CL16": partial(clipa_v1_encoder, "B/16", class_pooling=True),
    "ViT-L-16-CL16-GAP": partial(clipa_v1_encoder, "L/16"),
    "ViT-L-16-CL8-GAP": partial(clipa_v1_encoder, "L/16", text_length=8),
    "ViT-L-16-CL32-GAP": partial(clipa_v1_encoder, "L/16", text_length=32),
    "ViT-H-14-CL8-GAP": partial(clipa_v1_encoder, "H/14", text_length=8),
    "ViT-H-14-CL32-GAP": partial(clipa_v1_encoder, "H/14", text_length=32),
    "ViT-bigG-14-CL32-GAP": partial(clipa_v1_encoder, "bigG/14", text_length=32),
}
"""The published names with "-Syntax" have the same towers; which words of a caption they read is
the matter of a recipe."""

MODELS: dict[str, Callable[..., DualEncoderConfig]] = {
    f"ViT-{size}-{patch}-CLIPA{suffix}": partial(
        clipa_encoder, f"{size}/{patch}", image_size=image_size
    )
    for size, patch in (("B", 16), ("L", 14), ("H", 14), ("bigG", 14))
    for suffix, image_size in (("", 224), ("-336", 336))
} | _V1
"""Functions that return the towers of a name; those of the second version take
``as_in_open_clip``."""


def named_model(name: str, *, as_in_open_clip: bool = False) -> DualEncoderConfig:
    """The towers that a checkpoint's name stands for.

    Args:
        name: one of ``MODELS``, with or without "-Syntax".
        as_in_open_clip: epsilon, GELU and learned positions of open_clip's configurations.

    Raises:
        InputError: if the name is unknown.
    """
    towers = name.replace("-SyntaxMask", "").replace("-Syntax", "")
    if towers not in MODELS:
        raise InputError(f"there is no CLIPA model {name!r}; choose from {', '.join(MODELS)}")
    if not as_in_open_clip:
        return MODELS[towers]()
    if towers in _V1:
        raise InputError(
            f"{name} is the same in open_clip as it was trained; leave out --as-in-open-clip"
        )
    return MODELS[towers](as_in_open_clip=True)
