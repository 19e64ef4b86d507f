"""Writes samples as tars in img2dataset's layout, each with its index."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from frugal.common.data.decoding import decode_rgb, open_image
from frugal.common.data.samples import RawSample
from frugal.common.data.sources import build_index
from frugal.common.errors import InputError

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MOST_SAMPLES = 10_000
"""Of a shard: the keys have four digits for the place in it."""


@dataclass(frozen=True, kw_only=True)
class NewSample:
    """What a tar is to hold of a sample."""

    image: bytes
    """An encoded picture."""
    extension: str
    about: dict[str, Any]
    """What the JSON member tells beside the key."""
    text: str | None = None
    """For the txt member."""
    label: int | None = None
    key: str | None = None
    """Without dots; by default the number of the shard and the place in it."""

    def members(self, key: str) -> Iterator[tuple[str, bytes]]:
        """Extensions and bytes."""
        yield self.extension, self.image
        if self.text is not None:
            yield "txt", self.text.encode()
        if self.label is not None:
            yield "cls", str(self.label).encode()
        described = json.dumps({"key": key, **self.about}, ensure_ascii=False)
        # a path may hold bytes that are no text
        yield "json", described.encode("utf-8", "backslashreplace")


def as_new_sample(raw: RawSample, *, source: str, **about: Any) -> NewSample:
    """A sample as it is written: the first caption as text, all of them in its JSON.

    Args:
        raw: as it is stored; pictures of other formats than tars usually hold become PNG.
        source: where it comes from.
        about: what else its JSON tells.

    Raises:
        Damaged: if the picture cannot be read.
    """
    image = open_image(raw.image)
    extension = _EXTENSIONS.get(image.format or "")
    described: dict[str, Any] = {"source": source, **about}
    if raw.captions:
        described["caption"] = raw.captions[0]
    if len(raw.captions) > 1:
        described["captions"] = raw.captions
    return NewSample(
        image=raw.image if extension else _as_png(decode_rgb(image)),
        extension=extension or "png",
        about=described,
        text=raw.captions[0] if raw.captions else None,
        label=raw.label,
    )


def _as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def new_folder(out: Path, *, samples_per_shard: int) -> None:
    """Make the folder for some shards.

    Raises:
        InputError: if it holds something already, or shards of this size cannot be written.
    """
    if not 1 <= samples_per_shard <= MOST_SAMPLES:
        raise InputError(f"--samples-per-shard is {samples_per_shard}, must be 1 to 10,000")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and not empty; choose another folder for --out")
    out.mkdir(parents=True, exist_ok=True)


def write_tars(
    out: Path, samples: Iterator[NewSample], *, samples_per_shard: int
) -> tuple[int, int]:
    """Write 00000.tar and on, each renamed when complete and indexed.

    Returns:
        How many samples and how many shards were written.
    """
    total = number = 0
    while written := _write_tar(
        out / f"{number:05d}.tar", itertools.islice(samples, samples_per_shard), number
    ):
        total, number = total + written, number + 1
    return total, number


def _write_tar(path: Path, samples: Iterator[NewSample], number: int) -> int:
    first = next(samples, None)
    if first is None:
        return 0
    aside = path.with_suffix(".tar.unfinished")
    count = 0
    with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in itertools.chain([first], samples):
            key = sample.key or f"{number:05d}{count:04d}"
            for suffix, content in sample.members(key):
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
            count += 1
    aside.replace(path)
    build_index(path)
    return count
