"""What a scene is: things with attributes in places, and how scenes are drawn at random.

Nothing here knows of pixels or words. Positions and lengths are fractions of the image's side,
x to the right and y downwards, so that a scene is the same at any image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np

Choice = TypeVar("Choice")
RGB = tuple[int, int, int]
Class = tuple[str, str]
"""A color and a shape."""

COLORS: dict[str, RGB] = {
    "red": (220, 35, 35),
    "brown": (145, 85, 40),
    "yellow": (245, 215, 40),
    "green": (40, 160, 60),
    "cyan": (45, 200, 215),
    "blue": (40, 70, 210),
    "purple": (130, 45, 170),
    "pink": (250, 145, 195),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES: dict[str, tuple[float, float]] = {"small": (0.15, 0.19), "big": (0.26, 0.36)}
"""Range of the radius of the circle around a thing."""
BACKGROUNDS: dict[str, RGB] = {
    "white": (236, 236, 236),
    "grey": (128, 128, 128),
    "black": (22, 22, 22),
    "beige": (216, 198, 164),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""The relations, each with the one that holds the other way round."""

CLASSES: tuple[Class, ...] = tuple(product(COLORS, SHAPES))
HELD_OUT: frozenset[Class] = frozenset(
    {
        ("red", "moon"),
        ("brown", "star"),
        ("yellow", "cross"),
        ("green", "heart"),
        ("cyan", "square"),
        ("blue", "ring"),
        ("purple", "triangle"),
        ("pink", "circle"),
    }
)
"""Never in a training picture or caption, only in the test classification set. Each color and
each shape misses exactly one partner, so all of them stay equally frequent in training."""
SEEN: tuple[Class, ...] = tuple(pair for pair in CLASSES if pair not in HELD_OUT)

_MARGIN = 0.02
_ROOM = 0.27  # the largest radius that fits beside or above a small thing
_PLAIN = 0.8  # a thing is plain this often before a texture is drawn at all
_COUNT_WEIGHTS = (0.75, 0.18, 0.07)  # pictures of one, two and three things


def class_names() -> list[str]:
    """The names of all classes, such as "red circle", by class index."""
    return [f"{color} {shape}" for color, shape in CLASSES]


def class_index(color: str, shape: str) -> int:
    """The index of a class in :func:`class_names`."""
    return CLASSES.index((color, shape))


def held_out() -> list[int]:
    """The class indices that never occur in training, ascending."""
    return [index for index, pair in enumerate(CLASSES) if pair in HELD_OUT]


@dataclass(frozen=True)
class Thing:
    """One colored shape."""

    color: str
    shape: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    """Of the circle around it."""
    angle: float
    """Degrees, clockwise."""
    rgb: RGB
    """The shade of its color, 0-255."""

    @property
    def label(self) -> int:
        """Its class index."""
        return class_index(self.color, self.shape)


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows; with an image size it decides every pixel."""

    things: tuple[Thing, ...]
    background: str
    background_rgb: RGB
    fade: tuple[float, float]
    """Change of brightness from the left to the right edge and from top to bottom, of 255."""
    clutter: int
    """Thin neutral strokes behind the things."""
    noise: float
    """Largest deviation of a pixel's channel, of 255; uniform."""
    grain: int
    """Seed of the clutter's places and of the noise."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values that :meth:`from_json` reads back without loss."""
        return {**vars(self), "things": [vars(thing) for thing in self.things]}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Scene:
        """The inverse of :meth:`to_json`, lists for tuples allowed."""
        things = tuple(Thing(**{**thing, "rgb": tuple(thing["rgb"])}) for thing in values["things"])
        pairs = {name: tuple(values[name]) for name in ("background_rgb", "fade")}
        return Scene(**{**values, **pairs, "things": things})


def relation(thing: Thing, other: Thing) -> str | None:
    """Where ``thing`` lies seen from ``other``, if a person would not hesitate.

    Returns:
        A key of :data:`OPPOSITE` where the two are apart along one axis and the offset along it
        is at least 1.5 times the offset along the other axis; else None.
    """
    right, down = thing.x - other.x, thing.y - other.y
    apart = thing.radius + other.radius
    if abs(right) >= max(apart, 1.5 * abs(down)):
        return "left of" if right < 0 else "right of"
    if abs(down) >= max(apart, 1.5 * abs(right)):
        return "above" if down < 0 else "below"
    return None


def place(thing: Thing) -> tuple[str, str] | None:
    """The row and column of the ninth of the picture that ``thing`` lies in.

    Returns:
        (top, middle or bottom; left, middle or right), or None near a border between ninths.
    """
    words = []
    for center, (low, high) in ((thing.y, ("top", "bottom")), (thing.x, ("left", "right"))):
        if center < 0.36:
            words.append(low)
        elif center > 0.64:
            words.append(high)
        elif abs(center - 0.5) < 0.08:
            words.append("middle")
        else:
            return None
    return words[0], words[1]


