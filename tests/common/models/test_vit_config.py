"""Settings of towers: named sizes, presets and what is refused."""

import re
from dataclasses import replace

import pytest

from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import (
    SIZES,
    clip_encoder,
    clipa_encoder,
    flip_encoder,
    image_tower,
    text_tower,
)
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.recipe_json import from_json, to_json

IMAGE = ImageTower(width=32, depth=1, heads=4, mlp_width=64, patch_size=8, image_size=32)
TEXT = TextTower(width=32, depth=1, heads=4, mlp_width=64, vocabulary=50, length=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 36}, "36 is not a multiple of image.patch_size = 8; use 32 or 40"),
        ({"image_size": (32, 44)}, "is not a multiple of image.patch_size = 8; use 40 or 48"),
        ({"image_size": 4}, "image.image_size 4 is smaller than a patch"),
        ({"image_size": (64, 4)}, "image.image_size (64, 4) is smaller than a patch"),
        ({"patch_size": 0}, "image.patch_size is 0, must be at least 1"),
        ({"heads": 5}, "image.width 32 does not divide among image.heads = 5"),
        ({"heads": 0}, "image.heads is 0, must be at least 1"),
        ({"depth": 0}, "image.depth is 0, must be at least 1"),
        ({"width": 30, "heads": 5, "positions": "sincos"}, "image.width 30 is not a multiple of 4"),
        ({"width": 4, "positions": "sincos_bigvision"}, "image.width of at least 8"),
        ({"class_token": "none"}, "image.pooling=class needs a class token"),
        ({"pooling": "max"}, "image.pooling is 'max'; choose from class, mean, mean_all"),
        ({"activation": "relu"}, "image.activation is 'relu'; choose from gelu, gelu_tanh"),
        ({"positions": "rope"}, "image.positions is 'rope'"),
        ({"class_token": "two"}, "image.class_token is 'two'"),
        ({"drop_path": 1.0}, "image.drop_path is 1.0, must lie in [0, 1)"),
        ({"norm_epsilon": 0.0}, "image.norm_epsilon is 0.0, must be positive"),
        ({"std": (0.2, 0.0, 0.2)}, "image.std is (0.2, 0.0, 0.2), must be positive"),
    ],
)  # fmt: skip
def test_an_impossible_image_tower_is_refused(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replace(IMAGE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "text.width 32 does not divide among text.heads = 3"),
        ({"length": 0}, "text.length is 0, must be at least 1"),
        ({"vocabulary": 0}, "text.vocabulary is 0, must be at least 1"),
        ({"pad_id": 50}, "text.pad_id 50 is outside of the vocabulary"),
        ({"pooling": "class"}, "text.pooling is 'class'"),
        ({"packed": True, "causal": False}, "text.packed leaves the padding out"),
        ({"packed": True, "pooling": "last"}, "text.packed leaves the padding out"),
        ({"packed": True, "pooling": "mean_all", "pad_mask": True}, "text.packed leaves"),
    ],
)
def test_an_impossible_text_tower_is_refused(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replace(TEXT, **changes)


def test_an_impossible_dual_encoder_is_refused():
    with pytest.raises(InputError, match="embed_dim is 0, must be at least 1"):
        DualEncoderConfig(image=IMAGE, text=TEXT, embed_dim=0)
    with pytest.raises(InputError, match=r"model\.initialization is 'zeros'"):
        DualEncoderConfig(image=IMAGE, text=TEXT, embed_dim=4, initialization="zeros")


@pytest.mark.parametrize("name", ["Q/16", "B", "B/x", "B/", ""])
def test_an_unknown_size_is_refused(name):
    with pytest.raises(InputError, match=r"choose from Ti, S, B|give a size and the side"):
        image_tower(name)


def test_an_unknown_text_size_is_refused():
    with pytest.raises(InputError, match="there is no tower of size 'XL'; choose from Ti, S"):
        text_tower("XL")


@pytest.mark.parametrize("preset", [clip_encoder, flip_encoder, clipa_encoder])
@pytest.mark.parametrize("size", SIZES)
def test_every_preset_exists_in_every_size_and_survives_json(preset, size):
    config = preset(f"{size}/14", image_size=(28, 56))
    assert config.image.grid == (2, 4)
    assert config.image.num_patches == 8
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("config", "image_options", "text_options"),
    [
        (
            flip_encoder("L/16"),
            {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096, "norm_epsilon": 1e-6,
             "class_token": "without_position", "positions": "sincos", "pooling": "mean_all",
             "activation": "gelu_tanh", "pre_norm": False, "patch_bias": True},
            {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072, "length": 32,
             "vocabulary": 30_523, "causal": False, "pad_mask": False, "pooling": "first"},
        ),
        (
            flip_encoder("H/14"),
            {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 5120, "num_patches": 256},
            {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
        ),
        (
            clipa_encoder("bigG/14"),
            {"width": 1664, "depth": 48, "heads": 16, "mlp_width": 8192, "norm_epsilon": 1e-6,
             "positions": "sincos_bigvision", "pooling": "mean", "norm_after_pooling": True,
             "activation": "gelu_tanh", "pre_norm": False, "patch_bias": False},
            {"width": 1280, "depth": 32, "heads": 20, "vocabulary": 32_000, "pooling": "last",
             "causal": False, "length": 32, "activation": "gelu_tanh"},
        ),
    ],
)  # fmt: skip
def test_presets_have_the_published_numbers(config, image_options, text_options):
    assert {name: getattr(config.image, name) for name in image_options} == image_options
    assert {name: getattr(config.text, name) for name in text_options} == text_options


@pytest.mark.parametrize(
    ("options", "matters"),
    [
        ({}, False),
        ({"causal": False}, True),
        ({"causal": False, "pad_mask": True}, False),
        ({"pooling": "first"}, False),
        ({"pooling": "mean"}, False),
        ({"pooling": "last"}, True),
        ({"pooling": "mean_all", "pad_mask": True}, True),
    ],
)
def test_it_is_known_when_padding_matters(options, matters):
    assert replace(TEXT, **options).padding_matters is matters
