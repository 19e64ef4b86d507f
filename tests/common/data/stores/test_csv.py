"""Lists of captions as people bring them: every row is read, or counted with its line number."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

import pytest

from frugal.common import shards
from frugal.common.data.damage import Damaged
from frugal.common.data.samples import Fields
from frugal.common.data.sources import open_shard, open_source
from frugal.common.data.stores.folder import FileList
from frugal.common.errors import InputError

COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    (folder / "img").mkdir()
    for number in range(COUNT):
        (folder / f"img/{number}.jpg").write_bytes(make_image)
    return folder


@pytest.fixture(scope="module")
def make_image() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def content(
    changed: dict[int, str] | None = None,
    *,
    separator: str = "\t",
    header: str | None = None,
    end: str = "\n",
) -> str:
    """A list of 12 images, some rows of which are written as given; row 0 is line 2."""
    rows = [f"img/{n}.jpg{separator}caption {n}" for n in range(COUNT)]
    for place, row in (changed or {}).items():
        rows[place] = row
    return end.join([header or f"filepath{separator}title", *rows]) + end


def opened(folder: Path, text: str | bytes, name: str = "list.tsv", **fields: str) -> FileList:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    (found,) = open_source(str(path), Fields(**fields)).shards
    assert isinstance(found, FileList)
    return found


def read(listed: FileList) -> tuple[dict[int, str], dict[str, str]]:
    """Captions by the number of their image, and what is wrong with the others by their key."""
    captions, damage = {}, {}
    for place in range(listed.num_samples):
        key = listed.key(place)
        try:
            raw = listed.read(place)
        except Damaged as damaged:
            damage[key.rpartition("/")[2]] = str(damaged)
            continue
        (caption,) = raw.captions
        captions[int(Path(key).stem)] = caption
    return captions, damage


def all_but(*places: int, **changed: str) -> dict[int, str]:
    captions = {n: f"caption {n}" for n in range(COUNT) if n not in places}
    return captions | {int(name[1:]): text for name, text in changed.items()}


@pytest.mark.parametrize(
    "caption",
    ['"the best day', 'a 12" record', '"all quoted"', 'say ""twice""', "back\\slash \\"],
)
def test_with_tabs_every_line_is_a_row_and_quotes_are_text(folder, caption):
    listed = opened(folder, content({3: f"img/3.jpg\t{caption}", 7: f"img/7.jpg\t{caption}"}))
    assert read(listed) == (all_but(n3=caption, n7=caption), {})
    assert listed.counted == "12 rows in 13 lines"


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_texts_in_quotes_are_read_as_the_csv_module_writes_them(folder, separator):
    texts = ["one, two; three | four", 'say "cheese"', "two\nlines", "", '"', "plain"]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=separator, lineterminator="\r\n")
    writer.writerow(["filepath", "title"])
    writer.writerows([f"img/{n}.jpg", text] for n, text in enumerate(texts))
    listed = opened(folder, buffer.getvalue(), "a.csv")
    assert [listed.captions(n) for n in range(6)] == [[t] if t else [] for t in texts]
    guessed = [line for line in listed.warnings() if "separated" in line]
    assert len(guessed) == (separator != ",")


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ({3: 'img/3.jpg,"the best day'}, [5]),
        ({3: 'img/3.jpg,"the best day', 8: 'img/8.jpg,a 12" record'}, [5]),
        ({3: 'img/3.jpg,"the best day', 8: 'img/8.jpg,the end"'}, [5]),
        ({3: 'img/3.jpg,"the best day', 4: 'img/4.jpg,"two, good"'}, [5]),
        ({3: 'img/3.jpg,"best" day'}, [5]),
        ({3: 'img/3.jpg,"he said \\"yes\\" to me"', 4: 'img/4.jpg,"open'}, [5, 6]),
        ({3: "img/3.jpg,a cat, a dog", 5: "img/5.jpg"}, [5, 7]),
        ({11: 'img/11.jpg,"the last'}, [13]),
    ],
)
def test_with_commas_a_damaged_row_costs_itself_and_no_other(folder, rows, lines):
    listed = opened(folder, content(rows, separator=","), "a.csv")
    captions, damage = read(listed)
    assert list(damage) == [f"a.csv:{line}" for line in lines]
    assert all(reason.startswith("row: ") for reason in damage.values())
    assert captions.keys() == set(range(COUNT)) - {line - 2 for line in lines}
    assert listed.num_samples == COUNT
    assert not any("img/" in caption for caption in captions.values())
    assert f"damaged rows: {len(lines)} (line {lines[0]}: " in listed.warnings()[0]


def test_a_row_with_other_columns_than_the_header_is_damaged_with_its_line(folder):
    changed = {3: "img/3.jpg\ta cat\ta dog", 5: "img/5.jpg", 6: "", 7: "img/7.jpg\tfirst\nsecond"}
    listed = opened(folder, content(changed))
    captions, damage = read(listed)
    assert damage == {
        "list.tsv:5": "row: 3 columns instead of 2",
        "list.tsv:7": "row: 1 column instead of 2",
        "list.tsv:10": "row: 1 column instead of 2",
    }
    assert captions == all_but(3, 5, 6, n7="first")
    assert listed.warnings()[-1].endswith("1 passed over: a line without content (line 8)")
    assert listed.counted == "12 rows in 14 lines"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_of_other_systems_are_lines(folder, end):
    listed = opened(folder, content(end=end))
    assert read(listed) == (all_but(), {})
    assert listed.counted == "12 rows in 13 lines" and listed.warnings() == []


def test_only_line_feeds_end_a_line(folder):
    odd = {n: f"a{mark}b" for n, mark in enumerate("\u2028\u0085\x0b\x0c\x1c\0")}
    text = content({n: f"img/{n}.jpg\t{caption}" for n, caption in odd.items()})
    captions, damage = read(opened(folder, text))
    assert {n: captions[n] for n in odd} == odd and not damage
    assert read(opened(folder, text.replace("\t", ","), "a.csv")) == (captions, {})


@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_bad_byte_damages_its_row_and_a_mark_in_front_none(folder, separator):
    text = content({4: f"img/4.jpg{separator}caf\xe9"}, separator=separator).encode("latin-1")
    captions, damage = read(opened(folder, b"\xef\xbb\xbf" + text))
    assert damage == {"list.tsv:6": "row: its caption is not UTF-8"}
    assert captions == all_but(4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        (content().encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
        (content().partition("\n")[2], r"no column 'filepath' among \['img/0.jpg', 'caption 0'\]"),
        (content(header="filepath\ttitle\ttitle"), "two columns 'title' among"),
        (content(header="FilePath\tTitle"), r"no column 'filepath' among \['FilePath', 'Title'\]"),
        ("filepath\ttitle\n", "holds no sample"),
    ],
)
def test_a_list_whose_columns_cannot_be_told_is_refused(folder, text, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        opened(folder, text)
    assert "\n" not in str(error.value) and "codec" not in str(error.value)


def test_the_separator_is_the_one_that_makes_the_columns(folder):
    assert read(opened(folder, content({3: "img/3.jpg,a\tb"}, separator=","), "a.csv")) == (
        all_but(n3="a\tb"),
        {},
    )
    rows = {n: f"{n},img/{n}.jpg,caption {n},x" for n in range(COUNT)}
    header = ',filepath, title ,"with\ttab"'
    assert read(opened(folder, content(rows, header=header), "a.csv")) == (all_but(), {})
    spaced = content({3: 'img/3.jpg, "a, b"'}, separator=", ")
    assert read(opened(folder, spaced, "a.csv")) == (all_but(n3="a, b"), {})


def test_spaces_around_paths_and_duplicates_are_no_damage(folder):
    changed = {3: " img/3.jpg \t caption 3\u00a0", 5: "img/4.jpg\tanother"}
    listed = opened(folder, content(changed))
    assert read(listed) == (all_but(5, n4="another"), {})
    assert [listed.captions(n) for n in (4, 5)] == [["caption 4"], ["another"]]
    assert listed.warnings() == [
        f"{folder / 'list.tsv'}: paths with spaces around them, which go: 1"
    ]


def test_the_folder_of_the_paths_is_where_most_images_are_and_a_guess_is_told(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)
    listed = opened(folder, content({0: "img/none.jpg\tx", 1: "img/a\0b.jpg\ty"}))
    captions, damage = read(listed)
    assert captions == all_but(0, 1) and set(damage) == {"none.jpg", "a\0b.jpg"}
    assert all(text.startswith("unreadable") for text in damage.values())
    assert "2 of 12 images that were looked for are missing" in listed.warnings()[0]
    elsewhere = opened(tmp_path, content({0: "img/none.jpg\tx"}))
    assert read(elsewhere)[0] == all_but(0)
    assert "relative to the working directory, where 11 of 12" in elsewhere.warnings()[0]


def test_an_image_name_that_no_system_has_is_damage(folder):
    changed = {3: f"img/{'x' * 5000}.jpg\tlong"}
    _, damage = read(opened(folder, content(changed)))
    assert list(damage.values()) == ["unreadable: File name too long"]


def test_training_check_and_convert_tell_rows_lines_and_damage(
    folder, tmp_path, caplog, capsys, open_stream
):
    opened(folder, content({3: "img/3.jpg\ta\tb", 5: ""}))
    path = folder / "list.tsv"
    damaged = "damaged rows: 1 (line 5: 3 columns instead of 2)"
    passed = "1 passed over: a line without content (line 7)"
    assert shards.main(["check", str(path)]) == 1
    told = capsys.readouterr().out
    assert "damage: row 1" in told and f"{path}:5: row: 3 columns instead of 2" in told
    assert all(f"{path}: {line}" in told for line in ("11 rows in 13 lines", damaged, passed))
    assert shards.main(["convert", str(path), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "wrote 10 samples in 1 shards" in told and "left out: row 1" in told
    assert all(f"{path}: {line}" in told for line in ("11 rows in 13 lines", damaged, passed))
    with caplog.at_level(logging.INFO):
        open_stream(str(path))
    assert f"{path}: 11 rows in 13 lines" in caplog.messages
    assert all(f"{path}: {line}" in caplog.messages for line in (damaged, passed))


def test_a_list_with_many_open_quotes_is_read_in_one_pass(folder):
    text = content({n: f'img/{n}.jpg,"open {n}' for n in range(COUNT)}, separator=",")
    text += "".join(f'img/{n % 9}.jpg,"open\n' for n in range(3000))
    listed = open_shard(_write(folder / "many.csv", text), Fields())[0]
    assert listed.num_samples == COUNT + 3000
    with pytest.raises(Damaged, match="row"):
        listed.captions(1000)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
