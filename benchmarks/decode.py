"""Images/s of decoding and augmenting photos on one core, against open_clip's training transform.

    python benchmarks/decode.py 'photos/{00000..00003}.tar'

Photos are enlarged once to LAION's shorter side (480 pixels) and kept as JPEG; then both libraries
decode, crop at random (40 to 100 % of the area, as CLIPA does) and resize them in turns, in the
same run. Ours leaves uint8, because normalization happens on the device; open_clip's normalizes.
We decode JPEG by simplejpeg where that is installed (`pip install 'frugal-common[jpeg]'`), else by
Pillow, to the same pixels.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write
from PIL import Image

from frugal.common.data.jpeg import jpeg_decoder
from frugal.common.data.patterns import find_files
from frugal.common.data.transforms import RandomResizedCrop

SCALE = (0.4, 1.0)
LIMITS = {(480, 64): 2.5, (480, 112): 2.0}
"""Least ratio to open_clip by shorter side of the photos and size of the result."""


def main() -> None:
    """Measure every size, and say which limit is missed."""
    options = read_options()
    torch.set_num_threads(1)
    print(f"JPEG by {jpeg_decoder()}")
    photos = read_photos(options.shards, options.images)
    rows = []
    for shorter in (480, 256):
        encoded = [resized(photo, shorter) for photo in photos]
        for size in (64, 112, 224):
            rows.append(compare(encoded, shorter, size, options.repeats))
            row = rows[-1]
            print(
                f"{shorter:4} -> {size:3} px: {row['frugal']:7.0f} images/s, open_clip "
                f"{row['open_clip']:7.0f}, ratio {row['ratio']:.2f}"
                + (f" (at least {row['limit']})" if row["limit"] else "")
            )
    about = {"images": len(photos), "cores": 1, "jpeg": jpeg_decoder()}
    write(options.out, {**about, "sizes": rows})
    missed = [row for row in rows if row["limit"] and row["ratio"] < row["limit"]]
    if missed:
        raise SystemExit(f"{len(missed)} of the limits are missed")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shards", help="tars with photos: a path, a brace pattern or a folder")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/decode.json"))
    return parser.parse_args()


def read_photos(pattern: str, count: int) -> list[Image.Image]:
    """The first ``count`` photos of some tars."""
    photos: list[Image.Image] = []
    for path in find_files(pattern):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.lower().endswith((".jpg", ".jpeg")) and len(photos) < count:
                    content = archive.extractfile(member)
                    assert content is not None
                    photos.append(Image.open(io.BytesIO(content.read())).convert("RGB"))
    return photos


def resized(photo: Image.Image, shorter: int) -> bytes:
    """JPEG as a data set holds it, with this shorter side."""
    scale = shorter / min(photo.size)
    size = (round(photo.width * scale), round(photo.height * scale))
    buffer = io.BytesIO()
    photo.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def compare(encoded: list[bytes], shorter: int, size: int, repeats: int) -> dict[str, Any]:
    """Images/s of both, the fastest of passes that take turns."""
    passes = {"frugal": frugal_pass(encoded, size), "open_clip": open_clip_pass(encoded, size)}
    seconds = {name: float("inf") for name in passes}
    for _ in range(repeats):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    rates = {name: len(encoded) / value for name, value in seconds.items()}
    return {
        "shorter_side": shorter, "size": size, **rates,
        "ratio": rates["frugal"] / rates["open_clip"], "limit": LIMITS.get((shorter, size)),
    }  # fmt: skip


def frugal_pass(encoded: list[bytes], size: int) -> Callable[[], None]:
    """Every photo once through our crop."""
    crop = RandomResizedCrop(scale=SCALE, flip=0.0, fallback="clamp")
    generator = np.random.default_rng(0)

    def run() -> None:
        for photo in encoded:
            crop.decode(photo, size=(size, size), generator=generator)

    return run


def open_clip_pass(encoded: list[bytes], size: int) -> Callable[[], None]:
    """Every photo once through open_clip's transform for training."""
    from open_clip.transform import AugmentationCfg, image_transform

    transform = image_transform(size, is_train=True, aug_cfg=AugmentationCfg(scale=SCALE))

    def run() -> None:
        for photo in encoded:
            transform(Image.open(io.BytesIO(photo)))

    return run


if __name__ == "__main__":
    main()
