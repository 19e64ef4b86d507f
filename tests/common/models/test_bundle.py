"""Images and captions for a model, prepared by its bundle, against open_clip's own."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle, Source
from frugal.common.models.named import clip_encoder

CAPTIONS = ["a dog", "", "two cats on a mat, " * 30, "naïve café <end_of_text> more"]


def bundle_of(crop: CenterCrop | None = None) -> ModelBundle:
    config = clip_encoder("S/16", image_size=64, text_length=20)
    return ModelBundle(
        model=config.build().eval(),
        config=config,
        image=config.image,
        text=config.text,
        tokenizer_source=ClipBpe(),
        transform=crop or CenterCrop(),
        source=Source(path=Path("x"), library="frugal", name="x"),
    )


def picture(height: int = 90, width: int = 120) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_captions_are_open_clip_s_ids_and_their_lengths() -> None:
    bundle = bundle_of()
    token_ids, lengths = bundle.tokenize(CAPTIONS[:3])
    expected = open_clip.SimpleTokenizer(context_length=20)(CAPTIONS[:3])
    assert token_ids.equal(expected)
    assert lengths.equal(expected.argmax(1) + 1)
    with torch.inference_mode():
        found = bundle.model.encode_text(token_ids, lengths)
        torch.testing.assert_close(found, bundle.model.encode_text(token_ids))


def test_images_are_the_pixels_of_open_clip_from_bytes_paths_and_pil(tmp_path: Path) -> None:
    bundle, image = bundle_of(), picture()
    file = tmp_path / "a.png"
    image.save(file)
    images = bundle.prepare([file.read_bytes(), file, image])
    assert images.dtype == torch.uint8
    assert images[0].equal(images[1]) and images[0].equal(images[2])
    theirs = open_clip.image_transform(
        64, is_train=False, mean=bundle.image.mean, std=bundle.image.std, interpolation="bicubic"
    )(image)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (bundle.image.mean, bundle.image.std))
    gray = (theirs * std + mean) * 255
    assert (images[0] - gray).abs().max() < 1.5  # one gray level of rounding
    embedded = bundle.model.encode_image(images)
    assert embedded.shape == (3, bundle.model.config.embed_dim)


def test_images_with_fractions_of_a_level_are_normalized() -> None:
    bundle = bundle_of(CenterCrop(interpolation="tf2_bicubic"))
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    images = bundle.prepare([buffer.getvalue()])
    assert images.is_floating_point() and images.abs().max() < 5
    rounded = bundle_of().prepare([buffer.getvalue()])
    a, b = (bundle.model.encode_image(each) for each in (images, rounded))
    assert (a @ b.T).item() > 0.9


def test_a_tower_alone_reads_no_captions() -> None:
    with pytest.raises(InputError, match="reads no captions"):
        replace(bundle_of(), text=None, tokenizer_source=None).tokenize(["a"])
