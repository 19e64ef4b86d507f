"""YFCC100M's published files to shards."""

import bz2
import io
import json
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import quote_plus

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from frugal.cit.yfcc import clean, shards, texts
from frugal.common.data.samples import Fields
from frugal.common.data.sources import open_source
from frugal.common.errors import InputError


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("A+small+dog%2C+running", "A small dog, running"),
        ("caf%C3%A9+%26+bar", "café & bar"),
        (quote_plus('see <a href="http://x.org/a b">my page</a> now'), "see my page now"),
        (quote_plus("<b>bold</b> and <i>slanted</i>"), "bold and slanted"),
        (quote_plus("at http://x.org/1?a=b, www.y.org today"), "at   today"),
        (quote_plus("(https://x.org) awww httpd"), "( awww "),
        (quote_plus("a < b and <abbr>c</abbr>"), "a < b and <abbr>c</abbr>"),
        ("", ""),
    ],
)
def test_a_field_is_decoded_and_freed_of_markup_and_links(field: str, expected: str) -> None:
    assert clean(field) == expected


def row(number: int, title: str = "", desc: str = "", user: str = "", machine: str = "") -> str:
    columns = [str(number), f"photo{number}", *[""] * 23]
    columns[8:12] = (quote_plus(text) for text in (title, desc, user, machine))
    return "\t".join(columns)


ROWS = [
    row(12345678, "A title", "", "red fox,snow", "outdoor"),
    row(12345679, "", " ", "", ""),
    row(12345680, "", "only <b>this</b>", "", "machine tag"),
    row(123456789, "a long number"),
    row(7, "seven", "seventh", "", ""),
]


def table(folder: Path, rows: list[str] = ROWS) -> Path:
    file = folder / "yfcc100m_dataset.tsv"
    file.write_text("".join(f"{line}\n" for line in rows))
    return file


def read(path: Path) -> dict[int, tuple[str, str, str]]:
    return {r["id"]: (r["title"], r["desc"], r["tag"]) for r in pq.read_table(path).to_pylist()}


def test_all_photos_with_any_text_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "texts.parquet"
    texts(table(tmp_path), out=out)
    assert read(out) == {
        12345678: ("A title", "", "red fox,snow,outdoor"),
        12345680: ("", "only this", "machine tag"),
        123456789: ("a long number", "", ""),
        7: ("seven", "seventh", ""),
    }


def test_of_a_subset_those_without_text_stay_too(tmp_path: Path) -> None:
    out, subset, numbers = (tmp_path / name for name in ("t.parquet", "subset.tsv", "ids.npy"))
    subset.write_text("12345679\tx\ty\n7\tx\ty\n12345680\tx\ty\n99\tx\ty\n")
    np.save(numbers, np.array([7, 12345679, 12345678]))
    texts(table(tmp_path), out=out, available=numbers, subset=subset)
    assert read(out) == {12345679: ("", "", ""), 7: ("seven", "seventh", "")}
    texts(table(tmp_path), out=out, available=numbers)
    assert read(out).keys() == {7, 12345678}


def test_a_packed_table_is_read_and_damaged_rows_are_passed_over(tmp_path: Path) -> None:
    plain = table(tmp_path, ROWS * 60 + ["not a row", "1\ttoo\tshort"])
    packed = tmp_path / "table.bz2"
    packed.write_bytes(bz2.compress(plain.read_bytes()))
    texts(packed, out=tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet").num_rows == 4 * 60


def jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def archives(folder: Path, numbers: dict[str, bytes]) -> Path:
    for key, content in numbers.items():
        path = folder / key[:2] / f"{key[2:5]}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{key[5:]}.jpg", content)
    return folder


