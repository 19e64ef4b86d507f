"""A true caption and a false one that differs in one stated respect, in SugarCrepe's seven kinds.

After Hsieh et al., "SugarCrepe" (arXiv:2306.14610): swap, replace or add an object, an attribute
or a relation. The false captions name no held-out class, so that novelty gives nothing away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from frugal.common.scenes.captions import phrase
from frugal.common.scenes.world import (
    COLORS,
    OPPOSITE,
    SEEN,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    pick,
    relation,
    sample_scene,
)

KINDS = (
    "swap_obj",
    "swap_att",
    "replace_obj",
    "replace_att",
    "replace_rel",
    "add_obj",
    "add_att",
)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Contrast:
    """A scene with a caption that is true of it and one that is not."""

    scene: Scene
    caption: str
    negative_caption: str
    changed: str
    """In which respect they differ: order, color, size, texture, shape, relation or thing."""


def _with(thing: Thing, name: str, value: str) -> Thing:
    """``thing`` with one attribute told differently."""
    changed: dict[str, Any] = {name: value}
    return replace(thing, **changed)


def _changed(
    kind: str, a: Thing, b: Thing, generator: np.random.Generator
) -> tuple[str, Thing, Thing]:
    """The respect that changes, and both things as the false caption tells them."""
    if kind == "replace_obj":
        return "shape", replace(a, shape=pick(SHAPES, generator)), b
    name = pick(tuple(ATTRIBUTES), generator)
    if kind == "replace_att":
        return name, _with(a, name, pick(ATTRIBUTES[name], generator)), b
    return name, _with(a, name, getattr(b, name)), _with(b, name, getattr(a, name))


def _are_seen(*things: Thing) -> bool:
    """Whether all are of different classes, none of them held out."""
    pairs = {(thing.color, thing.shape) for thing in things}
    return len(pairs) == len(things) and pairs <= set(SEEN)


def _attempt(kind: str, generator: np.random.Generator) -> Contrast | None:
    """One draw; None where the change would change nothing or name a held-out class."""
    scene = sample_scene(generator, count=2)
    a, b = scene.things
    between = relation(a, b)
    assert between is not None, "two things always lie clearly side by side"
    plain = f"{phrase(a)} {between} {phrase(b)}"
    if kind == "swap_obj":
        return Contrast(scene, plain, f"{phrase(b)} {between} {phrase(a)}", "order")
    if kind == "replace_rel":
        return Contrast(scene, plain, f"{phrase(a)} {OPPOSITE[between]} {phrase(b)}", "relation")
    if kind == "add_obj":
        color, shape = pick(SEEN, generator)
        third = replace(a, color=color, shape=shape)
        negative = f"{plain}, and {phrase(third)}"
        return Contrast(scene, plain, negative, "thing") if _are_seen(a, b, third) else None
    if kind == "add_att":
        name = pick(("size", "texture"), generator)
        wrong = _with(a, name, pick(ATTRIBUTES[name], generator))
        negative = f"{phrase(wrong, (name,))} {between} {phrase(b)}"
        return Contrast(scene, plain, negative, name) if wrong != a else None
    name, wrong_a, wrong_b = _changed(kind, a, b, generator)
    is_order = kind == "swap_att" and a.shape == b.shape  # swapped colors would swap the things
    if wrong_a == a or is_order or not _are_seen(wrong_a, wrong_b):
        return None
    right = f"{phrase(a, (name,))} {between} {phrase(b, (name,))}"
    wrong_text = f"{phrase(wrong_a, (name,))} {between} {phrase(wrong_b, (name,))}"
    return Contrast(scene, right, wrong_text, name)


def sample_contrast(kind: str, generator: np.random.Generator) -> Contrast:
    """A random item of one of :data:`KINDS`."""
    for _ in range(_ATTEMPTS):
        contrast = _attempt(kind, generator)
        if contrast is not None:
            return contrast
    raise RuntimeError(f"no {kind} item in {_ATTEMPTS} attempts")
