"""Start a stage from the weights of another: same names, optimizer and counters afresh.

Position tables may change between stages, with permission. A learned one is resampled; a fixed
one is computed for the new grid, and may become learned: it starts from the old kind of table on
the new grid then. The grids are those of the two recipes, so that they need not be square.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from frugal.common.checkpoint.store import Checkpoint, find_checkpoint
from frugal.common.data.tokenizers import TokenizerConfig, load_tokenizer, token_difference
from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.fit import misfit
from frugal.common.models.positions import sincos_table
from frugal.common.models.same_function import (
    Difference,
    advice,
    differences,
    refuse_other_function,
)
from frugal.common.models.text import TextTower, TextTransformer
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.recipe import from_json, load_recipe

Tower = ImageTower | TextTower


MODEL_FILE = "model.json"
"""In a run directory: what of its model is no weight."""


class Resample(Protocol):
    """Brings a learned position table to another grid or length."""

    def __call__(self, name: str, table: Tensor, *, old: Tower | None, new: Tower) -> Tensor:
        """See :func:`frugal.common.models.positions.resample_table`."""
        ...


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by name; their moving average where the run kept one.

    Raises:
        InputError: if a number is not finite.
    """
    read = checkpoint.reader()
    weights = {name: read(stored) for name, stored in checkpoint.weights().items()}
    refuse_not_finite(weights, source=str(checkpoint.folder))
    return weights


def trained_objective(recipe: Any, source: Path, *, log: logging.Logger) -> Any:
    """What a recipe trains, with the weights of a run or checkpoint, on the CPU, to be measured.

    Raises:
        InputError: if the weights are not of that recipe's model, or what it starts from is gone.
    """
    recipe = replace(recipe, engine=replace(recipe.engine, compile=False))
    objective = recipe.objective.build(recipe)
    _load(_Start(objective, source, recipe), resample=None, log=log)
    return objective.eval()


def warm_start(
    objective: nn.Module, source: Path, *, resample: Resample | None, log: logging.Logger
) -> None:
    """Copy the weights of a run or checkpoint into a model that was just built.

    Args:
        objective: what the new stage trains. Its ``tokenizer``, where it has one, must make the
            ids that the run's made.
        source: a run directory, or one of its checkpoints.
        resample: brings a position table to another grid or length; None refuses another one.
        log: told what was taken from where, and what differs and may.

    Raises:
        InputError: if names or shapes do not fit, or the model of the run computes something else
            with such weights; the model is unchanged then.
    """
    checkpoint = find_checkpoint(source)
    saved = saved_model(checkpoint, log)
    if saved is None:
        log.warning(
            "no recipe says how the model of %s computes: only the names and shapes of its weights "
            "are compared, not heads, activation, epsilon, pooling, pixels and tokenizer", source,
        )  # fmt: skip
    _load(_Start(objective, source, saved), resample=resample, log=log, compare=saved is not None)


class Saved(NamedTuple):
    """What a checkpoint says of its model beside the weights."""

    model: Any
    """Its configuration."""
    tokenizer: Any
    """That of its tokenizer; None of a model that reads no captions."""


def saved_model(checkpoint: Checkpoint, log: logging.Logger) -> Saved | None:
    """What the run of a checkpoint trained, or was made of; None where it is not known."""
    folder = checkpoint.folder.parent.parent
    try:
        if (folder / "recipe.json").exists():
            recipe = load_recipe(folder / "recipe.json")
        elif (kept := checkpoint.state.get("recipe")) is not None:
            recipe = from_json(kept, source=str(checkpoint.folder / "state.json"))
        elif (folder / MODEL_FILE).exists():
            source = str(folder / MODEL_FILE)
            about = from_json(read_json_object(folder / MODEL_FILE), source=source)
            return Saved(about["model"], about["tokenizer"])
        else:
            return None
    except InputError as error:
        log.warning("%s; its images count as square", error)
        return None
    return Saved(recipe.model, getattr(recipe.data, "tokenizer", None))


def refuse_other_tokens(
    there: Any, folder: Path, here: TokenizerConfig | None, *, what: str, log: logging.Logger
) -> None:
    """Refuse weights that were trained with other token ids than the new stage makes.

    Args:
        there: tokenizer of the run that the weights are from.
        folder: its run directory.
        here: tokenizer of the new stage.
        what: where the weights are from, for messages.
        log: told of texts that hardly occur, and where nothing can be compared.

    Raises:
        InputError: with the flag that names the run's tokenizer.
    """
    kept = folder / "tokenizer"
    if there is None or here is None or (there == here and not kept.is_dir()):
        return
    try:
        trained_with = load_tokenizer(kept) if kept.is_dir() else there.load()
    except InputError as error:
        log.warning("the tokenizer of %s is not compared with this recipe's: %s", what, error)
        return
    found = token_difference(trained_with, here.load())
    if found is None:
        return
    if found.of_odd_texts:
        log.warning("the tokenizer of %s differs in rare texts: it %s", what, found.words)
        return
    raise InputError(
        f"the tokenizer that {what} was trained with {found.words}; "
        f"{_tokenizer_flag(there, here, kept) or _saved_instead(folder)}"
    )


