"""OpenAI's CLIP files: TorchScript archives as published, and state dicts saved from them.

Source: Radford et al., arXiv:2103.00020, whose towers a state dict gives away by its shapes: heads
are 64 wide, the activation is quick GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.preprocess import Pixels, Preparation
from frugal.common.models.text import TextTower
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD
from frugal.common.models.weight_names import OPEN_CLIP, from_open_clip, read_names
from frugal.common.weights.encoder_config import encoder_of_shapes
from frugal.common.weights.files import State, part_with, read_content, state_in, without_prefix
from frugal.common.weights.library import Library, fill, two_tower_bundle
from frugal.common.weights.torchscript import is_torchscript
from frugal.common.weights.wrapped import wrap_clip

NAME = "openai"
"""The name that stands for OpenAI's own models where a file does not say what it is."""
_LIBRARY = "OpenAI's CLIP"
_HEAD = 64
_PREPARED = Preparation(
    pixels=Pixels(mean=CLIP_MEAN, std=CLIP_STD), crop=CenterCrop(), told_by="OpenAI's own"
)
NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's files hold among their weights: three integers."""


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether a state holds the numbers that OpenAI's files alone have among their weights."""
    return "input_resolution" in state


def knows(path: Path, name: str | None) -> bool:
    """An archive as published, or a file that is said to be OpenAI's."""
    if not path.is_file():
        return False
    return name == NAME or (name is None and is_torchscript(path))


def load(path: Path, name: str | None, key: str | None) -> ModelBundle:
    """The model of a file: a vision transformer in our towers, a ResNet as open_clip's model.

    Raises:
        InputError: if the file cannot be read or holds another model.
    """
    del name  # it is OpenAI's
    content = read_content(path)
    stored = part_with(state_in(content, source=str(path), key=key), "logit_scale", source=path)
    if not is_openai(stored) and {"epoch", "state_dict"} <= set(content):
        raise InputError(
            f"{path} was saved by open_clip's trainer (it holds epoch and state_dict), whose "
            "models compute otherwise than OpenAI's unless their name ends with quickgelu; give "
            "--model with open_clip's name of it, such as ViT-B-16 or ViT-B-16-quickgelu"
        )
    return of_state(stored, path)


def of_state(stored: State, path: Path) -> ModelBundle:
    """The model of the tensors of a file.

    Raises:
        InputError: if they are of another model.
    """
    state = {n: t.float() for n, t in stored.items() if n not in NUMBERS}
    needed = ("text_projection", "positional_embedding", "token_embedding.weight")
    if missing := [name for name in needed if name not in state]:
        raise InputError(
            f"{path} is no CLIP model of OpenAI's: it has no {missing[0]}; give --model with "
            "open_clip's name of what it is"
        )
    if "visual.proj" in state:
        config = _towers(state, str(path))
        model = fill(config, from_open_clip(state, config), source=str(path))
        return two_tower_bundle(model, config, ClipBpe(), _PREPARED, path=path, library=_LIBRARY)
    if "visual.layer1.0.conv1.weight" not in state:
        raise InputError(f"{path} is no CLIP model of OpenAI's: it has no known image tower")
    return _resnet(state, path)


def visual_state(state: Mapping[str, Tensor], *, source: str) -> State:
    """The image tower among tensors by OpenAI's and open_clip's names, in float32 and by ours."""
    visual = {name: t.float() for name, t in state.items() if name.startswith("visual.")}
    return without_prefix(read_names(visual, OPEN_CLIP, source=source), "image.")


def _towers(state: State, source: str) -> DualEncoderConfig:
    """The shape of the towers, from the shapes of their weights."""
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    if first not in state:
        raise InputError(f"{source} holds no {first}; it is no whole model of OpenAI's")
    for name, dimensions in (("visual.conv1.weight", 4), ("text_projection", 2)):
        if state[name].ndim != dimensions:
            raise InputError(
                f"{name} of {source} has {state[name].ndim} dimensions, not {dimensions}; copy the "
                "file again"
            )
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    image = encoder_of_shapes(
        visual_state(state, source=source),
        source,
        patch_size=patch_size,
        heads=max(1, width // _HEAD),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        norm_epsilon=1e-5,
        activation="quick_gelu",
    ).tower
    text_width, embed_dim = state["text_projection"].shape
    text = TextTower(
        width=text_width,
        depth=len({n.split(".")[2] for n in state if n.startswith("transformer.resblocks.")}),
        heads=max(1, text_width // _HEAD),
        mlp_width=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        vocabulary=len(state["token_embedding.weight"]),
        length=len(state["positional_embedding"]),
        activation="quick_gelu",
    )
    return DualEncoderConfig(image=image, text=text, embed_dim=embed_dim)


def _resnet(state: Mapping[str, Tensor], path: Path) -> ModelBundle:
    from open_clip.model import build_model_from_openai_state_dict

    try:
        model = build_model_from_openai_state_dict(dict(state), cast_dtype=None)
    except (RuntimeError, KeyError, AssertionError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} is no ResNet of OpenAI's: {reason}") from None
    size = int(model.visual.image_size)
    length = int(model.context_length)
    wrapped = wrap_clip(model, _PREPARED.pixels, size=(size, size), length=length, library=_LIBRARY)
    return two_tower_bundle(
        wrapped, wrapped.config, ClipBpe(), _PREPARED, path=path, library=_LIBRARY
    )


LIBRARY = Library(name=_LIBRARY, knows=knows, load=load)
