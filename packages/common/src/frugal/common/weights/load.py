"""One way to load a model from anywhere."""

from __future__ import annotations

import logging
from pathlib import Path

from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.weights.libraries import is_foreign
from frugal.common.weights.reading import describe, read
from frugal.common.weights.runs import load_run

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
    path = Path(path)
    if not is_foreign(path):
        for flag, value in (("--model", name), ("--weights-key", weights_key)):
            if value is not None:
                raise InputError(
                    f"{flag} {value} is for a file of weights of another library, but {path} is "
                    "none; leave it out"
                )
        return load_run(path)
    bundle = read(path, name=name, key=weights_key)
    _LOG.info("%s: %s", path, describe(bundle))
    return bundle
