"""OpenAI's CLIP files: TorchScript archives as published, and state dicts saved from them.

Source: Radford et al., arXiv:2103.00020, whose towers a state dict gives away by its shapes: heads
are 64 wide, the activation is quick GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD, ImageTower
from frugal.common.models.weight_names import from_open_clip
from frugal.common.weights.files import part_with, read_content, state_in
from frugal.common.weights.libraries import Foreign, fill
from frugal.common.weights.wrapped import Wrapped, WrappedImage, WrappedModel, WrappedText

LIBRARY = "OpenAI's CLIP"
_HEAD = 64
NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's files hold among their weights: three integers."""


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether a state holds the numbers that OpenAI's files alone have among their weights."""
    return "input_resolution" in state


def load(path: Path, *, key: str | None = None) -> Foreign:
    """The model of a file: a vision transformer in our towers, a ResNet as open_clip's model.

    Args:
        path: the file.
        key: which of several sets of weights in it.

    Raises:
        InputError: if the file cannot be read or holds another model.
    """
    content = read_content(path)
    stored = part_with(state_in(content, source=str(path), key=key), "logit_scale", source=path)
    if not is_openai(stored) and {"epoch", "state_dict"} <= set(content):
        raise InputError(
            f"{path} was saved by open_clip's trainer (it holds epoch and state_dict), whose "
            "models compute otherwise than OpenAI's unless their name ends with quickgelu; give "
            "--model with open_clip's name of it, such as ViT-B-16 or ViT-B-16-quickgelu"
        )
    state = {n: t.float() for n, t in stored.items() if n not in NUMBERS}
    needed = ("text_projection", "positional_embedding", "token_embedding.weight")
    if missing := [name for name in needed if name not in state]:
        raise InputError(
            f"{path} is no CLIP model of OpenAI's: it has no {missing[0]}; give --model with "
            "open_clip's name of what it is"
        )
    if "visual.proj" in state:
        config = towers(state)
        model: Any = fill(config, from_open_clip(state, config), source=str(path))
        return _foreign(model, config)
    if "visual.layer1.0.conv1.weight" not in state:
        raise InputError(f"{path} is no CLIP model of OpenAI's: it has no known image tower")
    return _resnet(state, path)


def _foreign(model: Any, config: DualEncoderConfig | WrappedModel) -> Foreign:
    return Foreign(
        model=model,
        config=config,
        tokenizer=ClipBpe(),
        crop=CenterCrop(),
        told_by="OpenAI's own",
        library=LIBRARY,
    )


def towers(state: Mapping[str, Tensor]) -> DualEncoderConfig:
    """The shape of the towers, from the shapes of their weights.

    Raises:
        InputError: if the state is not of such towers.
    """
    width, _, patch, _ = state["visual.conv1.weight"].shape
    rows = len(state["visual.positional_embedding"]) - 1
    grid = round(rows**0.5)
    if grid * grid != rows:
        raise InputError(
            f"the position table of OpenAI's model has {rows} rows, which is no square"
        )
    text_width, embed_dim = state["text_projection"].shape
    image = ImageTower(
        width=width,
        depth=_depth(state, "visual.transformer.resblocks."),
        heads=max(1, width // _HEAD),
        mlp_width=len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        patch_size=patch,
        image_size=grid * patch,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        patch_bias=False,
        pre_norm=True,
        norm_epsilon=1e-5,
        activation="quick_gelu",
    )
    text = TextTower(
        width=text_width,
        depth=_depth(state, "transformer.resblocks."),
        heads=max(1, text_width // _HEAD),
        mlp_width=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        vocabulary=len(state["token_embedding.weight"]),
        length=len(state["positional_embedding"]),
        activation="quick_gelu",
    )
    return DualEncoderConfig(image=image, text=text, embed_dim=embed_dim)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({n[len(prefix) :].split(".")[0] for n in state if n.startswith(prefix)})


def _resnet(state: Mapping[str, Tensor], path: Path) -> Foreign:
    from open_clip.model import build_model_from_openai_state_dict

    try:
        theirs = build_model_from_openai_state_dict(dict(state), cast_dtype=None).float().eval()
    except (RuntimeError, KeyError, AssertionError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} is no ResNet of OpenAI's: {reason}") from None
    size = int(theirs.visual.image_size)
    config = WrappedModel(
        library=LIBRARY,
        image=WrappedImage(height_width=(size, size), mean=CLIP_MEAN, std=CLIP_STD),
        text=WrappedText(length=int(theirs.context_length)),
    )
    wrapped = Wrapped(
        theirs,
        config,
        image=lambda model, images: model.encode_image(images),
        text=lambda model, token_ids, lengths: model.encode_text(token_ids),
    )
    return _foreign(wrapped.eval(), config)
