"""The samples of the data set as files in memory.

What sample i of a split shows is a pure function of (seed, split, i): neither the image size nor
the number of processes, shards or samples changes it.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
from PIL import Image

from frugal.common.randomness import sample_generator
from frugal.common.scenes.captions import caption, long_caption
from frugal.common.scenes.distractors import distractor_caption, draw_distractor, sample_distractor
from frugal.common.scenes.drawing import draw, mask
from frugal.common.scenes.settings import Settings
from frugal.common.scenes.world import CLASSES, SEEN, Scene, sample_scene

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 90, "subsampling": 0},
    "png": {"format": "PNG", "compress_level": 3},
    "webp": {"format": "WEBP", "quality": 90, "method": 2},
}


def _is_irrelevant(number: int, fraction: float) -> bool:
    """Spreads the fraction evenly: the first n samples hold round(n * fraction) of them."""
    return math.floor((number + 1) * fraction + 0.5) > math.floor(number * fraction + 0.5)


def _scene(settings: Settings, split: str, number: int) -> tuple[Scene, np.random.Generator]:
    """What sample ``number`` shows, and the generator that goes on to its caption."""
    generator = sample_generator(settings.seed, f"scenes/{split}", number)
    if split == "train" or split.startswith("segmentation"):
        return sample_scene(generator), generator
    if split == "retrieval/test":
        return sample_scene(generator, count=2 + int(generator.random() < 1 / 3)), generator
    classes = CLASSES if split == "zero_shot/test" else SEEN
    pair = classes[number % len(classes)]
    return sample_scene(generator, classes=[pair], count=1), generator


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """An image file; ``kind`` is jpg, png or webp."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **_SAVE_OPTIONS[kind])
    return buffer.getvalue()


def sample_files(settings: Settings, split: str, number: int, key: str) -> dict[str, bytes]:
    """The files of sample ``number`` of a split by extension, as a shard holds them.

    ``key`` is the sample's name in the shard; its json repeats it.
    """
    size = settings.image_size
    about: dict[str, Any] = {"key": key, "status": "success", "width": size, "height": size}
    scene = None
    if split == "train" and _is_irrelevant(number, settings.irrelevant):
        generator = sample_generator(settings.seed, "scenes/irrelevant", number)
        distractor = sample_distractor(generator)
        pixels, text = draw_distractor(distractor, size), distractor_caption(distractor, generator)
        about |= {"caption": text, "relevant": False, "weather": distractor.to_json()}
    else:
        scene, generator = _scene(settings, split, number)
        write_text = long_caption if settings.long_captions and split == "train" else caption
        pixels, text = draw(scene, size), write_text(scene, generator)
        about |= {"caption": text, "relevant": True, "scene": scene.to_json()}
    files = {settings.format: encode(pixels, settings.format), "txt": text.encode()}
    if split.startswith("zero_shot") and scene is not None:
        files["cls"] = str(scene.things[0].label).encode()
    if settings.masks:
        labels = np.zeros((size, size), np.uint8) if scene is None else mask(scene, size)
        files["mask.png"] = encode(labels, "png")
    files["json"] = json.dumps(about).encode()
    return files


def segmentation_files(settings: Settings, split: str, number: int) -> dict[str, bytes]:
    """The picture and the mask of sample ``number``, by ADE20K's names of their folders.

    In the mask, 1 is the background and 2 + class index a thing; 0, which ADE20K ignores, is none.
    """
    scene, _ = _scene(settings, split, number)
    pixels, labels = (paint(scene, settings.image_size) for paint in (draw, mask))
    return {"images": encode(pixels, settings.format), "annotations": encode(labels + 1, "png")}


def retrieval_numbers(settings: Settings) -> list[int]:
    """Which scenes of the retrieval split to use, in order.

    No two of them share a pair of classes. A caption names at least two classes of its picture,
    so it is true of no other picture.
    """
    numbers: list[int] = []
    taken: set[frozenset[int]] = set()
    number = 0
    while len(numbers) < settings.retrieval_samples:
        things = _scene(settings, "retrieval/test", number)[0].things
        pairs = {frozenset((a.label, b.label)) for a in things for b in things if a is not b}
        if not pairs & taken:
            taken |= pairs
            numbers.append(number)
        number += 1
    return numbers
