"""The one way to start a stage from other weights, for every method.

An objective takes everything of the same names unless it says otherwise in its ``init_from``: what
stands on an image tower takes that tower (:func:`init_encoder`), and what has towers from different
places takes each (:func:`init_image`, :func:`init_text`). However it does, four things are compared
and a difference is refused, with the model unchanged, or named in the log: what the two models
compute, their position tables, names and shapes of the weights, and the ids of their tokenizers.

With permission a learned position table is resampled. A fixed one is computed for the new grid, and
may become learned: it starts from the old kind of table on the new grid then, or resampled as MAE's
fine-tuning does it. The grids are those of the two models' configurations, so that they need not be
square. Optimizer and counters begin afresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from frugal.common.checkpoint.store import (
    BEST,
    MODEL_FILE,
    Checkpoint,
    find_checkpoint,
    load_weights,
)
from frugal.common.contracts import Initializer, Objective
from frugal.common.data.tokenizers import TokenizerConfig, load_tokenizer, token_difference
from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.bundle import ModelBundle, TokenizerSource
from frugal.common.models.clip import resample_table
from frugal.common.models.fit import misfit
from frugal.common.models.image_encoder import ImageEncoder, image_encoder
from frugal.common.models.in_words import some
from frugal.common.models.same_function import advice, differences, refuse_other_function
from frugal.common.models.text import TextTower, TextTransformer
from frugal.common.models.vit import ImageTower, ImageTransformer, image_table
from frugal.common.models.weight_names import State
from frugal.common.recipe import ModelConfig, Recipe
from frugal.common.recipe_json import from_json, load_recipe
from frugal.common.weights.files import without_prefix
from frugal.common.weights.image_towers import read_encoder
from frugal.common.weights.libraries import is_run
from frugal.common.weights.load import load_model
from frugal.common.weights.wrapped import WrappedModel

Tower = ImageTower | TextTower


def init_from(
    objective: Objective,
    source: Path | ModelBundle | None,
    *,
    interpolate: bool,
    log: logging.Logger,
) -> None:
    """Give an objective that was just built its first weights.

    Args:
        objective: what the new stage trains.
        source: a run directory or one of its checkpoints, a folder of another library, what else
            the objective can start from, or a model that was loaded already; None where the recipe
            names none.
        interpolate: whether position tables may be brought to another grid or length.
        log: told what was taken from where, and what differs and may.

    Raises:
        InputError: if names or shapes do not fit, the model there computes something else with such
            weights, or the objective needs some and there are none.
    """
    objective.init_from(source, Start(interpolate=interpolate, log=log))


@dataclass(frozen=True)
class Start:
    """How weights are taken: what an objective is given, see the contract ``Initializer``."""

    interpolate: bool
    log: logging.Logger

    def take_all(self, objective: Objective, source: Path | ModelBundle) -> None:
        """Give the whole objective the weights of the same names."""
        if isinstance(source, Path) and source.is_dir() and not is_run(source):
            source = load_model(source)
        if isinstance(source, ModelBundle):
            if isinstance(source.config, WrappedModel):
                raise InputError(
                    f"{source.source.path} holds a model whose towers only {source.source.library} "
                    "has, and a stage trains towers of this library; start from another one"
                )
            if source.text is None and objective.tokenizer is not None:
                raise InputError(
                    f"{source.source.path} holds an image tower alone, but this recipe trains a "
                    "text tower too; start from a model of both"
                )
            weights = _of_bundle(source)
        else:
            weights = _of_run(source, self.log)
            if weights.config is None:
                self.log.warning(
                    "no recipe says how the model of %s computes: only the names and shapes of its "
                    "weights are compared, not heads, activation, epsilon, pooling, pixels and "
                    "tokenizer", source,
                )  # fmt: skip
        _init_whole(objective, weights, self)


# ------------------------------------------------------------------------------------------------
# What there is to start from


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Weights, and what else is known of the model that they are of."""

    what: str
    """Where they are from, for messages, such as ``the encoder of runs/a``."""
    source: Path | str
    state: State
    """By the names of what takes them. Those of a run are mapped from its files, so that a large
    model is in memory once."""
    config: object | None
    """Of the model; None where nothing says how it computes."""
    step: int | None = None
    """Of a run; None where it is not known."""
    notes: tuple[str, ...] = ()
    """What else to tell of them."""
    guessed: tuple[str, ...] = ()
    """Fields of the configuration that the source does not say."""
    align_corners: bool = False
    """How a learned position table is resampled."""
    tokenizer: TokenizerSource | None = None
    run: Path | None = None
    """The run directory, which may keep a tokenizer and a recipe."""

    @property
    def instead(self) -> str:
        """The way that always leads to an equal model; empty where there is none."""
        if self.run is None or not (recipe := self.run / "recipe.json").exists():
            return ""
        return f"give {recipe} in the place of the recipe's name"


