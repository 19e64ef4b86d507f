"""A recipe as JSON, and what of it may change where a run goes on.

Every dataclass carries its type, so that a recipe of any installed method package can be read back;
only dataclasses of the ``frugal`` namespace are ever imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from typeguard import TypeCheckError, check_type

from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, reason_of
from frugal.common.old_names import FIELDS, TYPES, VALUES
from frugal.common.recipe import Recipe


def to_json(value: Any) -> Any:
    """A recipe, or any part of one, as JSON-ready values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        encoded = {"type": f"{kind.__module__}.{kind.__qualname__}"}
        for item in dataclasses.fields(value):
            encoded[item.name] = to_json(getattr(value, item.name))
        return encoded
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def _dataclass_named(name: str, *, source: str) -> type:
    module_name, _, class_name = TYPES.get(name, name).rpartition(".")
    if not module_name.startswith("frugal."):
        raise InputError(
            f"{source} names the type {name!r}, which is not one of Frugal's; it was not written "
            "by this software or was altered"
        )
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        raise InputError(
            f"{source} needs {name!r}, which is not installed; install the package it was made "
            "with, in a version that has it"
        ) from None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise InputError(f"{source} names {name!r}, which is not a part of a recipe")
    return kind


def _coerce(value: Any, hint: Any) -> Any:
    """JSON has lists and strings where a recipe has tuples and paths."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hints = [item for item in typing.get_args(hint) if item is not type(None)]
        return _coerce(value, hints[0]) if len(hints) == 1 else value
    if hint is Path:
        return Path(value)
    if isinstance(value, list):
        arguments = typing.get_args(hint)
        repeated = arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else None
        return tuple(_coerce(item, repeated) for item in value)
    return value


def from_json(value: Any, *, source: str = "the recipe") -> Any:
    """The inverse of :func:`to_json`.

    Raises:
        InputError: if a type or a field is unknown here.
    """
    if isinstance(value, list):
        return [from_json(item, source=source) for item in value]
    if not isinstance(value, dict):
        return value
    if "type" not in value:
        return {key: from_json(item, source=source) for key, item in value.items()}
    kind = _dataclass_named(str(value["type"]), source=source)
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, item in value.items():
        if key == "type":
            continue
        name = key if key in hints else FIELDS.get(key, key)
        if name not in hints:
            raise InputError(
                f"{source} has a field {key!r} that {value['type']} does not know; it was written "
                "by another version"
            )
        if isinstance(item, str):
            item = VALUES.get((name, item), item)
        try:
            arguments[name] = _coerce(from_json(item, source=source), hints[name])
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{source} has {key!r} as something else than {value['type']} takes "
                f"({reason_of(error)})"
            ) from None
    try:
        part = kind(**arguments)
    except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
        raise InputError(
            f"{source} describes no {value['type']} that can be ({reason_of(error)}); correct it"
        ) from None
    except TypeError:
        needed = {f.name for f in dataclasses.fields(kind) if _has_no_default(f)}
        lacking = ", ".join(sorted(needed - arguments.keys())) or "a value of the right kind"
        raise InputError(
            f"{source} does not describe a whole {value['type']}: it lacks {lacking}"
        ) from None
    _refuse_other_types(part, hints, source=source)
    return part


def _refuse_other_types(part: Any, hints: Mapping[str, Any], *, source: str) -> None:
    """Refuse a part that a file describes with values of other types than its fields have."""
    for item in dataclasses.fields(part):
        value, hint = getattr(part, item.name), hints[item.name]
        wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else None
        try:
            check_type(value, hint)
            is_other = isinstance(value, bool) and hint in (int, float)
        except TypeCheckError:
            is_other = True
        if is_other:
            raise InputError(
                f"{source} has {value!r} as {item.name} of {type(part).__name__}, which is no "
                f"{wanted or str(hint).replace('typing.', '')}; correct it"
            )


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def load_recipe(path: Path) -> Recipe:
    """The recipe saved in a file.

    Raises:
        InputError: if there is none, or it cannot be read.
    """
    try:
        encoded = parse_json(read_bytes(path))
    except FileNotFoundError:
        raise InputError(
            f"there is no recipe at {path}; give a run directory's recipe.json"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a recipe ({reason_of(error)})") from None
    try:
        recipe = from_json(encoded, source=str(path))
    except InputError as error:  # a part that refuses a value does not know of the file
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise InputError(named) from None
    if not isinstance(recipe, Recipe):
        raise InputError(f"{path} does not hold a recipe")
    return recipe


def recipe_if_whole(path: Path) -> Recipe | None:
    """The recipe saved in a file; None where there is none, or none that can be read."""
    try:
        return load_recipe(path)
    except InputError:
        return None


FORMER_DEFAULTS = "former_defaults"
"""Key in the metadata of a field: what its default was in earlier versions."""


def _with_former_defaults(part: Any, saved: Any) -> Any:
    """``part`` with the former defaults that ``saved`` began with, where it has today's."""
    if type(part) is not type(saved) or not dataclasses.is_dataclass(part):
        return part
    assert not isinstance(part, type)
    changes = {}
    for item in dataclasses.fields(part):
        today, before = getattr(part, item.name), getattr(saved, item.name)
        is_default = today == item.default
        if is_default and before != today and before in item.metadata.get(FORMER_DEFAULTS, ()):
            changes[item.name] = before
        elif (inner := _with_former_defaults(today, before)) is not today:
            changes[item.name] = inner
    return dataclasses.replace(part, **changes) if changes else part


