"""Pairs that no task asks about: skies with weather reports, for experiments on curation.

Picture and caption belong together, but neither shares a color or a shape with a scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from frugal.common.scenes.world import pick

SKIES = ("clear skies", "broken clouds", "heavy rain", "light snow")
HOURS: dict[str, tuple[int, int]] = {
    "at noon": (205, 240),
    "at dusk": (95, 170),
    "by night": (15, 55),
}
"""Brightness of the sky at its top and at the horizon."""
REGIONS = ("the coast", "the valley", "the northern hills", "the capital", "the islands")
TEMPLATES = (
    "{sky} over {region} {hour}, {degrees} degrees",
    "weather report: {sky} expected {hour} over {region}",
    "{degrees} degrees and {sky} {hour}, says the forecast for {region}",
)


@dataclass(frozen=True)
class Distractor:
    """Everything a sky shows."""

    sky: str
    hour: str
    region: str
    degrees: int
    grain: int
    """Seed of clouds, drops and flakes."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dict(vars(self))


def sample_distractor(generator: np.random.Generator) -> Distractor:
    """A random sky."""
    return Distractor(
        sky=pick(SKIES, generator),
        hour=pick(tuple(HOURS), generator),
        region=pick(REGIONS, generator),
        degrees=int(generator.integers(-10, 35)),
        grain=int(generator.integers(1 << 32)),
    )


def distractor_caption(distractor: Distractor, generator: np.random.Generator) -> str:
    """A short report that fits the picture."""
    return pick(TEMPLATES, generator).format(**vars(distractor))


def draw_distractor(distractor: Distractor, image_size: int) -> np.ndarray:
    """(image_size, image_size, 3) uint8 RGB picture of a sky."""
    generator = np.random.Generator(np.random.Philox(key=distractor.grain))
    top, horizon = HOURS[distractor.hour]
    sky = np.linspace(top, horizon, image_size)[:, None].repeat(image_size, axis=1)
    if distractor.sky != "clear skies":
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5), np.uint8))
        clouds = np.asarray(coarse.resize((image_size, image_size), Image.Resampling.BICUBIC))
        sky = sky + (clouds / 255.0 - 0.5) * 60
    canvas = Image.new("L", (2 * image_size, 2 * image_size))
    pen = ImageDraw.Draw(canvas)
    if distractor.sky in ("heavy rain", "light snow"):
        fall = (0.03, 0.12) if distractor.sky == "heavy rain" else (0.02, 0.0)
        for x, y in generator.random((40, 2)).tolist():
            ends = (x, y, x + fall[0], y + fall[1])
            pen.line(
                [2 * image_size * end for end in ends], fill=255, width=max(1, image_size // 32)
            )
    drops = np.asarray(canvas.reduce(2)) / 255.0
    sky = sky + (-90 if top > 128 else 90) * drops + generator.normal(0, 4, sky.shape)
    bluish = np.stack([sky - 12, sky, sky + 14], axis=-1)  # never the color of a class
    return np.clip(bluish + 0.5, 0, 255).astype(np.uint8)
