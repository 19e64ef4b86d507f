"""Which samples of a batch belong together: those of equal captions, or of one field."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from frugal.common.data.damage import Damaged
from frugal.common.data.sample_transform import Collator, SampleTransform
from frugal.common.data.samples import Fields, RawSample, group_text
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.recipe import GroupsBy
from support import (
    ALONE,
    DDP,
    largest_difference,
    losses,
    rewrite_shard,
    saved_tensors,
    tfrecord,
    train,
)

FIELDS = Fields(group="json.id")


class Letters:
    """A tokenizer of letters."""

    pad_id = 0

    def encode(self, caption: str) -> list[int]:
        return [ord(letter) for letter in caption]

    def assemble(self, ids: list[int], length: int) -> list[int]:
        return list(ids)[:length]


class Whole:
    """Leaves captions as they are."""

    def encode(self, caption: str, tokenizer: Any, **options: Any) -> list[int]:
        return tokenizer.assemble(tokenizer.encode(caption), options["length"])


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def groups_of(by: GroupsBy | None, *samples: tuple[str, str | None] | None) -> list[int] | None:
    """Of (caption, group) pairs; None is a damaged sample."""
    transform = SampleTransform(
        seed=0, augmentation=RandomResizedCrop(), image_size=(4, 4), tokenizer=Letters(),
        text=Whole(), text_length=4, groups_by=by,  # type: ignore[arg-type]
    )  # fmt: skip
    collator = Collator(transform, np.arange(100, 100 + len(samples)))
    for number, sample in enumerate(samples):
        if sample is None:
            collator.skip(str(number), Damaged("no caption"))
        else:
            caption, group = sample
            collator.add(str(number), RawSample(picture(), [caption], group=group))
    found = collator.fields().get("groups")
    return None if found is None else found.tolist()


def test_equal_captions_and_equal_fields_make_groups() -> None:
    samples = [
        ("a dog on a hill", "1"),
        ("a cat", "1"),
        ("a dog on a hill", "2"),
        None,
        ("a dog", None),
    ]
    assert groups_of(None, *samples) is None
    by_caption = groups_of("caption", *samples)
    assert by_caption is not None
    # whole captions are compared, not the tokens that the tower reads of them
    assert by_caption[0] == by_caption[2] and len(set(by_caption)) == 4
    by_field = groups_of("field", *samples)
    assert by_field is not None
    assert by_field[0] == by_field[1] and len(set(by_field)) == 4
    assert by_field[3:] == [103, 104]  # by themselves
    assert groups_of("caption", ("a dog on a hill", None)) == by_caption[:1]


def test_the_field_is_read_from_tars_and_tfrecords(tmp_path: Path) -> None:
    values = ["seven", 7, "7", True, None, " "]
    expected = ["seven", "7", "7", None, None, None]
    assert [group_text(value) for value in values] == expected
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for number, value in enumerate(values):
            members = {"png": picture(), "json": json.dumps({"caption": "x", "id": value}).encode()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    build_index(path)
    reader = open_source(str(path), FIELDS).shards[0].open(FIELDS)
    assert [reader.read(number).group for number in range(len(values))] == expected
    plain = open_source(str(path), Fields()).shards[0].open(Fields())
    assert plain.read(0).group is None

    records = tmp_path / "00000.tfrecord"
    records.write_bytes(tfrecord({"png": picture(), "caption": b"x", "id": b" seven "}))
    build_index(records)
    assert open_source(str(records), FIELDS).shards[0].open(FIELDS).read(0).group == "seven"


def first_word(name: str, content: bytes) -> bytes | None:
    """Of the captions of a sample, which are all that is kept beside its image."""
    if name.endswith(".txt"):
        return content.split()[0]
    return None if name.endswith(".json") else content


def test_one_process_and_two_train_alike_on_groups_and_go_on(scenes: Path, tmp_path: Path) -> None:
    few = tmp_path / "data"  # captions of one word, so that many are equal
    few.mkdir()
    for shard in (scenes / "train").glob("*.tar"):
        rewrite_shard(shard, few / shard.name, first_word)
    words = (
        f"--data.train={few}", "--schedule.samples=240", "--batch-size=48",
        "--objective.positives=equal_captions",
    )  # fmt: skip
    sigmoid = (*words, "--objective.loss=sigmoid", "--model.initial-logit-bias=-3")
    runs = {name: tmp_path / name for name in ("one", "two", "cached", "plain", "softmax", "same")}
    train(ALONE, runs["one"], *sigmoid)
    train(DDP, runs["two"], *sigmoid)
    train(ALONE, runs["cached"], *sigmoid, "--engine.cache-chunk=10")
    train(ALONE, runs["plain"], *sigmoid, "--objective.positives=partner")
    expected = losses(runs["one"])
    assert losses(runs["two"]) == pytest.approx(expected, rel=1e-4)
    assert losses(runs["cached"]) == pytest.approx(expected, rel=1e-4)
    assert losses(runs["plain"])[1] != pytest.approx(expected[1], rel=1e-2)
    tensors = [saved_tensors(runs[name]) for name in ("one", "two")]
    assert largest_difference(*tensors) < 1e-3
    # equal captions have equal vectors, among which a target may be shared out as one likes
    train(ALONE, runs["softmax"], *words)
    train(ALONE, runs["same"], *words, "--objective.positives=partner")
    assert losses(runs["softmax"]) == pytest.approx(losses(runs["same"]), rel=1e-5)


def test_a_field_that_no_sample_has_is_refused_and_one_that_nobody_asks_for_is_told(
    scenes: Path, tmp_path: Path
) -> None:
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=48")
    asked = (*words, "--objective.positives=group")
    said = train(ALONE, tmp_path / "run", *asked, "--data.fields.group=json.nope", expect=2)
    assert "none of 64 samples, evenly spread, has the data.fields.group json.nope" in said
    said = train(ALONE, tmp_path / "txt", *asked, "--data.fields.group=txt")
    assert "64 of 64 samples, evenly spread, have a txt" in said
    said = train(ALONE, tmp_path / "plain", *words, "--data.fields.group=txt")
    assert "data.fields.group is txt, which this objective does not ask for" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--objective.positives=group",), "name it, such as --data.fields.group json.id"),
        (
            ("--objective.positives=group", "--data.fields.group=json.id"),
            "is a list or folder; leave it out, or convert it",
        ),
    ],
)
def test_groups_that_nobody_tells_are_refused(
    words: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("filepath\ttitle\n1.png\tone\n2.png\ttwo\n")
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(picture())
    said = train(ALONE, tmp_path / "run", f"--data.train={table}", *words, expect=2)
    assert sentence in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()
