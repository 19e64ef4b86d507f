"""The first weights of what stands on an image tower: those of the tower of another model.

Source: MILAN (arXiv:2208.06049) and MAE (arXiv:2111.06377, appendix A.2). Everything a tower needs
must be there; what may be missing or left over is named here.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from torch import nn

from frugal.common.checkpoint.store import BEST, find_checkpoint
from frugal.common.errors import InputError
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.in_words import some
from frugal.common.models.same_function import refuse_other_function
from frugal.common.models.vit import ImageTower, ImageTransformer, image_table
from frugal.common.transfer.classifier import VisionClassifier
from frugal.common.weights.image_towers import read_encoder

_FREE = {
    "pooling": "what is on top of the tower is new, or compared by its shape",
    "norm_after_pooling": "what is on top of the tower is new, or compared by its shape",
    "projector_width": "a projector is left behind",
    "projector_outputs": "a projector is left behind",
}
"""What an encoder may do differently from the classifier that starts from it, and why."""
_LEFT_OUT = ("projection.",)
"""Of a tower: leads into the space that it shares with texts."""


def init_encoder(
    image: ImageTransformer, source: Path, *, interpolate: bool, log: logging.Logger
) -> ImageEncoder:
    """Give an image tower the weights of that of a run, a file or a folder.

    Args:
        image: has learned positions; they start from those of the source.
        source: see :mod:`frugal.common.weights.image_towers`.
        interpolate: whether positions may be brought to another grid.
        log: told what was taken.

    Returns:
        What was read.

    Raises:
        InputError: if it holds no tower, or another one than this; this one is unchanged then.
    """
    is_best = source.name == BEST and source.is_file()
    found = read_encoder(find_checkpoint(source).folder if is_best else source)
    refuse_other_function(
        found.tower,
        image.config,
        part="model.image",
        what=f"the encoder of {source}",
        log=log,
        guessed=found.guessed,
        free=_FREE,
    )
    notes = [str(source)]
    if found.tower.grid != image.config.grid:
        notes.append(_resized(found.tower, image.config, source, interpolate=interpolate))
    found = _with_learned_table(found).for_images(image.config.height_width)
    state = {n: t for n, t in found.state.items() if not n.startswith(_LEFT_OUT)}
    if isinstance(image.norm, nn.Identity):  # pooled features have a norm of their own
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    needed = image.state_dict()
    if missing := sorted(needed.keys() - state.keys()):
        raise InputError(
            f"the encoder of {source} has no {some(missing)}, which this model needs"
            + (
                "; its features were pooled by a mean, set --model.image.pooling mean and "
                "--model.image.norm-after-pooling to do so too"
                if missing[0].startswith("norm.")
                else ""
            )
        )
    if unknown := sorted(state.keys() - needed.keys()):
        raise InputError(
            f"the encoder of {source} has {some(unknown)}, which this model has not; fine-tune a "
            "model of the same kind"
        )
    for name, tensor in needed.items():
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{name} of the encoder of {source} has the shape {tuple(state[name].shape)}, here "
                f"it has {tuple(tensor.shape)}; fine-tune a model of the same shape"
            )
    image.load_state_dict(state)
    log.info("the encoder starts from %s: %d tensors", ", ".join(notes), len(state))
    return found


def init_head(model: VisionClassifier, found: ImageEncoder, *, log: logging.Logger) -> None:
    """Give a classifier the head of a fine-tuned model, and the norm before it, where they fit."""
    fresh = []
    for name, part in (("fc_norm", model.fc_norm), ("head", model.head)):
        needed = part.state_dict()
        stored = {n: found.rest[f"{name}.{n}"] for n in needed if f"{name}.{n}" in found.rest}
        fits = all(stored[n].shape == tensor.shape for n, tensor in needed.items() if n in stored)
        if stored.keys() == needed.keys() and fits:
            part.load_state_dict(stored)
        else:
            fresh.append(f"{name} (of another shape there)" if stored else name)
    if fresh:
        log.info("with new weights: %s", ", ".join(fresh))


def _resized(there: ImageTower, here: ImageTower, source: Path, *, interpolate: bool) -> str:
    grids = [f"{rows}x{columns}" for rows, columns in (there.grid, here.grid)]
    if not interpolate:
        raise InputError(
            f"the positions of the encoder of {source} are made for {grids[0]} patches, here are "
            f"{grids[1]}; add --run.interpolate to bring them to the new grid"
        )
    return f"positions resampled from {grids[0]} to {grids[1]} patches"


def _with_learned_table(found: ImageEncoder) -> ImageEncoder:
    """The same tower with its fixed position table as one that can be trained."""
    if found.tower.positions == "learned":
        return found
    table = image_table(found.tower)
    tower = replace(found.tower, positions="learned")
    return replace(found, tower=tower, state={**found.state, "pos_embed": table})