def pick(options: Sequence[Choice], generator: np.random.Generator) -> Choice:
    """One of ``options``, each as likely (``generator.choice`` costs ten times as much)."""
    return options[int(generator.random() * len(options))]


def between(low: float, high: float, generator: np.random.Generator) -> float:
    """A uniform number with four decimals, which JSON keeps short and exact."""
    return round(low + (high - low) * generator.random(), 4)


def _in_a_row(first: float, second: float, generator: np.random.Generator) -> tuple[float, float]:
    """Centers on one axis of two intervals of these half-lengths, apart and inside [0, 1]."""
    slack = 1.0 - 2 * (first + second) - 3 * _MARGIN
    cuts = sorted((slack * generator.random(), slack * generator.random()))
    return _MARGIN + cuts[0] + first, 2 * _MARGIN + cuts[1] + 2 * first + second


def _arrange(radii: Sequence[float], generator: np.random.Generator) -> list[tuple[float, float]]:
    """Centers of things of these radii: the first two side by side, a third beyond both."""
    if len(radii) == 1:
        low, high = radii[0] + _MARGIN, 1 - radii[0] - _MARGIN
        if radii[0] >= SIZES["big"][0]:
            low, high = 0.44, 0.56  # a close-up
        return [(between(low, high, generator), between(low, high, generator))]
    along = list(_in_a_row(radii[0], radii[1], generator))
    if len(radii) == 2:
        first = between(radii[0] + _MARGIN, 1 - radii[0] - _MARGIN, generator)
        reach = 0.6 * (along[1] - along[0])  # keeps the relation clear
        low = max(radii[1] + _MARGIN, first - reach)
        high = min(1 - radii[1] - _MARGIN, first + reach)
        across = [first, between(low, high, generator)]
    else:
        row, third = _in_a_row(max(radii[:2]), radii[2], generator)
        across = [row, row, third]
        along.append(between(radii[2] + _MARGIN, 1 - radii[2] - _MARGIN, generator))
    flip, swap = generator.random() < 0.5, generator.random() < 0.5
    centers = []
    for a, b in zip(along, across, strict=True):
        x, y = round(1 - a if flip else a, 4), round(1 - b if flip else b, 4)
        centers.append((y, x) if swap else (x, y))
    return centers


def _shade(rgb: RGB, spread: int, generator: np.random.Generator) -> RGB:
    """A color near ``rgb``; each channel at most ``spread`` away."""
    red, green, blue = generator.integers(-spread, spread + 1, 3).tolist()
    return (
        min(255, max(0, rgb[0] + red)),
        min(255, max(0, rgb[1] + green)),
        min(255, max(0, rgb[2] + blue)),
    )


def sample_scene(
    generator: np.random.Generator,
    *,
    classes: Sequence[Class] = SEEN,
    count: int | None = None,
) -> Scene:
    """A random scene of things of different classes that do not touch.

    Args:
        generator: the only source of randomness.
        classes: colors and shapes to choose from, at least ``count`` of them.
        count: things in the scene, 1 to 3; by default mostly one. A lone big thing is a
            close-up near the middle, because a small model learns shapes several times faster
            from close-ups than from things at any place.

    Raises:
        ValueError: if there are fewer classes than things.
    """
    if count is None:
        count = 1 + int(np.searchsorted(np.cumsum(_COUNT_WEIGHTS), generator.random(), "right"))
    if not 1 <= count <= 3 or len(set(classes)) < count:
        raise ValueError(f"cannot make a scene of {count} things of {len(set(classes))} classes")
    chosen: list[Class] = []
    while len(chosen) < count:
        candidate = pick(classes, generator)
        if candidate not in chosen:
            chosen.append(candidate)
    # two big things do not fit side by side; one alone is mostly a close-up
    is_big = generator.random() < (0.85 if count == 1 else 0.5)
    sizes = ["small"] * (count - 1) + ["big" if is_big else "small"]
    radii = [between(*SIZES[size], generator) for size in sizes]
    if count > 1:
        radii = [min(radius, _ROOM) for radius in radii]
    things = [
        Thing(
            color=color,
            shape=shape,
            size=size,
            texture="plain" if generator.random() < _PLAIN else pick(TEXTURES, generator),
            x=x,
            y=y,
            radius=radius,
            angle=between(-12.0, 12.0, generator),
            rgb=_shade(COLORS[color], 12, generator),
        )
        for (color, shape), size, radius, (x, y) in zip(
            chosen, sizes, radii, _arrange(radii, generator), strict=True
        )
    ]
    start = int(generator.random() * count)  # so that the third is not always named last
    background = pick(tuple(BACKGROUNDS), generator)
    return Scene(
        things=tuple(things[start:] + things[:start]),
        background=background,
        background_rgb=_shade(BACKGROUNDS[background], 8, generator),
        fade=(between(-16.0, 16.0, generator), between(-16.0, 16.0, generator)),
        clutter=int(generator.random() * 4),
        noise=between(0.0, 8.0, generator),
        grain=int(generator.integers(1 << 32)),
    )
