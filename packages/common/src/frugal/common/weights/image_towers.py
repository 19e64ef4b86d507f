"""The image tower alone of whatever holds one, to start from or to be taught by.

A run directory or checkpoint whose model has an image tower of this library; folders of open_clip,
timm and transformers (CLIP, ViT, ViTMAE), or their names on the Hugging Face hub; and files of
tensors, see :mod:`frugal.common.weights.image_states`.
"""

from __future__ import annotations

import re
from pathlib import Path

from frugal.common.checkpoint.store import MODEL_FILE
from frugal.common.errors import InputError
from frugal.common.files import making_sense_of, reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.weights import open_clip, runs
from frugal.common.weights.image_states import encoder_of_file
from frugal.common.weights.libraries import library_of


def read_encoder(
    source: Path | str, *, activation: Activation | None = None, heads: int | None = None
) -> ImageEncoder:
    """The image tower of a file, a folder, or a name on the Hugging Face hub, in float32.

    Args:
        source: see the module.
        activation: of its blocks, where the file does not say and is not to be guessed.
        heads: attention heads, where the file does not say.

    Raises:
        InputError: if there is no such thing, or it holds no tower of a known kind.
    """
    path = Path(source)
    if not path.exists():
        path = _fetched(str(source))
    if not path.is_dir():
        return encoder_of_file(path, activation=activation, heads=heads)
    library = library_of(path)
    if library is None and any((path / name).is_file() for name in ("recipe.json", MODEL_FILE)):
        library = runs.LIBRARY  # which says what is missing
    if library is None or library.image_tower is None:
        raise InputError(
            f"the folder {path} holds no model; give a run directory, or a folder with a "
            "config.json or open_clip_config.json"
        )
    with making_sense_of(path):
        encoder = library.image_tower(path)
    for name, given in (("activation", activation), ("heads", heads)):
        actual = getattr(encoder.tower, name)
        if given not in (None, actual):
            raise InputError(
                f"{name} is given as {given}, but {source} says itself what its tower is like: "
                f"{actual}; leave it out"
            )
    return encoder


def _fetched(name: str) -> Path:
    """The folder of a model on the hub, downloaded if it is not here yet."""
    bare = name.removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", bare) or Path(bare).suffix:
        raise InputError(f"there is no file or folder {name}; check the path")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*config.json", *open_clip.WEIGHTS]
        return Path(snapshot_download(bare, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of every kind
        raise InputError(
            f"there is no file or folder {name}, and it cannot be fetched from the Hugging Face "
            f"hub: {reason_of(error)}"
        ) from None