def _of_run(source: Path, log: logging.Logger) -> _Weights:
    """The weights of an objective, their moving average where the run kept one."""
    checkpoint = find_checkpoint(source)
    config, tokenizer = _saved_model(checkpoint, log)
    has_average = any(name.startswith("ema/") for name in checkpoint.names())
    return _Weights(
        what=f"the model of {source}",
        source=source,
        state=load_weights(checkpoint),
        config=config,
        step=checkpoint.step,
        notes=("moving average",) if has_average else (),
        tokenizer=tokenizer,
        run=checkpoint.run_dir,
    )


def _of_bundle(bundle: ModelBundle) -> _Weights:
    """The weights of a model by the names of an objective, which holds it as a part."""
    source = bundle.source.path
    return _Weights(
        what=f"the model of {source}",
        source=source,
        state={f"model.{name}": tensor for name, tensor in bundle.model.state_dict().items()},
        config=bundle.config,
        step=bundle.source.step,
        tokenizer=bundle.tokenizer_source,
    )


def _saved_model(
    checkpoint: Checkpoint, log: logging.Logger
) -> tuple[object | None, TokenizerSource | None]:
    """The configuration of the model of a checkpoint and of its tokenizer, as far as known."""
    folder = checkpoint.run_dir
    description = folder / MODEL_FILE
    ways: list[Callable[[], tuple[object, TokenizerSource | None]]] = []
    if (folder / "recipe.json").exists():
        ways.append(lambda: _of_recipe(load_recipe(folder / "recipe.json")))
    if (kept := checkpoint.state.get("recipe")) is not None:
        source = str(checkpoint.folder / "state.json")
        ways.append(lambda: _of_recipe(from_json(kept, source=source)))
    if description.exists():
        ways.append(lambda: _of_description(read_json_object(description), str(description)))
    for way in ways:
        try:
            return way()
        except InputError as error:
            log.warning("%s", error)
    return None, None


def _of_recipe(recipe: Recipe) -> tuple[object, TokenizerSource | None]:
    return recipe.model, recipe.data.caption_tokenizer


def _of_description(about: Mapping[str, Any], source: str) -> tuple[object, TokenizerSource | None]:
    try:
        parts = [from_json(about[name], source=source) for name in ("model", "tokenizer")]
    except KeyError as error:
        raise InputError(f"{source} lacks {error.args[0]!r}") from None
    return parts[0], parts[1]


# ------------------------------------------------------------------------------------------------
# A whole objective


@runtime_checkable
class _Configured(Protocol):
    """A model that knows what it was built from."""

    config: object


def _init_whole(objective: Objective, weights: _Weights, start: Initializer) -> None:
    model = objective.model
    here = model.config if isinstance(model, _Configured) else None
    is_known = weights.config is not None and here is not None
    unlike = differences(weights.config, here, part="model") if is_known else []
    # the recipe of another method's run makes no model of this one
    instead = weights.instead if type(weights.config) is type(here) else ""
    way = advice(unlike, instead) or "start from a run of the same architecture"
    state, wanted = dict(weights.state), objective.state_dict()
    freedom = Freedom(kind="the model")
    auxiliary = list(_fit_auxiliary(objective, state, wanted))
    # first what no interpolation can help
    _refuse_misfit(_without_tables(state), _without_tables(wanted), weights, way)
    notes = _bring_tables(objective, state, weights, freedom, start, way=way)
    _refuse_misfit(state, wanted, weights, way)
    if is_known:
        refuse_other_function(
            weights.config, here, part="model", what=weights.what, log=start.log, instead=instead
        )
        _refuse_other_tokens(weights, objective.tokenizer, start.log)
        _tell_clamped(objective, state, start.log)
    objective.load_state_dict(state)
    step = "" if weights.step is None else f"step {weights.step} of "
    said = ", ".join([f"{len(wanted)} tensors", *weights.notes, *notes, *auxiliary])
    start.log.info("started from %s%s: %s", step, weights.source, said)


