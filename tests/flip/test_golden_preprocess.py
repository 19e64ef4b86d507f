"""Resized and normalized images against numbers recorded from the reference implementation."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from frugal.common.data.decoding import Window, as_bytes, open_image, resize_window
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.evaluation.embed import Embedder
from frugal.common.models.named import flip_encoder

GOLDEN = Path(__file__).parents[1] / "golden" / "flip"
CASES = json.loads((GOLDEN / "preprocess.json").read_text())
ARRAYS = load_file(GOLDEN / "preprocess.safetensors")
GRAY_LEVELS = 0.05
"""As stated with the recorded numbers; ours are nearer than 1e-4."""
NORMALIZED = 1e-3
PUBLISHED = CenterCrop(order="crop_first", interpolation="tf1_bicubic")

every_case = pytest.mark.parametrize("number", range(len(CASES)))


def size_of(number: int) -> tuple[int, int]:
    return CASES[number]["out"], CASES[number]["out"]


def recorded(number: int, kind: str) -> np.ndarray:
    """(3, H, W)."""
    return ARRAYS[f"c{number}/{kind}"].transpose(2, 0, 1)


def picture(number: int) -> bytes:
    """What the reference decoded, in a format that keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(ARRAYS[f"c{number}/decoded_uint8"]).save(buffer, "PNG")
    return buffer.getvalue()


class Seen(torch.nn.Module):
    """A model whose embedding is the image that reaches it."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return images.flatten(1)


def as_towers_see(levels: np.ndarray) -> np.ndarray:
    """Gray levels (3, H, W) on their way through an evaluation of the published recipes."""
    model = Seen()
    tower = flip_encoder("B/16").image
    embedder = Embedder(model, None, context_length=32, device=torch.device("cpu"), image=tower)
    embedder.images(torch.from_numpy(np.ascontiguousarray(levels))[None])
    return model.images[0].numpy()


@every_case
def test_training_windows_are_resized_as_recorded(number: int) -> None:
    window = Window(*CASES[number]["window_top_left_h_w"])
    levels = resize_window(
        open_image(picture(number)),
        window,
        size_of(number),
        interpolation="tf2_bicubic",
        reduced=True,  # this kernel is not taken to a reduced image
    )
    assert levels.dtype == np.float32
    expected = recorded(number, "train_resized")
    np.testing.assert_allclose(levels, expected, rtol=0, atol=GRAY_LEVELS)
    expected = recorded(number, "train_normalised")
    np.testing.assert_allclose(as_towers_see(levels), expected, rtol=0, atol=NORMALIZED)


@every_case
def test_the_published_evaluation_crop_gives_the_recorded_images(number: int) -> None:
    levels = PUBLISHED.gray_levels(picture(number), size=size_of(number))
    expected = recorded(number, "eval_resized")
    np.testing.assert_allclose(levels, expected, rtol=0, atol=GRAY_LEVELS)
    expected = recorded(number, "eval_normalised")
    np.testing.assert_allclose(as_towers_see(levels), expected, rtol=0, atol=NORMALIZED)


def test_the_recorded_images_leave_the_range_of_bytes() -> None:
    resized = [recorded(number, "eval_resized") for number in range(len(CASES))]
    assert min(levels.min() for levels in resized) < -1
    assert max(levels.max() for levels in resized) > 256


@pytest.mark.parametrize(
    "number", [number for number, case in enumerate(CASES) if not case["accepted"]]
)
def test_training_takes_the_same_images_rounded_to_bytes(number: int) -> None:
    # no rectangle of this ratio fits: the fallback, as was recorded
    crop = RandomResizedCrop(interpolation="tf2_bicubic", flip=0.0, ratio=(1e6, 1e6))
    generator = np.random.default_rng(0)
    pixels = crop.decode(picture(number), size=size_of(number), generator=generator)
    expected = recorded(number, "train_resized").clip(0, 255)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - expected).max() <= 0.5 + GRAY_LEVELS


def test_rounding_to_bytes_clips_what_bytes_cannot_hold() -> None:
    levels = np.array([-3.0, -0.4, 0.6, 254.4, 255.6, 300.0], np.float32)
    assert as_bytes(levels).tolist() == [0, 0, 1, 254, 255, 255]
