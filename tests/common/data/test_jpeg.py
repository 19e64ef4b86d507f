"""JPEG by simplejpeg: what a model sees is what it sees by Pillow, whatever the file."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from frugal.common.data import jpeg
from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import open_picture
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.randomness import sample_generator

CROPS = [
    RandomResizedCrop(scale=(0.3, 1.0)),
    RandomResizedCrop(scale=(0.3, 1.0), reduced_decoding=False),
    RandomResizedCrop(scale=(0.9, 1.0), interpolation="tf2_bicubic"),
    CenterCrop(),
    CenterCrop(order="crop_first", interpolation="bilinear"),
]


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def written(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(encoded: bytes, monkeypatch: pytest.MonkeyPatch, *, by_pillow: bool) -> list:
    """What every crop makes of a file, or why it is damaged."""
    with monkeypatch.context() as patch:
        if by_pillow:
            patch.setattr(jpeg, "_library", lambda: None)
        found = []
        for number, crop in enumerate(CROPS):
            try:
                generator = sample_generator(0, "crop", number)
                found.append(crop.decode(encoded, size=(24, 31), generator=generator).tolist())
            except Damaged as damaged:
                found.append(str(damaged))
        return found


SIZES = [(1, 1), (2, 9), (17, 8), (40, 40), (63, 200), (500, 375), (801, 640)]
WAYS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True, "subsampling": 2},
    "poor": {"quality": 5},
    "with restarts": {"restart_marker_rows": 1},
    "with a thumbnail": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_pillows(way: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, size in enumerate(SIZES):
        encoded = written(picture(seed, *size, mode), **WAYS[way])
        assert isinstance(open_picture(encoded), jpeg.Jpeg)
        mine = seen(encoded, monkeypatch, by_pillow=False)
        assert mine == seen(encoded, monkeypatch, by_pillow=True), size
        assert not any(isinstance(found, str) for found in mine)


def test_real_photos_too(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = []
    for shard in sorted((real_data / "coco_mini" / "val").glob("*.tar")):
        with tarfile.open(shard) as archive:
            members = [member for member in archive if member.name.endswith(".jpg")]
            photos += [archive.extractfile(member).read() for member in members]
    assert len(photos) >= 40
    for encoded in photos[:40]:
        mine = seen(encoded, monkeypatch, by_pillow=False)
        assert mine == seen(encoded, monkeypatch, by_pillow=True)


def broken() -> dict[str, bytes]:
    whole = written(picture(3, 90, 70))
    middle = len(whole) // 2
    return {
        "cut in the middle": whole[:middle],
        "without its end": whole[:-2],
        "cut in the header": whole[:60],
        "more behind it": whole + b"rest" * 30,
        "bytes in the middle lost": whole[:middle] + whole[middle + 40 :],
        "bytes in the middle altered": whole[:middle] + b"\xff\xd8\xff\x00" + whole[middle + 4 :],
        "only its start": b"\xff\xd8\xff",
        "no picture": b"\xff\xd8\xff" + bytes(300),
        "CMYK": written(picture(4, 60, 50, "CMYK")),
        "a PNG": written(picture(5, 60, 50), "PNG"),
        "a WebP": written(picture(6, 60, 50), "WEBP"),
        "a TIFF with JPEG inside": written(picture(7, 60, 50), "TIFF", compression="jpeg"),
    }


@pytest.mark.parametrize("name", broken())
def test_pillow_has_the_say_on_what_is_no_whole_jpeg(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = broken()[name]
    assert seen(encoded, monkeypatch, by_pillow=False) == seen(encoded, monkeypatch, by_pillow=True)


def test_bytes_altered_anywhere_count_as_they_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, whole = np.random.default_rng(1), written(picture(8, 60, 44), subsampling=2)
    kinds = set()
    for _ in range(150):
        changed = bytearray(whole)
        for place in draw.integers(2, len(whole), size=int(draw.integers(1, 4))):
            changed[place] = int(draw.integers(256))
        mine = seen(bytes(changed), monkeypatch, by_pillow=False)
        assert mine == seen(bytes(changed), monkeypatch, by_pillow=True)
        kinds.add(isinstance(mine[0], str))
    assert kinds == {True, False}


def test_what_pillow_refuses_as_an_attack_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = written(picture(1, 40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    assert jpeg.open_jpeg(encoded) is None
    with pytest.raises(Damaged, match="pixels"):
        open_picture(encoded)


def test_a_library_that_decodes_otherwise_is_not_used() -> None:
    def brighter(*words, **options):
        return np.minimum(simplejpeg.decode_jpeg(*words, **options), 254) + 1

    def whole(encoded, colors, **_):
        return simplejpeg.decode_jpeg(encoded, colors)

    assert jpeg._difference(simplejpeg) == ""
    assert "as Pillow does at 1/1 of" in jpeg._difference(SimpleNamespace(decode_jpeg=brighter))
    assert "at 1/2 of" in jpeg._difference(SimpleNamespace(decode_jpeg=whole))


def test_it_is_told_which_library_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jpeg.jpeg_decoder() == "simplejpeg"
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert jpeg.jpeg_decoder() == "Pillow"


UNFIT = {
    "raise OSError('libturbojpeg.so.0: cannot open shared object file')": "libturbojpeg.so.0",
    "raise ValueError('numpy.dtype size changed')": "numpy.dtype size changed",
    "import a_part_that_is_missing": "a_part_that_is_missing",
    "decode_jpeg = lambda encoded, colors, min_height: None": "min_width",
    "": "decode_jpeg",
}


@pytest.mark.parametrize("content", UNFIT)
def test_a_library_that_does_not_work_is_told_and_pillow_decodes(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "simplejpeg.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "simplejpeg")
    assert jpeg._library.__wrapped__() is None
    (line,) = caplog.messages
    assert "not used" in line and UNFIT[content] in line and "Pillow decodes JPEG" in line


def test_a_library_that_is_not_there_is_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str, *_: object) -> None:
        if name == "simplejpeg":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=missing), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "simplejpeg")
    assert jpeg._library.__wrapped__() is None
    assert not caplog.messages
