"""From a scene to its pixels, and to the mask that says which pixel belongs to which class."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from frugal.common.scenes.world import Scene, Thing

_FINER = 4  # outlines are drawn this much finer, then averaged: antialiasing with 17 levels
_DARKER = 0.5  # the second tone of a texture, of the first
_WAVES = 3.0  # periods of a texture across a thing

Outline = list[tuple[float, float]]


def _arc(radius: float, start: float, stop: float, x: float = 0.0, y: float = 0.0) -> Outline:
    turns = np.linspace(math.radians(start), math.radians(stop), 49).tolist()
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def _heart() -> Outline:
    corners = []
    for t in np.linspace(0, 2 * math.pi, 65).tolist():
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((0.86 * math.sin(t) ** 3, -height / 18 - 0.06))
    return corners


def _star() -> Outline:
    corners = []
    for index in range(10):
        radius, turn = (0.42 if index % 2 else 1.0), math.pi * (index / 5 - 0.5)
        corners.append((radius * math.cos(turn), radius * math.sin(turn)))
    return corners


def _cross() -> Outline:
    a, b = 0.29, 0.93
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]  # fmt: skip


def _moon() -> Outline:
    # the outer circle from horn to horn, and back along a circle that is shifted to the right
    outer = _arc(0.95, 55, 305)
    horn_x, horn_y = outer[0]
    inner = math.hypot(horn_x - 0.42, horn_y)
    turn = math.degrees(math.atan2(horn_y, horn_x - 0.42))
    return outer + _arc(inner, 360 - turn, turn, x=0.42)


@cache
def _outline(shape: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(corners, 2) of a shape in the unit circle and of the hole in it, y downwards."""
    hole = None
    if shape == "circle":
        corners = _arc(0.9, 0, 360)
    elif shape == "square":
        corners = [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)]
    elif shape == "triangle":
        corners = [(0.0, -0.98), (0.84, 0.54), (-0.84, 0.54)]
    elif shape == "star":
        corners = _star()
    elif shape == "cross":
        corners = _cross()
    elif shape == "heart":
        corners = _heart()
    elif shape == "ring":
        corners, hole = _arc(0.95, 0, 360), np.array(_arc(0.5, 0, 360))
    elif shape == "moon":
        corners = _moon()
    else:
        raise ValueError(f"no outline for the shape {shape!r}")
    return np.array(corners), hole


def _planes(rgb: tuple[int, int, int]) -> np.ndarray:
    """(3, 1, 1) float32: a color for pictures that are drawn plane by plane, which is faster."""
    return np.array(rgb, np.float32)[:, None, None]


def _window(thing: Thing, image_size: int) -> tuple[slice, slice]:
    """The rows and columns of the picture that ``thing`` may reach."""
    spans = []
    for center in (thing.y, thing.x):
        low = max(0, math.floor((center - thing.radius) * image_size))
        high = min(image_size, math.ceil((center + thing.radius) * image_size))
        spans.append(slice(low, high))
    return spans[0], spans[1]


def _coverage(thing: Thing, window: tuple[slice, slice], image_size: int) -> np.ndarray:
    """(height, width) float32: the share of each pixel of ``window`` that ``thing`` covers."""
    rows, columns = window
    turn = math.radians(thing.angle)
    cosine, sine = math.cos(turn), math.sin(turn)
    scale = thing.radius * image_size * _FINER
    rotation = np.array([[cosine, sine], [-sine, cosine]]) * scale
    origin = np.array([thing.x * image_size - columns.start, thing.y * image_size - rows.start])
    shift = origin * _FINER
    size = ((columns.stop - columns.start) * _FINER, (rows.stop - rows.start) * _FINER)
    canvas = Image.new("L", size)
    pen = ImageDraw.Draw(canvas)
    corners, hole = _outline(thing.shape)
    pen.polygon((corners @ rotation + shift).ravel().tolist(), fill=255)
    if hole is not None:
        pen.polygon((hole @ rotation + shift).ravel().tolist(), fill=0)
    return np.asarray(canvas.reduce(_FINER), dtype=np.float32) / 255.0


def _tone(thing: Thing, window: tuple[slice, slice], image_size: int) -> np.ndarray | float:
    """(height, width) brightness of the texture: 1 on the color itself, darker on its marks."""
    if thing.texture == "plain":
        return 1.0
    rows, columns = window
    turn = math.radians(thing.angle)
    right = (np.arange(columns.start, columns.stop) + 0.5) / image_size - thing.x
    down = ((np.arange(rows.start, rows.stop) + 0.5) / image_size - thing.y)[:, None]
    wave = math.pi * _WAVES / thing.radius
    across = np.sin(wave * (down * math.cos(turn) - right * math.sin(turn)))
    if thing.texture == "striped":
        height = across
    else:
        other = np.sin(wave * (right * math.cos(turn) + down * math.sin(turn)))
        height = across * other - (0.3 if thing.texture == "dotted" else 0.0)
    # half a pixel either side of the zero crossing: as smooth as the outline
    marks = np.clip(0.5 + height * image_size / wave, 0.0, 1.0)
    return (1.0 - (1.0 - _DARKER) * marks).astype(np.float32)


def _strokes(scene: Scene, generator: np.random.Generator, image_size: int) -> np.ndarray:
    """(image_size, image_size) float32: the share of each pixel that clutter covers."""
    canvas = Image.new("L", (2 * image_size, 2 * image_size))
    pen = ImageDraw.Draw(canvas)
    for x, y, right, down in generator.random((scene.clutter, 4)).tolist():
        ends = (x, y, x + 0.3 * (right - 0.5), y + 0.3 * (down - 0.5))
        width = max(1, image_size // 32)
        pen.line([2 * image_size * end for end in ends], fill=255, width=width)
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255.0


def draw(scene: Scene, image_size: int) -> np.ndarray:
    """The picture of a scene.

    Args:
        scene: what to draw.
        image_size: side in pixels.

    Returns:
        (image_size, image_size, 3) uint8 RGB.
    """
    generator = np.random.Generator(np.random.SFC64(scene.grain))
    ramp = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    light = scene.fade[0] * ramp + scene.fade[1] * ramp[:, None]
    picture = _planes(scene.background_rgb) + light  # (3, image_size, image_size)
    if scene.clutter:
        is_dark = sum(scene.background_rgb) < 330
        picture += (70 if is_dark else -70) * _strokes(scene, generator, image_size)
    for thing in scene.things:
        rows, columns = window = _window(thing, image_size)
        part = picture[:, rows, columns]
        color = _planes(thing.rgb) * _tone(thing, window, image_size)
        part += _coverage(thing, window, image_size) * (color - part)
    noise = np.frombuffer(generator.bytes(picture.size), np.uint8).reshape(picture.shape)
    picture += scene.noise * (noise.astype(np.float32) / 127.5 - 1.0) + 0.5  # rounds below
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def mask(scene: Scene, image_size: int) -> np.ndarray:
    """Which class each pixel belongs to.

    Returns:
        (image_size, image_size) uint8: 0 for the background, 1 + class index on a thing that
        covers at least half of the pixel.
    """
    labels = np.zeros((image_size, image_size), np.uint8)
    for thing in scene.things:
        window = _window(thing, image_size)
        labels[window][_coverage(thing, window, image_size) >= 0.5] = 1 + thing.label
    return labels
