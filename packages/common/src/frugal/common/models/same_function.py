"""Whether two towers of one shape compute the same: what of a configuration is no weight.

Names and shapes of weights agree between towers of other heads, activations, epsilons, means or
poolings, which make other numbers of them. Whatever takes weights from somewhere compares here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from frugal.common.errors import InputError
from frugal.common.models.in_words import shown

MAY_DIFFER: Mapping[str, str] = {
    "image_size": "positions are brought to another grid with --run.interpolate only",
    "length": "positions are brought to another length with --run.interpolate only",
    "drop_path": "acts in training alone",
    "dropout": "acts in training alone",
    "packed": "changes no number",
    "initialization": "the weights take its place",
    "initial_logit_scale": "the weights take its place",
    "initial_logit_bias": "the weights take its place",
    "layer_scale": "the weights take its place",
    "head_init_std": "the weights take its place",
    "projector_outputs": "there is no projector",
    "pad_id": "padding changes no number here",
    "positions": "a fixed table becomes a learned one",
    "pretrained": "the weights take its place",
    "weights": "the weights take its place",
    "name": "only what is behind it counts",
}
"""What two stages may do differently although weights go from one to the other, and why."""
_PRESENCE = ("layer_scale", "initial_logit_bias")
"""Of these it matters whether there is any."""
_BESIDE_A_CONFIG = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Of a configuration of transformers: what says nothing about what is computed."""
_MISSING = object()


@dataclass(frozen=True)
class Difference:
    """One field of a configuration."""

    field: str
    """From the part that is compared on, such as ``image.heads``."""
    there: Any
    """Where the weights are from."""
    here: Any
    """What takes them."""
    flag: str | None
    """What makes it equal, as the command line takes it; None where no flag does."""
    reason: str | None = None
    """Why it may differ; None where it may not."""


def differences(there: Any, here: Any, *, part: str) -> list[Difference]:
    """How two configurations of the model, or of one tower, differ.

    Args:
        there: of what the weights are from.
        here: of what takes them.
        part: of the recipe, such as ``model.image``; flags begin with it.
    """
    theirs, ours = dict(_flat(there)), dict(_flat(here))
    found = []
    for field in [*ours, *(name for name in theirs if name not in ours)]:
        left, right = theirs.get(field, _MISSING), ours.get(field, _MISSING)
        if left == right:
            continue
        settable = _MISSING not in (left, right) and "/" not in field
        flag = _flag(f"{part}.{field}", left) if settable else None
        reason = _why_allowed(field, theirs, ours)
        found.append(Difference(field.replace("/", "."), left, right, flag, reason))
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field; parts of another library's configuration after a /."""
    for item in dataclasses.fields(value):
        name, held = f"{prefix}{item.name}", getattr(value, item.name)
        if dataclasses.is_dataclass(held):
            yield from _flat(held, f"{name}.")
        elif item.name == "facts":
            yield from _of_another_library(value, prefix)
        elif item.name == "image_size" and not isinstance(held, int) and len(set(held)) == 1:
            yield name, held[0]
        else:
            yield name, held
    if prefix:
        yield f"{prefix.removesuffix('.')}/kind", type(value).__name__


