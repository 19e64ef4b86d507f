"""Where towers of Frugal's own kind get their first weights: published files, folders and runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from frugal.cit.published_vision import VisionWeights, read_vision
from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.checkpoint.warm_start import refuse_other_tokens, saved_model
from frugal.common.errors import InputError
from frugal.common.models.fit import misfit
from frugal.common.models.positions import resample_grid, resample_length
from frugal.common.models.same_function import refuse_other_function
from frugal.common.models.text import TextTower, TextTransformer
from frugal.common.models.vit import ImageTower, ImageTransformer, image_table
from frugal.common.weights.files import without_prefix
from frugal.common.weights.runs import load_run

_FREE = {
    "positions": "the tables themselves are compared",
    "projector_width": "a projector is left behind, or new where it is trained",
    "projector_outputs": "a projector is left behind, or new where it is trained",
}
"""What a tower may do differently from the one that starts from it, and why."""
_TABLE_TOLERANCE = 1e-4


def start_image(
    tower: ImageTransformer,
    source: str,
    *,
    interpolate: bool,
    fresh_projector: bool,
    log: logging.Logger,
) -> None:
    """Give an image tower the weights of a file, a folder, a name on the hub or a run.

    The projection into the space of texts stays as it is, and so does a projector that the source
    does not have.

    Args:
        tower: ours.
        source: see :mod:`frugal.cit.published_vision`.
        interpolate: whether positions may be brought to another grid.
        fresh_projector: whether the tower may keep the projector it has.
        log: told what was taken.

    Raises:
        InputError: if there is no tower, or it computes something else; nothing is changed then.
    """
    found = read_vision(source)
    config = tower.config
    refuse_other_function(
        found.tower,
        config,
        part="model.image",
        what=f"the image tower of {source}",
        log=log,
        guessed=found.guessed,
        free=_FREE,
    )
    state = _without_projection(found.state)
    notes: list[str] = []
    _fit_table(state, found, config, source, interpolate=interpolate, notes=notes)
    tower_state = _without_projection(tower.state_dict())
    _fit_projector(state, tower_state, source, fresh=fresh_projector, notes=notes)
    _check_shapes(state, tower_state, part="image", source=source)
    tower.load_state_dict(state, strict=False)
    log.info("the image tower starts from %s", ", ".join([source, *notes]))


def _fit_table(
    state: dict[str, Tensor],
    found: VisionWeights,
    config: ImageTower,
    source: str,
    *,
    interpolate: bool,
    notes: list[str],
) -> None:
    """The position table as the tower has it: on its grid, as a weight or as nothing."""
    grids = [f"{rows}x{columns}" for rows, columns in (found.tower.grid, config.grid)]
    if found.tower.grid != config.grid and not interpolate:
        raise InputError(
            f"the positions of {source} are made for {grids[0]} patches, here are {grids[1]}; add "
            "--run.interpolate to bring them to the new grid"
        )
    if "pos_embed" not in state:
        table = image_table(replace(found.tower, image_size=config.image_size))
    else:
        table = state.pop("pos_embed")
    if found.tower.positions == "learned" and found.tower.grid != config.grid:
        table = resample_grid(
            table,
            old_grid=found.tower.grid,
            new_grid=config.grid,
            align_corners=found.aligns_corners,
        )
        notes.append(f"positions resampled from {grids[0]} to {grids[1]} patches")
    if config.positions == "learned":
        state["pos_embed"] = table
        return
    here = image_table(config)
    if table.shape != here.shape or (table - here).abs().max() > _TABLE_TOLERANCE:
        raise InputError(
            f"the position table of {source} is not {config.positions}; keep it with "
            "--model.image.positions learned"
        )


def _fit_projector(
    state: dict[str, Tensor],
    tower_state: dict[str, Tensor],
    source: str,
    *,
    fresh: bool,
    notes: list[str],
) -> None:
    """Leave a projector away that the tower has not; accept that there is none, if allowed."""
    there = [name for name in state if name.startswith("projector.")]
    here = [name for name in tower_state if name.startswith("projector.")]
    if there and not here:
        for name in there:
            del state[name]
        notes.append("without its projector")
    if here and not there:
        if not fresh:
            raise InputError(
                f"{source} has no projector, and a random one would stay as it is; train it with "
                "--objective.train-image head, or leave --model.image.projector-width out"
            )
        for name in here:
            del tower_state[name]
        notes.append("with a new projector")


def _check_shapes(
    state: dict[str, Tensor], tower_state: dict[str, Tensor], *, part: str, source: str
) -> None:
    if what := misfit(state, tower_state):
        raise InputError(
            f"the {part} tower of {source} does not fit: {what}; choose a tower of the same kind, "
            "or copy the file again"
        )


def start_text(
    tower: TextTransformer,
    source: str,
    *,
    interpolate: bool,
    tokenizer: Any,
    log: logging.Logger,
) -> None:
    """Give a text tower the weights of a run's; the projection stays as it is.

    Args:
        tower: ours.
        source: a run directory or checkpoint.
        interpolate: whether positions may be brought to another length.
        tokenizer: of the new run, which must make the ids of the old one.
        log: told what was taken.

    Raises:
        InputError: if the run has no such text tower; nothing is changed then.
    """
    bundle = load_run(Path(source))
    stored_tower = bundle.text
    if not isinstance(stored_tower, TextTower):
        raise InputError(f"the run {source} trained no text tower of Frugal's; give another one")
    what = f"the text tower of {source}"
    refuse_other_function(stored_tower, tower.config, part="model.text", what=what, log=log)
    checkpoint = find_checkpoint(Path(source))
    saved, folder = saved_model(checkpoint, log), checkpoint.folder.parent.parent
    there = None if saved is None else saved.tokenizer
    refuse_other_tokens(there, folder, tokenizer, what=what, log=log)
    state = without_prefix(bundle.model.state_dict(), "text.")
    if stored_tower.length != tower.config.length:
        if not interpolate:
            raise InputError(
                f"the text tower of {source} has {stored_tower.length} slots, here are "
                f"{tower.config.length}; add --run.interpolate to bring its positions to them"
            )
        state["pos_embed"] = resample_length(state["pos_embed"], tower.config.length)
    kept, tower_state = _without_projection(state), _without_projection(tower.state_dict())
    _check_shapes(kept, tower_state, part="text", source=source)
    tower.load_state_dict(kept, strict=False)
    log.info("the text tower starts from %s", source)


def _without_projection(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if not n.startswith("projection.")}
