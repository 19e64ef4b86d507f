"""What scenes hold, how they are drawn and what is said about them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from frugal.common.scenes import (
    CLASSES,
    COLORS,
    HELD_OUT,
    SHAPES,
    Scene,
    caption,
    class_index,
    class_names,
    draw,
    held_out,
    long_caption,
    mask,
    relation,
    sample_scene,
)
from frugal.common.scenes.compositional import KINDS, sample_contrast
from frugal.common.scenes.distractors import distractor_caption, draw_distractor, sample_distractor
from frugal.common.scenes.world import OPPOSITE, SIZES, TEXTURES, place

THING = re.compile(
    rf"(?:\b({'|'.join(SIZES)}) )?(?:\b({'|'.join(TEXTURES)}) )?"
    rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b"
)
"""Size, texture (either may be missing), color and shape of a thing as captions name it."""
CLASS_OF = {name: index for index, name in enumerate(class_names())}


def scenes(number: int, seed: int = 0, **options) -> list[Scene]:
    generator = np.random.default_rng(seed)
    return [sample_scene(generator, **options) for _ in range(number)]


def clean(scene: Scene) -> Scene:
    return replace(scene, noise=0.0, clutter=0, fade=(0.0, 0.0))


# ------------------------------------------------------------------------------------ the world


def test_an_eighth_of_at_least_64_classes_is_held_out_one_per_color_and_shape() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == len(COLORS) * len(SHAPES) >= 64
    assert len(HELD_OUT) == len(CLASSES) // 8
    assert {color for color, _ in HELD_OUT} == set(COLORS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    assert {class_names()[index] for index in held_out()} == {" ".join(pair) for pair in HELD_OUT}
    assert [class_index(*name.split()) for name in class_names()] == list(range(len(CLASSES)))


def test_training_scenes_hold_no_held_out_class_and_all_others_equally_often() -> None:
    counts = np.zeros(len(CLASSES))
    for scene in scenes(3000):
        for thing in scene.things:
            counts[thing.label] += 1
    assert counts[held_out()].sum() == 0
    seen = np.delete(counts, held_out())
    # a binomial count of mean m stays within 5 sqrt(m)
    assert np.abs(seen - seen.mean()).max() < 5 * np.sqrt(seen.mean())


def test_most_scenes_hold_one_or_two_things_and_some_three() -> None:
    counts = np.bincount([len(scene.things) for scene in scenes(1000)], minlength=4) / 1000
    assert counts[0] == 0
    assert counts[1] + counts[2] > 0.7
    assert counts[3] > 0.05
    assert len(counts) == 4


def test_things_stay_inside_the_picture_never_touch_and_differ_in_class() -> None:
    for scene in scenes(1000):
        labels = [thing.label for thing in scene.things]
        assert len(set(labels)) == len(labels)
        for index, thing in enumerate(scene.things):
            low, high = SIZES[thing.size]
            assert low <= thing.radius <= high
            assert thing.radius < thing.x < 1 - thing.radius
            assert thing.radius < thing.y < 1 - thing.radius
            for other in scene.things[:index]:
                apart = np.hypot(thing.x - other.x, thing.y - other.y)
                assert apart > thing.radius + other.radius


def test_a_scene_survives_json() -> None:
    import json

    for scene in scenes(50):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_a_lone_thing_is_mostly_a_close_up_near_the_middle() -> None:
    things = [scene.things[0] for scene in scenes(1000, count=1)]
    close_ups = [thing for thing in things if thing.size == "big"]
    assert 700 < len(close_ups) < 900
    assert all(max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.0601 for thing in close_ups)


def test_things_lie_everywhere_in_the_picture() -> None:
    found = {place(scene.things[0]) for scene in scenes(1000, count=1)}
    assert len(found - {None}) == 9


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"count": 4}, {"count": 2, "classes": [CLASSES[0]] * 2}]
)
def test_a_scene_that_cannot_be_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="cannot make a scene"):
        scenes(1, **options)


# ------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("image_size", [16, 33, 64, 112])
def test_pictures_and_masks_have_the_asked_size(image_size: int) -> None:
    for scene in scenes(5):
        assert draw(scene, image_size).shape == (image_size, image_size, 3)
        assert draw(scene, image_size).dtype == mask(scene, image_size).dtype == np.uint8
        assert mask(scene, image_size).shape == (image_size, image_size)


def test_the_mask_says_where_drawing_a_thing_changes_the_picture() -> None:
    for scene in scenes(150, seed=1):
        scene = clean(scene)
        empty = draw(replace(scene, things=()), 64).astype(int)
        changed = np.abs(draw(scene, 64).astype(int) - empty).max(axis=2)
        labels = mask(scene, 64)
        assert set(np.unique(labels)) == {0, *(1 + thing.label for thing in scene.things)}
        near = np.zeros_like(labels, bool)  # tips thinner than a pixel are not in the mask
        for down in range(-2, 3):
            for right in range(-2, 3):
                near |= np.roll(labels > 0, (down, right), (0, 1))
        assert changed[~near].max() == 0
        # the darker tone of a texture may equal a background, but never over most of a thing
        for thing in scene.things:
            assert (changed[labels == 1 + thing.label] > 5).mean() > 0.6


def test_a_thing_lies_where_the_scene_says() -> None:
    for scene in scenes(100, seed=2, classes=[("red", "circle"), ("blue", "square")], count=1):
        thing = scene.things[0]
        rows, columns = np.nonzero(mask(scene, 200))
        assert columns.mean() + 0.5 == pytest.approx(200 * thing.x, abs=0.3)
        assert rows.mean() + 0.5 == pytest.approx(200 * thing.y, abs=0.3)
        assert np.ptp(columns) / 200 < 2 * thing.radius
        assert np.ptp(rows) / 200 > 1.3 * thing.radius


@pytest.mark.parametrize("texture", ["plain", "striped"])
def test_a_positive_angle_turns_shape_and_texture_clockwise(texture: str) -> None:
    scene = clean(scenes(1, classes=[("red", "square")], count=1)[0])
    thing = replace(scene.things[0], x=0.5, y=0.5, radius=0.3, texture=texture)
    upright, turned = (
        draw(replace(scene, things=(replace(thing, angle=angle),)), 200).astype(float)
        for angle in (0.0, 12.0)
    )
    by_pil = Image.fromarray(upright.astype(np.uint8)).rotate(-12, Image.Resampling.BILINEAR)
    inside = (slice(40, 160), slice(40, 160))
    assert np.abs(np.asarray(by_pil, float) - turned)[inside].mean() < 2
    assert np.abs(upright - turned)[inside].mean() > 5


def test_no_thing_reaches_beyond_its_radius() -> None:
    for scene in scenes(300, seed=2, count=1):
        thing = scene.things[0]
        rows, columns = (np.stack(np.nonzero(mask(scene, 128))) + 0.5) / 128
        farthest = np.hypot(columns - thing.x, rows - thing.y).max()
        assert 0.8 * thing.radius < farthest < thing.radius + 0.5 / 128


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_mean_color_of_a_things_pixels_is_the_named_one(image_size: int) -> None:
    names = list(COLORS)
    table = np.array(list(COLORS.values()), float)
    directions = table / np.linalg.norm(table, axis=1, keepdims=True)
    for scene in scenes(300, seed=3):
        pixels, labels = draw(scene, image_size).astype(float), mask(scene, image_size)
        for thing in scene.things:
            mean = pixels[labels == 1 + thing.label].mean(axis=0)
            # a texture darkens, which keeps the direction
            best = (directions @ mean).argmax()
            if thing.texture == "plain":
                best = np.linalg.norm(table - mean, axis=1).argmin()
            assert names[best] == thing.color


def portrait(scene: Scene, image_size: int) -> np.ndarray:
    """(256,) the mask of the only thing, cut out and scaled to 16x16."""
    covered = mask(scene, image_size) > 0
    rows, columns = np.nonzero(covered)
    cut = covered[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    picture = Image.fromarray(cut.astype(np.uint8) * 255)
    return np.asarray(picture.resize((16, 16), Image.Resampling.BOX), float).ravel()


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_nearest_neighbor_tells_every_shape_by_its_mask(image_size: int) -> None:
    known, asked = scenes(400, seed=4, count=1), scenes(200, seed=5, count=1)
    shapes = np.array([scene.things[0].shape for scene in known])
    gallery = np.array([portrait(scene, image_size) for scene in known])
    for scene in asked:
        nearest = np.linalg.norm(gallery - portrait(scene, image_size), axis=1).argmin()
        assert shapes[nearest] == scene.things[0].shape


def test_every_texture_draws_another_picture() -> None:
    (scene,) = scenes(1, count=1)
    thing = replace(scene.things[0], shape="square", size="big", radius=0.24, x=0.5, y=0.5)
    drawn = [
        draw(replace(clean(scene), things=(replace(thing, texture=texture),)), 64).astype(float)
        for texture in TEXTURES
    ]
    for index, picture in enumerate(drawn):
        for other in drawn[:index]:
            assert np.abs(picture - other).max() > 40


def test_a_scene_looks_the_same_at_any_size() -> None:
    differences = []
    for scene in scenes(100, seed=6, count=1):
        scene = replace(scene, noise=0.0, clutter=0)
        large = Image.fromarray(draw(scene, 256)).resize((64, 64), Image.Resampling.BOX)
        differences.append(np.abs(np.asarray(large, float) - draw(scene, 64)).mean())
    assert np.mean(differences) < 0.35  # a shift by half a pixel gives 0.7


def test_noise_stays_within_its_bound_and_clutter_lies_behind_the_things() -> None:
    strokes_seen = 0
    for scene in scenes(50, seed=7):
        quiet = draw(replace(scene, noise=0.0), 64).astype(float)
        assert np.abs(draw(scene, 64) - quiet).max() <= scene.noise + 1
        tidy = draw(replace(scene, noise=0.0, clutter=0), 64).astype(float)
        drawn = np.abs(quiet - tidy).max(axis=2) > 0
        strokes_seen += drawn.any()
        assert not (drawn.any() and scene.clutter == 0)
        assert not drawn[deep_inside(mask(scene, 64))].any()
    assert strokes_seen > 25


def deep_inside(labels: np.ndarray) -> np.ndarray:
    inside = labels > 0
    for axis in (0, 1):
        for step in (-1, 1):
            inside &= np.roll(labels > 0, step, axis)
    return inside


# ------------------------------------------------------------------------------------ relations


def test_relations_are_true_of_the_pixels_and_hold_the_other_way_round() -> None:
    found = set()
    for scene in scenes(400, seed=8):
        labels = mask(scene, 64)
        for thing in scene.things:
            for other in scene.things:
                between = None if thing is other else relation(thing, other)
                if between is None:
                    continue
                found.add(between)
                assert relation(other, thing) == OPPOSITE[between]
                (rows, columns), (other_rows, other_columns) = (
                    np.nonzero(labels == 1 + one.label) for one in (thing, other)
                )
                assert {
                    "left of": columns.max() < other_columns.min(),
                    "right of": columns.min() > other_columns.max(),
                    "above": rows.max() < other_rows.min(),
                    "below": rows.min() > other_rows.max(),
                }[between]
    assert found == set(OPPOSITE)


def test_two_things_always_stand_in_a_clear_relation() -> None:
    assert all(relation(*scene.things) for scene in scenes(1000, seed=9, count=2))


def test_diagonal_things_stand_in_none() -> None:
    a, b = scenes(1, count=2)[0].things
    a, b = replace(a, x=0.2, y=0.2, radius=0.15), replace(b, x=0.75, y=0.7, radius=0.15)
    assert relation(a, b) is None


# ------------------------------------------------------------------------------------- captions


def check_things(text: str, scene: Scene) -> list:
    """Every thing named once and truly; returns them in the order of the caption."""
    named = []
    for size, texture, color, shape in THING.findall(text):
        (thing,) = (one for one in scene.things if (one.color, one.shape) == (color, shape))
        assert size in ("", thing.size)
        assert texture in ("", thing.texture)
        named.append(thing)
    return named


def test_short_captions_name_every_thing_once_and_truly() -> None:
    generator = np.random.default_rng(0)
    relations_told = sizes_told = textures_told = backgrounds_told = places_told = 0
    for scene in scenes(800, seed=10):
        text = caption(scene, generator)
        named = check_things(text, scene)
        assert sorted(thing.label for thing in named) == sorted(
            thing.label for thing in scene.things
        )
        assert len(text.split()) <= 20
        told = re.search(rf"\b({'|'.join(OPPOSITE)})\b", text)
        if told:
            assert relation(named[0], named[1]) == told[1]
            relations_told += 1
        background = re.search(r"on a (\w+) background", text)
        if background:
            assert background[1] == scene.background
            backgrounds_told += 1
        for word in re.findall(r"\b(?:in|on|at) the ([a-z ]+?)(?: corner)?(?: on a|$)", text):
            assert set(word.split()) | {"middle"} == set(place(scene.things[0]) or ()) | {"middle"}
            places_told += 1
        sizes_told += bool(re.search("small|big", text))
        textures_told += bool(re.search("|".join(TEXTURES), text))
    for told_times in (relations_told, sizes_told, textures_told, backgrounds_told, places_told):
        assert 50 < told_times < 750


def test_long_captions_tell_everything() -> None:
    generator = np.random.default_rng(0)
    for scene in scenes(300, seed=11):
        text = long_caption(scene, generator)
        named = check_things(text, scene)
        assert {thing.label for thing in named} == {thing.label for thing in scene.things}
        for thing in scene.things:
            assert f"{thing.size} {thing.texture} {thing.color} {thing.shape}" in text
        assert f"on a {scene.background} background" in text
        for first, between, second in re.findall(
            r"the (\w+ \w+) is (\w+(?: of)?) the (\w+ \w+)", text
        ):
            pair = {thing.label: thing for thing in scene.things}
            assert relation(pair[CLASS_OF[first]], pair[CLASS_OF[second]]) == between
        assert 20 <= len(text.split()) <= 90


def test_captions_fit_into_24_tokens_of_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    tokenizer = open_clip.SimpleTokenizer()
    generator = np.random.default_rng(0)
    texts = {caption(scene, generator) for scene in scenes(500, seed=12)}
    assert max(len(tokenizer.encode(text)) + 2 for text in texts) <= 24


def test_captions_vary() -> None:
    (scene,) = scenes(1, seed=13, count=2)
    generator = np.random.default_rng(0)
    assert len({caption(scene, generator) for _ in range(100)}) > 20


# -------------------------------------------------------------------------------- compositional


def facts(text: str) -> tuple[list[tuple[str, ...]], str]:
    """The things a caption names, in order, and the relation it tells."""
    told = re.search(rf"\b({'|'.join(OPPOSITE)})\b", text)
    assert told
    return THING.findall(text), told[1]


def is_true(text: str, scene: Scene) -> bool:
    named, told = facts(text)
    found = []
    for size, texture, color, shape in named:
        match = [
            thing
            for thing in scene.things
            if (thing.color, thing.shape) == (color, shape)
            and size in ("", thing.size)
            and texture in ("", thing.texture)
        ]
        if not match:
            return False
        found.append(match[0])
    return relation(found[0], found[1]) == told


FIELD = {"size": 0, "texture": 1, "color": 2, "shape": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_are_false_and_differ_in_exactly_the_stated_respect(kind: str) -> None:
    generator = np.random.default_rng(0)
    respects = set()
    for _ in range(150):
        contrast = sample_contrast(kind, generator)
        respects.add(contrast.changed)
        assert is_true(contrast.caption, contrast.scene)
        assert not is_true(contrast.negative_caption, contrast.scene)
        (right, told), (wrong, wrongly_told) = map(
            facts, (contrast.caption, contrast.negative_caption)
        )
        assert not HELD_OUT & {thing[2:] for thing in right + wrong}
        if kind == "swap_obj":
            assert (wrong, wrongly_told) == (right[::-1], told)
        elif kind == "replace_rel":
            assert wrong == right
            assert wrongly_told != told
        elif kind == "add_obj":
            assert (wrong[:-1], wrongly_told) == (right, told)
        else:
            changed = [
                (position, field)
                for position, (a, b) in enumerate(zip(right, wrong, strict=True))
                for field, number in FIELD.items()
                if a[number] != b[number]
            ]
            both = kind == "swap_att"
            assert changed == [(place, contrast.changed) for place in range(1 + both)]
            assert wrongly_told == told
            if both:
                assert sorted(wrong) != sorted(right)  # else the things would be swapped
                number = FIELD[contrast.changed]
                assert [thing[number] for thing in wrong] == [thing[number] for thing in right][
                    ::-1
                ]
            if kind == "add_att":
                assert right[0][:2] == ("", "")
    assert (
        respects
        == {
            "swap_obj": {"order"},
            "swap_att": {"color", "size", "texture"},
            "replace_obj": {"shape"},
            "replace_att": {"color", "size", "texture"},
            "replace_rel": {"relation"},
            "add_obj": {"thing"},
            "add_att": {"size", "texture"},
        }[kind]
    )


# -------------------------------------------------------------------------------------- weather


def test_weather_shares_no_color_or_shape_with_scenes() -> None:
    generator = np.random.default_rng(0)
    words = set(COLORS) | set(SHAPES) | set(SIZES) | set(TEXTURES)
    table = np.array(list(COLORS.values()), float)
    texts = set()
    for _ in range(100):
        weather = sample_distractor(generator)
        text = distractor_caption(weather, generator)
        texts.add(text)
        assert not words & set(re.findall(r"\w+", text))
        assert {weather.sky, weather.hour, weather.region} <= {
            part for part in (weather.sky, weather.hour, weather.region) if part in text
        }
        picture = draw_distractor(weather, 48)
        assert picture.shape == (48, 48, 3)
        distance = np.linalg.norm(picture.reshape(-1, 1, 3) - table, axis=2).min(axis=1)
        assert np.median(distance) > 40
    assert len(texts) > 80