def test_photos_with_image_and_text_become_samples_with_their_number_as_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "texts.parquet", tmp_path / "shards"
    subset = tmp_path / "subset.tsv"
    subset.write_text("".join(line.partition("\t")[0] + "\n" for line in ROWS))
    texts(table(tmp_path), out=file, subset=subset)
    images = archives(
        tmp_path / "images",
        {"12345678": jpeg(1), "12345679": jpeg(2), "12345680": b"", "00000007": jpeg(3)},
    )
    shards(file, images=images, out=out)
    assert "empty image 1, no image 1, no text 1" in capsys.readouterr().out
    with tarfile.open(out / "00000.tar") as archive:
        names = archive.getnames()
        about = json.load(archive.extractfile("12345678.json"))  # type: ignore[arg-type]
        assert archive.extractfile("00000007.jpg").read() == jpeg(3)  # type: ignore[union-attr]
    assert names == ["12345678.jpg", "12345678.json", "00000007.jpg", "00000007.json"]
    assert about == {"key": "12345678", "title": "A title", "tag": "red fox,snow,outdoor"}
    fields = Fields(caption=("json.title", "json.desc", "json.tag"), separate=True)
    reader = open_source(str(out), fields).shards[0].open(fields)
    assert reader.captions(0) == ["A title", "", "red fox,snow,outdoor"]
    assert reader.read(1).captions == ["seven", "seventh", ""]


def test_what_is_none_of_these_files_is_refused_in_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    with pytest.raises(InputError, match="numbered rows"):
        texts(table(tmp_path, ["a photo\tof a\tdog"] * 5), out=out)
    assert not out.exists()
    with pytest.raises(InputError, match="cannot be read"):
        texts(tmp_path / "missing.tsv", out=out)
    good = table(tmp_path)
    numbers = tmp_path / "ids.npy"
    np.save(numbers, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"no \.npy file of numbers"):
        texts(good, out=out, available=numbers)
    subset = tmp_path / "subset.tsv"
    subset.write_text("id\tname\n")
    with pytest.raises(InputError, match="first column"):
        texts(good, out=out, subset=subset)
    texts(good, out=out)
    with pytest.raises(InputError, match="no folder"):
        shards(out, images=tmp_path / "nowhere", out=tmp_path / "shards")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="none of the photos"):
        shards(out, images=tmp_path / "images", out=tmp_path / "shards")
    broken = tmp_path / "broken.bz2"
    broken.write_bytes(bz2.compress(good.read_bytes())[:-20])
    with pytest.raises(InputError, match="to its end"):
        texts(broken, out=out)


def test_a_table_of_1850_real_titles_becomes_a_pool(real_data: Path, tmp_path: Path) -> None:
    layout = real_data / "yfcc_layout"
    if not layout.is_dir():
        pytest.skip("no yfcc_layout in the real data")
    keys = json.loads((layout / "line_to_flickr8k_key.json").read_text())
    photos = {}
    for path in sorted((real_data / "flickr8k" / "train").glob("0000[01].tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    photos[member.name[:-4]] = archive.extractfile(member).read()  # type: ignore[union-attr]
    numbers = {f"{int(n):08d}": photos[key] for n, key in keys.items() if key in photos}
    images = archives(tmp_path / "images", dict(list(numbers.items())[:200]))
    file, subset = tmp_path / "texts.parquet", layout / "yfcc_layout_subset.tsv"
    texts(layout / "yfcc_layout_dataset.txt", out=file, subset=subset)
    found = read(file)
    assert len(found) == 1_512
    assert not any(
        part in text for row in found.values() for text in row for part in ("<b>", "http", "%20")
    )
    shards(file, images=images, out=tmp_path / "shards", samples_per_shard=64)
    fields = Fields(caption=("json.title", "json.desc", "json.tag"), separate=True)
    read_shards = open_source(str(tmp_path / "shards"), fields).shards
    samples = [
        (reader.key(index).rpartition("/")[2], reader.captions(index))
        for shard in read_shards
        for reader in [shard.open(fields)]
        for index in range(shard.num_samples)
    ]
    assert len(samples) > 100
    assert all(tuple(captions) == found[int(key)] for key, captions in samples)
