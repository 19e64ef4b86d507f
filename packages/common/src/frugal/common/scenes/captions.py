"""What a person might write under a scene; every sentence is true of it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import numpy as np

from frugal.common.scenes.world import Scene, Thing, pick, place, relation

TEMPLATES = ("a {c}", "a picture of a {c}", "there is a {c}")
"""Zero-shot prompts; they open one kind of training caption each."""

_NUMBERS = {1: "one thing", 2: "two things", 3: "three things"}


def phrase(thing: Thing, mention: Collection[str] = ()) -> str:
    """Such as "a small striped red circle"; ``mention`` holds "size", "texture", both or none."""
    words = ["a", *(getattr(thing, name) for name in ("size", "texture") if name in mention)]
    return " ".join([*words, thing.color, thing.shape])


def where(thing: Thing) -> str | None:
    """Such as "in the top left corner", or None where nobody could say."""
    found = place(thing)
    if found is None:
        return None
    row, column = found
    if row == "middle":
        return "in the middle" if column == "middle" else f"on the {column}"
    return f"at the {row}" if column == "middle" else f"in the {row} {column} corner"


def _some(generator: np.random.Generator, *, most: int) -> list[str]:
    """Which of size and texture to mention: each in three of ten cases, ``most`` of them."""
    mention = [name for name in ("size", "texture") if generator.random() < 0.3]
    if len(mention) > most:
        mention = [pick(mention, generator)]
    return mention


def caption(scene: Scene, generator: np.random.Generator) -> str:
    """A short sentence: every color and shape, the rest sometimes.

    At most 20 words; every thing is named once, color directly before shape.
    """
    things = scene.things
    most = 1 if len(things) == 3 else 2
    names = [phrase(thing, _some(generator, most=most)) for thing in things]
    if len(things) == 1:
        text = pick(TEMPLATES, generator).format(c=names[0].removeprefix("a "))
        position = where(things[0])
        if position and generator.random() < 0.3:
            text += f" {position}"
    else:
        order = [int(index) for index in generator.permutation(len(things))]
        first, second, *rest = (names[index] for index in order)
        between = relation(things[order[0]], things[order[1]])
        if between and generator.random() < 0.7:
            text = ", and ".join([f"{first} {between} {second}", *rest])
        else:
            text = ", ".join([first, *([second] if rest else [])])
            text += f" and {rest[0] if rest else second}"
    if generator.random() < 0.25:
        text += f" on a {scene.background} background"
    return text


def long_caption(scene: Scene, generator: np.random.Generator) -> str:
    """Several sentences (20 to 90 words) that tell everything, the order of the things drawn."""
    order = [int(index) for index in generator.permutation(len(scene.things))]
    things = [scene.things[index] for index in order]
    sentences = [f"the picture shows {_NUMBERS[len(things)]} on a {scene.background} background"]
    subjects = ["it"] if len(things) == 1 else ["the first", "the second", "the third"]
    for subject, thing in zip(subjects, things, strict=False):
        position = where(thing)
        ending = f" and lies {position}" if position else ""
        sentences.append(f"{subject} is {phrase(thing, ('size', 'texture'))}{ending}")
    for thing, other in pairwise(things):
        between = relation(thing, other)
        if between:
            first, second = (phrase(one).removeprefix("a ") for one in (thing, other))
            sentences.append(f"the {first} is {between} the {second}")
    strokes = " with some thin strokes on it" if scene.clutter > 2 else ""  # one may be hidden
    grain = "smooth" if scene.noise < 6 else "grainy"
    sentences.append(f"the background is {grain}{strokes}")
    return ". ".join(sentences) + "."