def _of_another_library(tower: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """What a tower of timm or transformers is made of, and how it takes pixels."""
    if hasattr(tower, "about"):
        for name, held in tower.about.items():
            yield f"{prefix}about/{name}", _frozen(held)
        return
    config = json.loads(tower.facts)["config"]
    for name, held in config.items():
        if name not in _BESIDE_A_CONFIG:
            yield f"{prefix}config/{name}", _frozen(held)
    for name in ("mean", "std"):
        if hasattr(tower, name):
            yield f"{prefix}pixels/{name}", _frozen(getattr(tower, name))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _why_allowed(field: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    front, _, name = field.rpartition(".")
    reason = MAY_DIFFER.get(name)
    if reason is None or _MISSING in (theirs.get(field, _MISSING), ours.get(field, _MISSING)):
        return None

    def both(other: str) -> tuple[Any, Any]:
        whole = f"{front}.{other}" if front else other
        return theirs.get(whole), ours.get(whole)

    if name in _PRESENCE and (theirs[field] is None) != (ours[field] is None):
        return None
    if name == "positions" and ours[field] != "learned":
        return None
    if name == "projector_outputs" and any(both("projector_width")):
        return None
    if name == "pad_id" and _pads_count(both):
        return None
    return reason


def _pads_count(both: Callable[[str], tuple[Any, Any]]) -> bool:
    """Whether padding changes what one of two text towers computes."""
    is_pooled = any(pooling in ("last", "mean_all") for pooling in both("pooling"))
    hidden = zip(both("causal"), both("pad_mask"), strict=True)
    return is_pooled or not all(causal or masked for causal, masked in hidden)


def _flag(path: str, value: Any) -> str:
    """A field with a value as the command line takes it."""
    front, _, name = path.rpartition(".")
    front, name = front.replace("_", "-"), name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{front}.{'' if value else 'no-'}{name}"
    words = [repr(v) if isinstance(v, float) else str(v) for v in _words(value)]
    return f"--{front}.{name} {' '.join(words)}"


def _words(value: Any) -> Iterable[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def refuse_other_function(
    there: Any,
    here: Any,
    *,
    part: str,
    what: str,
    log: logging.Logger,
    guessed: Iterable[str] = (),
    free: Mapping[str, str] | None = None,
    instead: str = "",
) -> None:
    """Refuse weights of a model that computes otherwise, and tell what may differ.

    Args:
        there: configuration of what the weights are from.
        here: of what takes them.
        part: of the recipe, such as ``model.image``.
        what: where they are from, for messages, such as ``the encoder of runs/a``.
        log: told what differs and may.
        guessed: fields that the source does not say; a difference is a warning.
        free: further fields that may differ here, and why.
        instead: another way than flags, for messages.

    Raises:
        InputError: with the flags that make both equal.
    """
    allowed, refused = [], []
    found = differences(there, here, part=part)
    for difference in found:
        reason = (free or {}).get(difference.field) or difference.reason
        if reason is not None:
            allowed.append(f"{difference.field} {_named(difference.there)} there, "
                           f"{_named(difference.here)} here ({reason})")  # fmt: skip
        elif difference.field in tuple(guessed):
            log.warning(
                "%s seems to have been trained with %s %s, here it is %s",
                what, difference.field, _named(difference.there), _named(difference.here),
            )  # fmt: skip
        else:
            refused.append(difference)
    if refused:
        raise InputError(_sentence(refused, found, part, what, instead))
    if allowed:
        log.info("%s differs in what may differ: %s", what, "; ".join(allowed))


def advice(found: Iterable[Difference], instead: str = "") -> str:
    """What to do about fields that differ, as the end of a sentence; empty where nothing does."""
    listed = list(found)
    refused = [difference for difference in listed if difference.reason is None]
    flags = [difference.flag for difference in refused if difference.flag is not None]
    ways = []
    if flags and len(flags) == len(refused):
        flags += [item.flag for item in listed if item.flag and _goes_along(item)]
        ways = [f"give {' '.join(flags)}"]
    return ", or ".join([*ways, *([instead] if instead and refused else [])])


def _goes_along(item: Difference) -> bool:
    """Whether a field may differ by itself, but not where others are as there."""
    return item.field.rpartition(".")[2] == "packed" and not item.there


def _sentence(
    refused: list[Difference], found: list[Difference], part: str, what: str, instead: str
) -> str:
    theirs = " and ".join(f"{item.field} {_named(item.there)}" for item in refused)
    ours = " and ".join(f"{part}.{item.field} is {_named(item.here)}" for item in refused)
    along = [item for item in found if item not in refused]
    way = advice([*refused, *along], instead) or "choose weights of the same kind of model"
    return f"{what} has {theirs}, but {ours}; {way}"


def _named(value: Any) -> str:
    return "nothing" if value is _MISSING else shown(value)
