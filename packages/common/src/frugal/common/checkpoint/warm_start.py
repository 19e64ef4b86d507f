"""Start a stage from the weights of another: same names, optimiser and counters afresh.

Position tables may change between stages, with permission. A learned one is resampled; a fixed
one is computed for the new grid, and may become learned: it starts from the old kind of table on
the new grid then. The grids are those of the two recipes, so that they need not be square.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from frugal.common.checkpoint.store import Checkpoint, find_checkpoint
from frugal.common.errors import InputError
from frugal.common.models.config import ImageTower, TextTower
from frugal.common.models.image_tower import ImageTransformer
from frugal.common.models.positions import sincos_table
from frugal.common.models.text_tower import TextTransformer
from frugal.common.recipe import load_recipe

Tower = ImageTower | TextTower


class Resample(Protocol):
    """Brings a learned position table to another grid or length."""

    def __call__(self, name: str, table: Tensor, *, old: Tower | None, new: Tower) -> Tensor:
        """See :func:`frugal.common.models.positions.resample_table`."""
        ...


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by name; their moving average where the run kept one."""
    read = checkpoint.reader()
    return {name: read(stored) for name, stored in checkpoint.weights().items()}


def trained_objective(recipe: Any, source: Path, *, log: logging.Logger) -> Any:
    """What a recipe trains, with the weights of a run or checkpoint, on the CPU, to be measured.

    Raises:
        InputError: if the weights are not of that recipe's model, or what it starts from is gone.
    """
    recipe = replace(recipe, engine=replace(recipe.engine, compile=False))
    objective = recipe.objective.build(recipe)
    warm_start(objective, source, resample=None, log=log)
    return objective.eval()


def warm_start(
    objective: nn.Module, source: Path, *, resample: Resample | None, log: logging.Logger
) -> None:
    """Copy the weights of a run or checkpoint into a model that was just built.

    Args:
        objective: what the new stage trains.
        source: a run directory, or one of its checkpoints.
        resample: brings a position table to another grid or length; None refuses another one.
        log: told what was taken from where.

    Raises:
        InputError: if names or shapes do not fit; the model is unchanged then.
    """
    checkpoint = find_checkpoint(source)
    stored = load_weights(checkpoint)
    wanted = objective.state_dict()
    notes = _fit_position_tables(objective, checkpoint, stored, source, resample, log)
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        what = f"it lacks {missing[0]}" if missing else f"it holds {unknown[0]} besides"
        raise InputError(
            f"the weights of {source} do not fit this recipe's model: {what}; start from a run of "
            "the same architecture"
        )
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise InputError(
                f"the weights of {source} do not fit this recipe's model: {name} has the shape "
                f"{tuple(stored[name].shape)} there and {tuple(tensor.shape)} here"
            )
    objective.load_state_dict(stored)
    if any(name.startswith("ema/") for name in checkpoint.names()):
        notes = ["moving average", *notes]
    log.info(
        "started from step %d of %s: %d tensors%s",
        checkpoint.step,
        source,
        len(wanted),
        "".join(f", {note}" for note in notes),
    )


def _fit_position_tables(
    objective: nn.Module,
    checkpoint: Checkpoint,
    stored: dict[str, Tensor],
    source: Path,
    resample: Resample | None,
    log: logging.Logger,
) -> list[str]:
    """Bring the stored tables to what the towers take; what was done, for people to read."""
    towers = _towers(objective)
    saved = _saved_towers(checkpoint, list(towers), log)
    notes = []
    for name, new in towers.items():
        old, table = saved.get(name), stored.get(name)
        there, here = _extent_there(table, old, new), _extent(new)
        if there != here and resample is None:
            raise InputError(
                f"{name} of {source} is made for another grid or length ({there}, here {here}); "
                "add --run.interpolate to bring it to the new one"
            )
        if table is None and isinstance(old, ImageTower) and old.positions != "learned":
            if isinstance(new, ImageTower) and new.positions == "learned":
                stored[name] = _fixed_table(old, new)
                notes.append(f"{name} from its fixed table")
            elif there != here:
                notes.append(f"{name} computed for {here}")
        elif table is not None and there != here:
            assert resample is not None
            stored[name] = resample(name, table, old=old, new=new)
            notes.append(f"{name} resampled from {there} to {here}")
    return notes


def _towers(objective: nn.Module) -> dict[str, Tower]:
    """The towers of a model, by the name of their position table."""
    return {
        f"{path}.pos_embed".removeprefix("."): module.config
        for path, module in objective.named_modules()
        if isinstance(module, (ImageTransformer, TextTransformer))
    }


def _saved_towers(
    checkpoint: Checkpoint, names: list[str], log: logging.Logger
) -> dict[str, Tower]:
    """The same towers in the recipe that the checkpoint's run was trained by, where there is one.

    A tower stands in the recipe where its module stands in the objective.
    """
    path = checkpoint.folder.parent.parent / "recipe.json"
    if not path.exists():
        return {}
    try:
        recipe = load_recipe(path)
    except InputError as error:
        log.warning("%s; its images count as square", error)
        return {}
    towers = {}
    for name in names:
        try:
            tower = attrgetter(name.rpartition(".")[0])(recipe)
        except AttributeError:
            continue
        if isinstance(tower, (ImageTower, TextTower)):
            towers[name] = tower
    return towers


def _extent(tower: Tower) -> str:
    """What a position table is made for, in words."""
    if isinstance(tower, TextTower):
        return f"{tower.length} tokens"
    return f"{tower.grid[0]}x{tower.grid[1]} patches"


def _extent_there(table: Tensor | None, old: Tower | None, new: Tower) -> str:
    """The same of a stored table; without a recipe its number of rows is all that is known."""
    if old is not None:
        return _extent(old)
    rows = None if table is None else table.shape[1]
    expected = new.length if isinstance(new, TextTower) else new.num_positions
    return _extent(new) if rows in (None, expected) else f"{rows} rows"


def _fixed_table(old: ImageTower, new: ImageTower) -> Tensor:
    """(1, rows, D): the old kind of fixed table on the new grid."""
    class_row = old.class_token == "with_position"
    return sincos_table(new.grid, old.width, old.positions, class_row=class_row)[None]