def with_calibrated(recipe: Recipe, saved: Recipe) -> Recipe:
    """``recipe`` with what a run of ``saved`` was calibrated to, where it leaves that open.

    A default that has changed since stays what it was when the run began.
    """
    recipe = _with_former_defaults(recipe, saved)
    image, before = recipe.reduction.image, saved.reduction.image
    if not image.calibrated or type(image) is not type(before):
        return recipe
    found = {n: getattr(before, n) for n in image.calibrated if getattr(image, n) is None}
    image = dataclasses.replace(image, **found)  # type: ignore[type-var]
    return dataclasses.replace(recipe, reduction=dataclasses.replace(recipe.reduction, image=image))


_MAY_CHANGE = (
    "engine.",
    "run.",
    "evaluation",
    "data.workers",
    "data.max_damaged",
    "data.timeout_minutes",
)
"""What a resumed run may do differently: none of it changes the samples or the mathematics."""
_MUST_STAY = (
    "engine.accumulate",
    "engine.ema_decay",
    "engine.virtual_processes",
    "run.seed",
    "run.start_from",
)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        flat = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}{key}."))
        return flat
    return {prefix[:-1]: value}


def difference(saved: Recipe, recipe: Recipe, *, compared: Container[str] = ()) -> list[str]:
    """What keeps ``recipe`` from continuing a run of ``saved``: one line per field.

    Args:
        saved: of the run.
        recipe: to go on with.
        compared: names of fields that may differ, as what they name is compared itself.
    """
    return [
        line
        for name, line in _changes(saved, recipe).items()
        if name not in compared and (name in _MUST_STAY or not name.startswith(_MAY_CHANGE))
    ]


def computed_otherwise(saved: Recipe, recipe: Recipe) -> list[str]:
    """In what a run of ``saved`` goes on otherwise that may change bits: one line per field."""
    return [line for name, line in _changes(saved, recipe).items() if name.startswith("engine.")]


def _changes(saved: Recipe, recipe: Recipe) -> dict[str, str]:
    """Lines about the fields that differ, by their names."""
    old, new = _flatten(to_json(saved)), _flatten(to_json(recipe))
    # which class a part is of first: its fields follow from that
    names = sorted(old.keys() | new.keys(), key=lambda name: (not name.endswith(".type"), name))
    return {
        name: f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    }
