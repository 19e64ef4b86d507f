"""What is a caption and what is a label: the same in every store."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugal.cit.texts import TextChoice
from frugal.common import shards
from frugal.common.data.damage import DamageCounter, Damaged, warning
from frugal.common.data.samples import (
    Fields,
    assemble,
    caption_lines,
    caption_text,
    caption_texts,
    decode_classes,
    decode_label,
)
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.stores.streamed_tar import stream_tar
from frugal.common.data.stores.tar import TarReader
from frugal.common.data.stores.tfrecord import RecordReader, crc32c, mask_checksum

GOOD = "a good caption"
BLANK = {
    "nothing": "", "spaces": " \t ", "line ends": "\r\n\n", "no-break space": "\u00a0",
    "ideographic space": "\u3000", "byte-order mark": "\ufeff", "zero width": "\u200b\u200d",
    "direction": "\u200f\u2067", "NUL": "\0\0", "controls": "\x1b\x7f\x85", "soft hyphen": "\u00ad",
    "variation selector": "\ufe0f", "fillers": "\u3164\u115f", "mixed": " \ufeff\u200b\0\u00a0\n",
}  # fmt: skip
TEXTS = {
    " a cat\n": "a cat",
    "\ufeffa cat": "a cat",
    "\u00a0a\u00a0cat\0": "a\u00a0cat",
    "None": "None",
    "nan": "nan",
    "\u2764\ufe0f": "\u2764\ufe0f",
    "\u0646\u0647\u200c": "\u0646\u0647\u200c",
    "a\0b": "a\0b",
    "7": "7",
}
NO_TEXT = [None, True, False, {}, {"en": "a"}, [], [None], [""], [["a"]], [" ", "\u200b"], [True]]


@pytest.mark.parametrize("blank", BLANK.values(), ids=BLANK.keys())
def test_a_blank_text_is_no_caption(blank):
    assert caption_text(blank) == ""
    assert caption_texts([blank, " x ", blank, 7]) == ["x", "7"]
    assert caption_lines(f"{blank}\na\r\n b \r{blank}") == ["a", "b"]


def test_a_caption_is_stripped_and_a_number_is_text():
    assert {text: caption_text(text) for text in TEXTS} == TEXTS
    assert [caption_text(value) for value in (7, 7.5, 0, -1)] == ["7", "7.5", "0", "-1"]
    assert [caption_text(value) for value in (float("nan"), float("inf"), True, None)] == [""] * 4


def test_only_line_feeds_and_carriage_returns_end_a_caption():
    assert caption_lines("a\u2028b\u0085c\x0bd\x1ce\nf") == ["a\u2028b\u0085c\x0bd\x1ce", "f"]


def test_half_a_character_becomes_what_open_clip_makes_of_it():
    fixes = pytest.importorskip("ftfy.fixes")
    text = json.loads('"a \\ud83d cat"')
    assert caption_text(text) == fixes.fix_surrogates(text) == "a \ufffd cat"


# ------------------------------------------------------------------------------------------------
# stores


class Store:
    """Samples with the fields txt, caption and captions, written and read as one kind of store."""

    def __init__(self, folder: Path, write_tar: Any) -> None:
        self.folder, self._write_tar = folder, write_tar

    def tar(self, sample: dict[str, Any]) -> Any:
        path = self._write_tar(self.folder / "0.tar", self._members(sample))
        build_index(path)
        reader = TarReader(path, Fields())
        assert reader.read(0).captions == reader.captions(0)
        return reader.read(0)

    def stream(self, sample: dict[str, Any]) -> Any:
        path = self._write_tar(self.folder / "1.tar", self._members(sample))
        ((_, members),) = stream_tar(str(path))
        assert isinstance(members, dict)
        return assemble(Fields(), members, members.__getitem__)

    def record(self, sample: dict[str, Any]) -> Any:
        path = write_example(self.folder / "0.tfrecord", sample)
        build_index(path)
        reader = RecordReader(path, Fields())
        assert reader.read(0).captions == reader.captions(0)
        return reader.read(0)

    @staticmethod
    def _members(sample: dict[str, Any]) -> list[tuple[str, bytes]]:
        members = [("0.jpg", b"x")]
        if "txt" in sample:
            members.append(("0.txt", sample["txt"].encode()))
        described = {name: value for name, value in sample.items() if name != "txt"}
        return [*members, ("0.json", json.dumps(described).encode())]


def write_example(path: Path, sample: dict[str, Any]) -> Path:
    """One tf.train.Example in the framing of TFRecord, fields as img2dataset types them."""

    def part(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(content)) + content

    def feature(values: list[Any]) -> bytes:
        if all(isinstance(value, str | bytes) for value in values):
            encoded = [v.encode() if isinstance(v, str) else v for v in values]
            return part(1, b"".join(part(1, value) for value in encoded))
        if all(isinstance(value, int) for value in values):
            return part(3, b"".join(b"\x08" + varint(value % 2**64) for value in values))
        return part(2, b"".join(b"\x0d" + struct.pack("<f", value) for value in values))

    entries = b"".join(
        part(
            1,
            part(1, name.encode())
            + part(2, feature(value if isinstance(value, list) else [value])),
        )
        for name, value in {"jpg": b"x", **sample}.items()
    )
    data = part(1, entries)
    header = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", mask_checksum(crc32c(content))) for content in (header, data)]
    path.write_bytes(header + checks[0] + data + checks[1])
    return path


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


@pytest.fixture
def store(tmp_path, write_tar) -> Store:
    return Store(tmp_path, write_tar)


SAMPLES: list[tuple[dict[str, Any], list[str]]] = [
    ({"captions": ["", "x"], "txt": GOOD}, ["x"]),
    ({"captions": [" ", "x ", "\u200b", "y"]}, ["x", "y"]),
    ({"captions": [""], "txt": GOOD}, [GOOD]),
    ({"captions": [], "txt": GOOD}, [GOOD]),
    ({"captions": "", "txt": GOOD}, [GOOD]),
    ({"captions": "\u00a0", "txt": GOOD}, [GOOD]),
    ({"captions": [7, 8], "txt": GOOD}, ["7", "8"]),
    ({"txt": "", "caption": GOOD}, [GOOD]),
    ({"txt": " \n\t ", "caption": GOOD}, [GOOD]),
    ({"txt": "\ufeff\u200b", "caption": f" {GOOD}\n"}, [GOOD]),
    ({"txt": "\ufeffa cat\n", "caption": GOOD}, ["a cat"]),
    ({"txt": "\0\0"}, []),
    ({"caption": ["a", " b"]}, ["a", "b"]),
    ({"caption": 7}, ["7"]),
    ({"caption": 7.5}, ["7.5"]),
    ({"caption": 0.1}, ["0.1"]),
    ({"caption": ""}, []),
    ({}, []),
]


@pytest.mark.parametrize(("sample", "captions"), SAMPLES)
def test_every_store_finds_the_same_captions(store, sample, captions):
    found = [store.tar(sample), store.stream(sample), store.record(sample)]
    assert [raw.captions for raw in found] == [captions] * 3
    assert not any(raw.repaired for raw in found)


@pytest.mark.parametrize("blank", BLANK.values(), ids=BLANK.keys())
def test_a_blank_field_hides_no_good_one_in_any_store(store, blank):
    for sample in ({"captions": [blank], "txt": GOOD}, {"txt": blank, "caption": GOOD}):
        found = [store.tar(sample), store.stream(sample), store.record(sample)]
        assert [raw.captions for raw in found] == [[GOOD]] * 3
    path = store.folder / "a.tsv"
    if "\n" not in blank and "\r" not in blank:
        path.write_text(f"filepath\ttitle\na.jpg\t{blank.replace(chr(9), ' ')}\n")
        assert open_source(str(path), Fields()).shards[0].open(Fields()).captions(0) == []


@pytest.mark.parametrize("value", NO_TEXT, ids=str)
def test_what_is_no_text_in_json_is_no_caption(store, value):
    assert caption_texts(value) == []
    assert store.tar({"captions": value, "txt": GOOD}).captions == [GOOD]
    assert store.stream({"txt": "", "caption": value}).captions == []


BAD_JSON = [
    b"{", b"", b"\xff", b"[" * 100_000 + b"]" * 100_000, b'{"caption": ',
    b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("broken", BAD_JSON, ids=lambda value: str(value[:12]))
def test_a_bad_json_hides_no_good_text_and_is_told(tmp_path, write_tar, broken, capsys):
    def reader(*members: tuple[str, bytes]) -> TarReader:
        path = write_tar(tmp_path / "0.tar", members)
        build_index(path)
        return TarReader(path, Fields())

    text = ("0.txt", GOOD.encode())
    raw = reader(("0.jpg", b"x"), text, ("0.json", broken)).read(0)
    assert raw.captions == [GOOD]
    assert raw.repaired.startswith("text: its JSON cannot be read: ")
    with pytest.raises(Damaged, match="its JSON cannot be read"):
        reader(("0.jpg", b"x"), ("0.json", broken)).read(0)


def test_check_and_convert_count_samples_whose_json_is_bad(tmp_path, write_tar, pair, capsys):
    members = [m for n in range(3) for m in pair(n) if not m[0].endswith("json")]
    write_tar(tmp_path / "in/0.tar", [*members, ("000000002.json", b"{")])
    assert shards.main(["check", str(tmp_path / "in")]) == 0
    told = capsys.readouterr().out
    assert "repaired: 1 samples, of another field than the first (text: its JSON cannot" in told
    assert shards.main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "wrote 3 samples" in told and "repaired: 1 samples" in told


@pytest.mark.parametrize("options", [{}, {"resampled_samples": 12, "shuffle_shards": 1}])
def test_training_uses_and_tells_samples_whose_json_is_bad(
    tmp_path, write_tar, pair, open_stream, options
):
    members = [m for n in range(12) for m in pair(n) if not m[0].endswith("json")]
    broken = [
        item for n in range(12) for item in (*members[2 * n : 2 * n + 2], (f"{n:09d}.json", b"{"))
    ]
    write_tar(tmp_path / "d/0.tar", broken)
    stream = open_stream(tmp_path / "d/0.tar", batch_size=12, **options)
    batch = next(iter(stream))
    assert batch.valid.all() and not batch.damage
    counter = DamageCounter(0.0)
    counter.add(batch.damage, len(batch), notes=batch.damage_notes, sources=batch.sources)
    assert (counter.repaired, counter.damaged, counter.lost) == (12, 0, 0)
    (note,) = counter.notes.values()
    told = warning(note, ("d",))
    assert f"{tmp_path}/d/0.tar/00000000" in told and "its JSON cannot be read" in told
    assert counter.state()["repaired"] == 12


def test_a_number_of_thousands_of_digits_hides_no_caption(tmp_path, write_tar):
    content = b'{"caption": "ok", "id": ' + b"9" * 5000 + b', "n": 7}'
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"x"), ("0.json", content)])
    build_index(path)
    assert TarReader(path, Fields()).captions(0) == ["ok"]
    assert TarReader(path, Fields(caption=("json.n",))).captions(0) == ["7"]


def test_a_text_that_is_not_utf_8_hides_no_good_field(store, tmp_path, write_tar):
    bad = "caf\xe9".encode("latin-1")
    path = write_tar(
        tmp_path / "0.tar",
        [("0.jpg", b"x"), ("0.txt", bad), ("0.json", json.dumps({"caption": GOOD}).encode())],
    )
    build_index(path)
    record = store.record({"txt": bad, "caption": GOOD})
    for raw in (TarReader(path, Fields()).read(0), record):
        assert raw.captions == [GOOD] and "not UTF-8 (byte 0xe9 at 3)" in raw.repaired


def test_texts_of_their_own_follow_the_same_rule(tmp_path, write_tar):
    fields = Fields(caption=("json.title", "txt"), separate=True)
    samples = {"1": b'{"title": "\\u200b"}', "2": b'{"title": 7}', "3": b"{"}
    members = [
        (f"{key}.{extension}", content)
        for key, described in samples.items()
        for extension, content in (("jpg", b"x"), ("json", described), ("txt", b" text\n"))
    ]
    path = write_tar(tmp_path / "0.tar", members)
    build_index(path)
    reader = TarReader(path, fields)
    assert [reader.captions(n) for n in range(3)] == [["", "text"], ["7", "text"], ["", "text"]]
    # CiT's pool draws from what the reader gives
    assert TextChoice(seed=0).draw(reader.captions(0), 5) == (1, "text")


# ------------------------------------------------------------------------------------------------
# labels


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (b"0", 0), (b" 12\r\n", 12), (b"\xef\xbb\xbf3", 3), (b"+4", 4), (b"007", 7),
        (str(2**63 - 1).encode(), 2**63 - 1), (b"-1", None), (b"", None), (b" \n", None),
    ],
)  # fmt: skip
def test_a_class_is_a_number_from_0_on_and_minus_1_is_none(store, written, label):
    assert decode_label(written) == label
    assert store.record({"cls": written, "txt": GOOD}).label == label


@pytest.mark.parametrize(
    "written",
    [b"-2", str(2**63).encode(), b"9" * 20, b"9" * 5000, b"1.0", b"1_0", b"x", b"0x1", b"\xff",
     "\u0661".encode(), b"1 2"],
)  # fmt: skip
def test_what_is_no_class_is_damage_and_no_stack_trace(store, written):
    with pytest.raises(Damaged) as damaged:
        decode_label(written)
    assert damaged.value.kind == "label"
    with pytest.raises(Damaged, match="label"):
        store.record({"cls": written, "txt": GOOD})


def test_numbers_of_records_are_classes_by_the_same_rule(store):
    assert [store.record({"cls": n}).label for n in (0, 5, 2**63 - 1)] == [0, 5, 2**63 - 1]
    assert store.record({"cls": -1}).label is None
    for number in (-2, -(2**63), 1.5):
        with pytest.raises(Damaged, match="label"):
            store.record({"cls": number})


def encoded(array: Any, save: Any = np.save) -> bytes:
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


def test_classes_of_an_array_are_zeros_and_ones_and_all_else_is_damage():
    whole = encoded(np.array([0, 1, 1], np.int64))
    assert decode_classes(whole).tolist() == [False, True, True]
    huge = whole.replace(b"(3,)", b"(9999999999999,)")
    for content in (
        encoded(np.array([0, 1]), np.savez), whole[:-1], whole[:20], b"", b"\x80\x04.", huge,
        encoded(np.array([{}, 1], object)), encoded(np.array([0, 2])), encoded(np.eye(2)),
    ):  # fmt: skip
        with pytest.raises(Damaged) as damaged:
            decode_classes(content)
        assert damaged.value.kind == "label"
