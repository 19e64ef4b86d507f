"""Files of other kinds than they seem, and shards and samples that hold nothing."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frugal.common.data.damage import Damaged
from frugal.common.data.labeled import LabeledImages
from frugal.common.data.patterns import find_files
from frugal.common.data.samples import Fields
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.stores.csv import open_list
from frugal.common.data.stores.folder import open_image_folder
from frugal.common.errors import InputError
from frugal.common.files import read_text
from frugal.common.shards import main


def _picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]], **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, **options) as archive:  # type: ignore[call-overload]
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def _pairs(count: int, name: str = "") -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(count)
        for member in ((f"{name}{n}.png", _picture(n)), (f"{name}{n}.txt", f"thing {n}".encode()))
    ]


def _classes(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(_picture(number))
    return folder


def test_a_pipe_among_the_images_of_a_folder_or_a_list_is_damaged_and_holds_nothing_up(
    tmp_path: Path,
) -> None:
    folder = _classes(tmp_path / "images", "cat", "dog")
    os.mkfifo(folder / "cat" / "1.png")
    listed = tmp_path / "list.csv"
    listed.write_text(f"filepath,title\n{folder}/cat/1.png,a pipe\n/dev/zero,a device\n")
    for files, place in (
        (open_image_folder(folder, Fields()), 1),
        (open_list(listed, Fields()), 1),
    ):
        with pytest.raises(Damaged, match="a pipe or a device"):
            files.read(place)


@pytest.mark.parametrize("name", ["0.tar", "0.tfrecord", "0.csv"])
def test_a_pipe_in_the_place_of_a_shard_or_a_list_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="a pipe or a device"):
        if name.endswith("csv"):
            open_list(tmp_path / name, Fields())
        else:
            build_index(tmp_path / name)


def test_a_pipe_in_the_place_of_a_small_text_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "names.txt")
    with pytest.raises(InputError, match="a pipe or a device"):
        read_text(tmp_path / "names.txt")


def test_check_counts_samples_without_a_caption_as_training_does_where_others_have_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _tar(tmp_path / "some" / "0.tar", [*_pairs(2), ("9.png", _picture(9)), ("9.txt", b"  ")])
    assert main(["check", str(tmp_path / "some"), "--processes", "1"]) == 1
    told = capsys.readouterr().out
    assert "damage: no caption 1" in told
    assert "0.tar/9: no caption" in told
    _tar(tmp_path / "none" / "0.tar", [("0.png", _picture(0)), ("1.png", _picture(1))])
    assert main(["check", str(tmp_path / "none"), "--processes", "1"]) == 0


def test_shards_that_hold_no_sample_are_told_and_nothing_at_all_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    _tar(full / "0.tar", _pairs(2))
    _tar(full / "1.tar", [])
    _tar(empty / "0.tar", [])
    assert main(["check", str(full), "--processes", "1"]) == 0
    assert "1 shards or lists hold no sample" in capsys.readouterr().out
    told = open_source(str(full), Fields()).remarks.lines("")
    assert any(str(full / "1.tar") in line for line in told)
    assert main(["check", str(empty), "--processes", "1"]) == 1
    assert main(["convert", str(empty), "--out", str(tmp_path / "out")]) == 1


def test_members_whose_names_are_no_utf8_are_converted(tmp_path: Path) -> None:
    _tar(tmp_path / "in" / "0.tar", _pairs(2, "caf\xe9"), encoding="latin-1")
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        member = archive.extractfile("000000000.json")
        assert member is not None
        assert json.loads(member.read())["caption"] == "thing 0"


def test_a_sparse_member_is_passed_over_by_its_reason_and_not_read_as_other_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "0.png").open("wb") as file:
        file.write(_picture(0))
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "0.txt").write_text("thing")
    for form in ("gnu", "posix"):
        shard = tmp_path / form / "0.tar"
        shard.parent.mkdir()
        words = ["tar", f"--format={form}", "--sparse", "-cf", str(shard), "0.png", "0.txt"]
        subprocess.run(words, cwd=tmp_path, check=True)
        assert main(["check", str(shard), "--processes", "1"]) == 1
        told = capsys.readouterr().out
        assert "sparse members" in told
        assert "cut off" not in told


def test_a_class_train_beside_others_is_a_class_and_a_split_is_none(tmp_path: Path) -> None:
    classes = _classes(tmp_path / "classes", "bus", "car", "train")
    assert find_files(str(classes)) == [classes]
    splits = _classes(tmp_path / "splits", "train", "val")
    _classes(tmp_path / "nested" / "train", "bus", "car")
    _classes(tmp_path / "nested" / "extra", "bus")
    for folder in (splits, tmp_path / "nested"):
        with pytest.raises(InputError, match="data sets in folders of their own"):
            find_files(str(folder))


def test_a_list_of_class_names_beside_a_mapping_is_told(tmp_path: Path) -> None:
    folder = _classes(tmp_path / "both", "a", "b")
    (folder / "classnames.json").write_text('{"a": "ape", "b": "bee"}')
    (folder / "classnames.txt").write_text("axe\nbow\n")
    found = open_image_folder(folder, Fields())
    assert found.class_names == ("ape", "bee")
    assert any("classnames.txt" in line for line in found.warnings())


def test_class_folders_have_no_spaces_around_their_names_and_a_blank_one_is_refused(
    tmp_path: Path,
) -> None:
    folder = _classes(tmp_path / "images", " cat", "dog ")
    assert open_image_folder(folder, Fields()).class_names == ("cat", "dog")
    _classes(folder / "  ")
    (folder / "  ").mkdir()
    (folder / "  " / "0.png").write_bytes(_picture(5))
    with pytest.raises(InputError, match="which is no name"):
        open_image_folder(folder, Fields())


def test_an_evaluation_that_is_done_again_does_not_say_again_what_it_passes_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _classes(tmp_path / "images", "cat", "dog")
    (folder / "cat" / "notes.pdf").touch()
    with caplog.at_level(logging.INFO, "frugal"):
        for _ in range(3):
            LabeledImages(folder, size=(8, 8))
    assert sum("notes.pdf" in line for line in caplog.messages) == 1
    assert sum("2 classes" in line for line in caplog.messages) == 1