def _tokenizer_flag(there: Any, here: Any, kept: Path) -> str | None:
    """What makes a recipe take the tokenizer that a run keeps; None where no flag does."""
    if type(there) is not type(here) or not kept.is_dir():
        return None
    options = [
        f"--data.tokenizer.{'' if getattr(there, item.name) else 'no-'}"
        f"{item.name.replace('_', '-')}"
        for item in fields(there)
        if isinstance(getattr(there, item.name), bool)
        and getattr(there, item.name) != getattr(here, item.name)
    ]
    name = next((item.name for item in fields(there) if item.name in ("name", "vocab")), None)
    named = [] if name is None else [f"--data.tokenizer.{name} {kept}"]
    return f"give {' '.join([*named, *options])}"


def _saved_instead(folder: Path) -> str:
    """The way that always leads to an equal model."""
    return f"give {folder / 'recipe.json'} in the place of the recipe's name"


@dataclass(frozen=True)
class _Start:
    """A model and what it starts from."""

    objective: nn.Module
    source: Path
    saved: Any
    """The recipe that the weights were trained by; None where it is not known."""

    @property
    def config(self) -> Any:
        """Of the model that takes the weights."""
        return getattr(getattr(self.objective, "model", None), "config", None)

    def unlike(self) -> list[Difference]:
        """How the configurations differ."""
        if self.saved is None or self.config is None:
            return []
        return differences(self.saved.model, self.config, part="model")


def _load(
    start: _Start, *, resample: Resample | None, log: logging.Logger, compare: bool = False
) -> None:
    """Copy the weights; with ``compare`` refuse those of a model that computes otherwise."""
    objective, source = start.objective, start.source
    checkpoint = find_checkpoint(source)
    folder = checkpoint.folder.parent.parent
    stored, wanted = load_weights(checkpoint), objective.state_dict()
    instead = _saved_instead(folder) if (folder / "recipe.json").exists() else ""
    way = advice(start.unlike(), instead) or "start from a run of the same architecture"
    notes = _fit_position_tables(start, stored, resample, way)
    if what := misfit(stored, wanted):
        raise InputError(f"the weights of {source} do not fit this recipe's model: {what}; {way}")
    if compare and start.config is not None:
        what = f"the model of {source}"
        refuse_other_function(
            start.saved.model, start.config, part="model", what=what, log=log, instead=instead
        )
        here = getattr(objective, "tokenizer", None)
        refuse_other_tokens(start.saved.tokenizer, folder, here, what=what, log=log)
        _tell_clamped(objective, stored, log)
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


def _tell_clamped(objective: Any, stored: dict[str, Tensor], log: logging.Logger) -> None:
    """A logit scale beyond the bounds of the new stage changes at its first step."""
    for name, (low, high) in getattr(objective, "bounds", dict)().items():
        value = float(stored[name].max()) if name in stored else low
        if not low <= value <= high + 1e-6:
            log.warning(
                "%s is %.4g there and is kept between %.4g and %.4g here: it changes at the first "
                "step, unless objective.clamp is never", name, value, low, high,
            )  # fmt: skip


def _fit_position_tables(
    start: _Start, stored: dict[str, Tensor], resample: Resample | None, way: str
) -> list[str]:
    """Bring the stored tables to what the towers take; what was done, for people to read."""
    towers = _towers(start.objective)
    saved = _saved_towers(start.saved, list(towers))
    notes = []
    for name, new in towers.items():
        old, table = saved.get(name), stored.get(name)
        there, here = _extent_there(table, old, new), _extent(new)
        if there != here and resample is None:
            raise InputError(
                f"{name} of {start.source} is made for another grid or length ({there}, here "
                f"{here}); add --run.interpolate to bring it to the new one"
            )
        if table is None and isinstance(old, ImageTower) and old.positions != "learned":
            if isinstance(new, ImageTower) and new.positions == "learned":
                stored[name] = _fixed_table(old, new)
                notes.append(f"{name} from its fixed table")
            elif there != here:
                notes.append(f"{name} computed for {here}")
        elif table is not None and there != here:
            assert resample is not None
            try:
                stored[name] = resample(name, table, old=old, new=new)
            except InputError as error:
                raise InputError(f"{error}; {way}") from None
            notes.append(f"{name} resampled from {there} to {here}")
    return notes


def _towers(objective: nn.Module) -> dict[str, Tower]:
    """The towers of a model, by the name of their position table."""
    return {
        f"{path}.pos_embed".removeprefix("."): module.config
        for path, module in objective.named_modules()
        if isinstance(module, (ImageTransformer, TextTransformer))
    }


def _saved_towers(recipe: Any, names: list[str]) -> dict[str, Tower]:
    """The same towers in the recipe that the weights were trained by, where that is known.

    A tower stands in the recipe where its module stands in the objective.
    """
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