def _fit_auxiliary(objective: Objective, state: State, wanted: State) -> Iterator[str]:
    """Leave behind what there is no place for here, keep what is new, and say so."""
    for prefix in objective.auxiliary:
        theirs, ours = ({n for n in names if n.startswith(prefix)} for names in (state, wanted))
        if theirs and not ours:
            yield f"without its {prefix.rstrip('.')}"
        elif ours and not theirs:
            yield f"{prefix.rstrip('.')} new"
        for name in theirs - ours:
            del state[name]
        state |= {name: wanted[name] for name in ours - theirs}


def _refuse_misfit(state: State, wanted: State, weights: _Weights, way: str) -> None:
    if what := misfit(state, wanted):
        raise InputError(
            f"the weights of {weights.source} do not fit this recipe's model: {what}; {way}"
        )


def _without_tables(state: Mapping[str, Tensor]) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("pos_embed")}


def _tell_clamped(objective: Objective, state: State, log: logging.Logger) -> None:
    """A logit scale beyond the bounds of the new stage changes at its first step."""
    for name, (low, high) in objective.bounds().items():
        value = float(state[name].max()) if name in state else low
        if not low <= value <= high + 1e-6:
            log.warning(
                "%s is %.4g there and is kept between %.4g and %.4g here: it changes at the first "
                "step, unless objective.clamp is never", name, value, low, high,
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# A tower


_NEW = ("projection.",)
"""Of a tower: leads into the space that it shares with the other one, which is new."""
_LEFT = ("norm.", "projector.")
"""Of a tower: left behind where there is none here."""


@dataclass(frozen=True, kw_only=True)
class Freedom:
    """What a tower may have otherwise than the one that it takes its weights from."""

    kind: str
    """What the tower is called in messages, such as ``the encoder``."""
    differences: Mapping[str, str] = field(default_factory=dict)
    """Fields of its configuration, and why they may differ. Where ``positions`` is one of them the
    tables themselves are compared."""
    may_be_new: tuple[str, ...] = ()
    """Parts that stay as they are where the source has none, as prefixes of names."""
    needed: Mapping[str, str] = field(default_factory=dict)
    """Parts without which the source is refused, and how the sentence goes on that says so."""
    tables_as_mae: bool = False
    """Resample fixed tables as well as learned ones, and without anti-aliasing."""


ENCODER = Freedom(
    kind="the encoder",
    differences={
        "pooling": "what is on top of the tower is new, or compared by its shape",
        "norm_after_pooling": "what is on top of the tower is new, or compared by its shape",
        "projector_width": "a projector is left behind",
        "projector_outputs": "a projector is left behind",
    },
    needed={
        "norm.": "norm.bias and norm.weight, which this model needs; its features were pooled by a "
        "mean, set --model.image.pooling mean and --model.image.norm-after-pooling to do so too"
    },
    tables_as_mae=True,
)
"""For what stands on an image tower (MILAN, arXiv:2208.06049; MAE, arXiv:2111.06377, appendix
A.2)."""


def init_encoder(
    image: ImageTransformer, source: Path | ModelBundle, start: Initializer
) -> ImageEncoder:
    """Give the image tower below something new the weights of that of another model.

    Args:
        image: has learned positions.
        source: see :mod:`frugal.common.weights.image_towers`, or a model that was loaded already.
        start: how weights are taken.

    Returns:
        What was read, and with it what stood on the tower there.

    Raises:
        InputError: if it holds no tower, or another one than this; this one is unchanged then.
    """
    if isinstance(source, ModelBundle):
        found = image_encoder(source, with_pooled_norm=False)
    else:
        is_best = source.name == BEST and source.is_file()
        found = read_encoder(find_checkpoint(source).folder if is_best else source)
        found = replace(found, source=str(source))
    if missing := [name for name in found.missing() if not name.startswith("norm.")]:
        raise InputError(
            f"the encoder of {found.source} has no {some(missing)}, which this model needs"
        )
    init_image(image, found, ENCODER, start)
    return found


def init_image(
    tower: ImageTransformer, found: ImageEncoder, freedom: Freedom, start: Initializer
) -> None:
    """Give an image tower the weights of one that was read; its projection stays as it is.

    Raises:
        InputError: if that computes something else; nothing is changed then.
    """
    weights = _Weights(
        what=f"{freedom.kind} of {found.source}",
        source=found.source,
        state=found.state,
        config=found.tower,
        guessed=found.guessed,
        align_corners=found.align_corners,
    )
    _init_tower(tower, weights, freedom, start)


def init_text(
    tower: TextTransformer, source: Path, start: Initializer, *, tokenizer: TokenizerSource | None
) -> None:
    """Give a text tower the weights of that of another model; its projection stays as it is.

    Args:
        tower: takes the weights.
        source: a run directory or checkpoint, or a folder of another library.
        start: how weights are taken.
        tokenizer: of the new run, which must make the ids of the old one.

    Raises:
        InputError: if there is no such text tower; nothing is changed then.
    """
    is_foreign = source.is_dir() and not is_run(source)
    whole = _of_bundle(load_model(source)) if is_foreign else _of_run(source, start.log)
    config = whole.config.text_tower() if isinstance(whole.config, ModelConfig) else None
    if not isinstance(config, TextTower):
        raise InputError(
            f"the model of {source} has no text tower that is one of this library; give another one"
        )
    state = without_prefix(whole.state, "model.text.")
    weights = replace(whole, what=f"the text tower of {source}", state=state, config=config)
    _init_tower(tower, weights, Freedom(kind="the text tower"), start, tokenizer=tokenizer)


def _init_tower(
    tower: ImageTransformer | TextTransformer,
    weights: _Weights,
    freedom: Freedom,
    start: Initializer,
    *,
    tokenizer: TokenizerSource | None = None,
) -> None:
    refuse_other_function(
        weights.config,
        tower.config,
        part="model.text" if isinstance(tower, TextTransformer) else "model.image",
        what=weights.what,
        log=start.log,
        guessed=weights.guessed,
        free=freedom.differences,
    )
    _refuse_other_tokens(weights, tokenizer, start.log)
    state, wanted = (
        {name: tensor for name, tensor in named.items() if not name.startswith(_NEW)}
        for named in (weights.state, tower.state_dict())
    )
    way = "choose a tower of the same kind, or copy the file again"
    notes = _bring_tables(tower, state, weights, freedom, start, way=way)
    notes += _fit_parts(state, wanted, weights.what, freedom)
    if what := misfit(state, wanted):
        raise InputError(f"{weights.what} does not fit: {what}; {way}")
    tower.load_state_dict(state, strict=False)
    said = ", ".join([str(weights.source), *notes])
    start.log.info("%s starts from %s: %d tensors", freedom.kind, said, len(state))


def _fit_parts(state: State, wanted: State, what: str, freedom: Freedom) -> list[str]:
    """Leave parts behind that have no place here, and those as they are that may be new.

    Returns:
        What was done, for people to read.
    """

    def names_in(tensors: State, part: str) -> list[str]:
        return [name for name in tensors if name.startswith(part)]

    notes = []
    for part in _LEFT:
        if names_in(state, part) and not names_in(wanted, part):
            for name in names_in(state, part):
                del state[name]
            notes.append(f"without its {part.rstrip('.')}")
    for part in (*freedom.may_be_new, *freedom.needed):
        if names_in(state, part) or not names_in(wanted, part):
            continue
        if part not in freedom.may_be_new:
            raise InputError(f"{what} has no {freedom.needed[part]}")
        for name in names_in(wanted, part):
            del wanted[name]
        notes.append(f"with a new {part.rstrip('.')}")
    return notes


# ------------------------------------------------------------------------------------------------
# Position tables


_TABLE_TOLERANCE = 1e-4


def _bring_tables(
    module: nn.Module,
    state: dict[str, Tensor],
    weights: _Weights,
    freedom: Freedom,
    start: Initializer,
    *,
    way: str,
) -> list[str]:
    """Make stored tables what the towers of a module take; what was done, for people to read.

    Args:
        module: a tower, or holds towers.
        state: by the names of the module; changed.
        weights: they are of.
        freedom: whether tables are resampled as in MAE, or fixed ones compared with stored ones.
        start: whether tables may be brought to another grid at all.
        way: what else to do about a table that fits no grid, for messages.
    """
    notes = []
    for path, part in module.named_modules():
        if not isinstance(part, (ImageTransformer, TextTransformer)):
            continue
        name = f"{path}.pos_embed".removeprefix(".")
        label = name if path else "positions"
        old, new, table = _tower_at(weights.config, path), part.config, state.pop(name, None)
        is_learned = isinstance(new, TextTower) or new.positions == "learned"
        there, here = _extent_there(table, old, new), _extent(new)
        if there != here and not start.interpolate:
            raise InputError(_other_extent(path, weights, there, here))
        fixed = None
        if table is None and isinstance(old, ImageTower) and old.positions != "learned":
            fixed = old
        if fixed is not None and freedom.tables_as_mae:
            table, fixed = image_table(fixed), None
        if fixed is not None and isinstance(new, ImageTower):
            here_too = replace(fixed, image_size=new.image_size, patch_size=new.patch_size)
            table = image_table(here_too)
            if is_learned:
                notes.append(f"{label} from the fixed table")
            elif there != here:
                notes.append(f"{label} computed for {here}")
        elif table is not None and there != here:
            try:
                table = resample_table(
                    name,
                    table,
                    old=old,
                    new=new,
                    antialias=not freedom.tables_as_mae,
                    align_corners=weights.align_corners,
                )
            except InputError as error:
                raise InputError(f"{error}; {way}") from None
            notes.append(f"{label} resampled from {there.removesuffix(' patches')} to {here}")
        if isinstance(new, ImageTower) and not is_learned and "positions" in freedom.differences:
            _refuse_other_table(table, new, weights.what)
        elif table is not None and (is_learned or fixed is None):
            state[name] = table
    return notes


def _tower_at(config: object | None, path: str) -> Tower | None:
    """The tower that stands in a configuration where its module stands in the objective."""
    inside = path.removeprefix("model").removeprefix(".")
    try:
        found = attrgetter(inside)(config) if inside else config
    except AttributeError:
        return None
    return found if isinstance(found, (ImageTower, TextTower)) else None


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


def _other_extent(path: str, weights: _Weights, there: str, here: str) -> str:
    """The sentence for a table that may not be brought to another grid or length."""
    if path:
        return (
            f"{path}.pos_embed of {weights.source} is made for another grid or length ({there}, "
            f"here {here}); add --run.interpolate to bring it to the new one"
        )
    if there.endswith(" tokens"):
        slots, count = there.removesuffix(" tokens"), here.removesuffix(" tokens")
        return (
            f"{weights.what} has {slots} slots, here are {count}; add --run.interpolate to bring "
            "its positions to them"
        )
    return (
        f"the positions of {weights.what} are made for {there}, here are "
        f"{here.removesuffix(' patches')}; add --run.interpolate to bring them to the new grid"
    )


def _refuse_other_table(table: Tensor | None, new: ImageTower, what: str) -> None:
    """Refuse a table, which may be stored as a learned one, that is not the fixed one here."""
    here = image_table(new)
    if table is None or table.shape != here.shape or (table - here).abs().max() > _TABLE_TOLERANCE:
        raise InputError(
            f"the position table of {what} is not {new.positions}; keep it with "
            "--model.image.positions learned"
        )


# ------------------------------------------------------------------------------------------------
# Tokenizers


def _refuse_other_tokens(
    weights: _Weights, here: TokenizerSource | None, log: logging.Logger
) -> None:
    """Refuse weights that were trained with other token ids than the new stage makes.

    Raises:
        InputError: with the flag that names the run's tokenizer.
    """
    there = weights.tokenizer
    kept = None if weights.run is None else weights.run / "tokenizer"
    if kept is not None and not kept.is_dir():
        kept = None
    if there is None or here is None or (there == here and kept is None):
        return
    try:
        trained_with = there.load() if kept is None else load_tokenizer(kept)
    except InputError as error:
        log.warning(
            "the tokenizer of %s is not compared with this recipe's: %s", weights.what, error
        )
        return
    found = token_difference(trained_with, here.load())
    if found is None:
        return
    if found.of_odd_texts:
        log.warning("the tokenizer of %s differs in rare texts: it %s", weights.what, found.words)
        return
    way = _tokenizer_flag(there, here, kept) or weights.instead or "choose the same tokenizer"
    raise InputError(f"the tokenizer that {weights.what} was trained with {found.words}; {way}")


def _tokenizer_flag(there: TokenizerSource, here: TokenizerSource, kept: Path | None) -> str | None:
    """What makes a recipe take the tokenizer that a run keeps; None where no flag does."""
    if type(there) is not type(here) or kept is None or not isinstance(there, TokenizerConfig):
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
