"""One way to load a model from anywhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.files import making_sense_of
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.in_words import in_words
from frugal.common.models.vit import ImageTower
from frugal.common.weights import runs
from frugal.common.weights.encoder_config import ImportedEncoder
from frugal.common.weights.libraries import library_of

_LOG = logging.getLogger("frugal")


def load_model(
    path: Path | str, *, name: str | None = None, weights_key: str | None = None
) -> ModelBundle:
    """The model of a path, in float32 on the CPU, in evaluation mode; no code in it is ever run.

    Args:
        path: a run directory of any method, or one of its checkpoints (the moving average of its
            weights, where it kept one); a folder of open_clip, transformers (CLIP, SigLIP,
            VisionTextDualEncoder, ViT, ViTMAE, CLIPVision) or timm; a file of OpenAI's CLIP; or
            with a name any file of weights that open_clip or timm loads.
        name: of a file that does not say which model it holds: open_clip's or timm's, or openai.
        weights_key: of a file that holds several sets of weights, the keys that lead to the one to
            take, or what stands in front of its names.

    Raises:
        InputError: if there is no model, it cannot be read, or the name does not belong to it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"there is no file or folder {path}; check the path")
    library = library_of(path, name) or runs.LIBRARY  # which says what is missing
    with making_sense_of(path):
        bundle = library.load(path, name, weights_key)
    if library is not runs.LIBRARY:
        _LOG.info("%s: %s", path, describe(bundle))
    return bundle


def describe(bundle: ModelBundle) -> str:
    """What was read, in words."""
    config, state, how = bundle.config, bundle.model.state_dict(), in_words(bundle)
    if isinstance(config, ImportedEncoder):
        classes = config.num_classes
        head = "" if classes is None else f", with a linear layer to {classes:,} numbers"
        return f"{_words(config.image)}{head}; {_count(state)} parameters; {how}"
    if not isinstance(config, DualEncoderConfig):
        return how
    text = config.text
    return (
        f"{bundle.source.library}'s {_words(config.image)}; text tower {text.width} wide, "
        f"{text.depth} blocks, {text.length} tokens, pooled by {text.pooling}; {_count(state)} "
        f"parameters; {how}"
    )


def _words(tower: ImageTower) -> str:
    height, width = tower.height_width
    return (
        f"image tower {tower.width} wide, {tower.depth} blocks, patches of {tower.patch_size}, "
        f"{height}x{width} pixels, pooled by {tower.pooling}"
    )


def _count(state: Mapping[str, Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in state.values()):,}"
