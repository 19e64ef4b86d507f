"""Fields that are texts of their own: one of those that a sample has is drawn every time."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from frugal.common.data.sample_transform import SampleTransform
from frugal.common.data.samples import Fields, RawSample
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.errors import InputError
from support import tfrecord

SEPARATE = Fields(caption=("json.title", "txt", "json.tag"), separate=True)
SAMPLES = [
    {"json": {"title": " one ", "tag": "a,b"}, "txt": "text"},
    {"json": {"title": "two", "tag": ["c", "d"]}},
    {"json": {"title": "  ", "tag": True}, "txt": "\n"},
    {"txt": "alone"},
]
EXPECTED = [["one", "text", "a,b"], ["two", "", "c"], [], ["", "alone", ""]]


def test_a_tar_gives_one_text_per_field_and_none_where_all_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(SAMPLES):
            contents = {"jpg": b"x", **{k: encode(v) for k, v in sample.items()}}
            for extension, content in contents.items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    build_index(path)
    reader = open_source(str(path), SEPARATE).shards[0].open(SEPARATE)
    assert [reader.captions(number) for number in range(4)] == EXPECTED
    assert [reader.read(number).captions for number in range(4)] == EXPECTED
    # without it the first field that a sample has is all
    first = Fields(caption=SEPARATE.caption)
    reader = open_source(str(path), first).shards[0].open(first)
    assert reader.captions(0) == ["one"]
    assert reader.captions(3) == ["alone"]


def encode(value: object) -> bytes:
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def test_a_tfrecord_gives_them_too(tmp_path: Path) -> None:
    path = tmp_path / "00000.tfrecord"
    path.write_bytes(tfrecord({"jpg": b"x", "title": b" one ", "tag": b"a,b"}))
    build_index(path)
    reader = open_source(str(path), SEPARATE).shards[0].open(SEPARATE)
    assert reader.captions(0) == ["one", "", "a,b"]


def test_training_draws_among_the_texts_that_are_there() -> None:
    transform = SampleTransform(
        seed=0, augmentation=RandomResizedCrop(), image_size=(8, 8), tokenizer=None, text=None,
        text_length=0,
    )  # fmt: skip
    raw = RawSample(b"", ["one", "", "a,b"])
    drawn = Counter(transform.caption(raw, number) for number in range(400))
    assert drawn.keys() == {"one", "a,b"}
    assert abs(drawn["one"] - 200) < 40


def test_lines_of_a_text_cannot_be_separate_too() -> None:
    with pytest.raises(InputError, match="choose one of them"):
        Fields(caption_per_line=True, separate=True)


def test_texts_are_drawn_by_their_weights_among_those_that_are_there() -> None:
    fields = Fields(caption=("json.alt", "json.long", "json.tag"), separate=True, weights=(1, 6, 3))
    transform = SampleTransform(
        seed=2,
        augmentation=RandomResizedCrop(),
        image_size=(8, 8),
        tokenizer=None,
        text=None,
        text_length=0,
        caption_weights=fields.weights,
    )

    def drawn(*captions: str) -> Counter[str]:
        raw, draws = RawSample(image=b"", captions=list(captions)), 4_000
        found = Counter(transform.caption(raw, number) for number in range(draws))
        return Counter({text: round(10 * count / draws) for text, count in found.items()})

    assert drawn("a", "b", "c") == {"a": 1, "b": 6, "c": 3}
    assert drawn("a", "", "c").keys() == {"a", "c"} and drawn("a", "", "c")["c"] in (7, 8)
    assert drawn("", "", "c") == {"c": 10}
    assert drawn("of a class folder") == {"of a class folder": 10}
    same = RawSample(image=b"", captions=["a", "b", "c"])
    assert transform.caption(same, 7) == transform.caption(same, 7)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": (1.0, 2.0), "caption": ("txt", "json.a")}, "set data.fields.separate"),
        ({"weights": (1.0,), "caption": ("txt", "json.a"), "separate": True}, "has 1 numbers for"),
        (
            {"weights": (1.0, 0.0), "caption": ("txt", "json.a"), "separate": True},
            "data.fields.weights",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Fields(**options)
