"""Captioned scenes drawn on the spot: the embedded data set.

A small honest world in which colors, shapes, sizes, textures, places and relations combine, and
some combinations are held out of training. ``python -m frugal.common.scenes --out data/scenes``
writes it as webdataset shards; :func:`sample_scene`, :func:`draw` and :func:`caption` are there
for whoever needs one picture.
"""

from frugal.common.scenes.captions import TEMPLATES, caption, long_caption
from frugal.common.scenes.drawing import draw, mask
from frugal.common.scenes.settings import Settings
from frugal.common.scenes.world import (
    CLASSES,
    COLORS,
    HELD_OUT,
    SEEN,
    SHAPES,
    Scene,
    Thing,
    class_index,
    class_names,
    held_out,
    relation,
    sample_scene,
)
from frugal.common.scenes.writing import write

__all__ = [
    "CLASSES",
    "COLORS",
    "HELD_OUT",
    "SEEN",
    "SHAPES",
    "TEMPLATES",
    "Scene",
    "Settings",
    "Thing",
    "caption",
    "class_index",
    "class_names",
    "draw",
    "held_out",
    "long_caption",
    "mask",
    "relation",
    "sample_scene",
    "write",
]
