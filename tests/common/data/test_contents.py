"""A run goes on only with the data that it began with, whatever these are stored in."""

import json
import logging
import os
import shutil
from types import SimpleNamespace

import pytest

from forks import fork
from frugal.common.data import contents
from frugal.common.data.contents import (
    FILE,
    below_common_folder,
    check_contents,
    is_known_by_content,
    note_contents,
    noted,
    streamed_contents,
)
from frugal.common.data.sources import build_index
from frugal.common.errors import InputError
from support import DDP, ROOT


@pytest.fixture
def run(tmp_path):
    return SimpleNamespace(dir=tmp_path / "run", is_main=True, log=logging.getLogger("frugal.test"))


def begin(run, stream):
    note_contents(run, stream.contents, {})


def go_on(run, stream, *, allowed=False, told=None):
    check_contents(run, stream.contents, told=told, allowed=allowed)
    note_contents(run, stream.contents, {})


def add(folder, write_pairs):
    write_pairs(folder / "more", [2], first=90)
    shutil.move(folder / "more" / "00000.tar", folder / "00009.tar")
    (folder / "more").rmdir()


def remove(folder, write_pairs):
    (folder / "00001.tar").unlink()


def rename(folder, write_pairs):
    (folder / "00001.tar").rename(folder / "00001b.tar")


def replace(folder, write_pairs):
    write_pairs(folder / "more", [3, 4], first=50)
    shutil.move(folder / "more" / "00001.tar", folder / "00001.tar")
    shutil.rmtree(folder / "more")
    build_index(folder / "00001.tar", rebuild=True)


def shorten(folder, write_pairs):
    write_pairs(folder / "more", [3, 2])
    shutil.move(folder / "more" / "00001.tar", folder / "00001.tar")
    shutil.rmtree(folder / "more")
    build_index(folder / "00001.tar", rebuild=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (add, r"1 new \(00009.tar\)"),
        (remove, r"1 gone \(00001.tar\)"),
        (rename, r"1 renamed \(00001.tar is now 00001b.tar\)"),
        (replace, r"1 changed \(00001.tar holds other samples\)"),
        (shorten, r"1 changed \(00001.tar had 4 samples and has 2\)"),
    ],
)
def test_tars_that_changed_behind_a_run_are_refused(
    tmp_path, run, write_pairs, open_stream, caplog, change, sentence
):
    folder = tmp_path / "d"
    write_pairs(folder, [3, 4, 5])
    begin(run, open_stream(folder))
    go_on(run, open_stream(folder))
    change(folder, write_pairs)
    with pytest.raises(InputError, match=rf"{sentence}.*--run\.allow-changed-data"):
        go_on(run, open_stream(folder))
    go_on(run, open_stream(folder), allowed=True)
    assert "have changed since the run began" in caplog.text
    go_on(run, open_stream(folder))  # what was allowed is what it goes on with


def alter_bytes(path, old, new):
    """Change a file in place and give it back its times; it has as many bytes as before."""
    times = path.stat()
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert path.stat().st_size == times.st_size


@pytest.mark.parametrize("budget", [None, 10])
def test_one_caption_that_changed_in_place_is_found_in_its_shard(
    tmp_path, run, write_pairs, open_stream, caplog, monkeypatch, budget
):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "d"
    write_pairs(folder, [3, 4, 5])
    begin(run, open_stream(folder))
    os.utime(folder / "00000.tar")  # touched, and the same
    alter_bytes(folder / "00001.tar", b"w4", b"w9")
    if budget is not None:
        monkeypatch.setattr(contents, "_READ_AGAIN", budget)
        go_on(run, open_stream(folder))
        assert "2 shards (0 GiB) were copied or touched" in caplog.text
        return
    with pytest.raises(InputError, match=r"1 changed \(00001.tar has 1 altered samples\)"):
        go_on(run, open_stream(folder))
    assert "reading 2 shards again" in caplog.text
    go_on(run, open_stream(folder), allowed=True)
    caplog.clear()
    go_on(run, open_stream(folder))
    assert "again" not in caplog.text  # they are read once


def test_images_of_another_size_are_found_in_lists_and_folders(
    tmp_path, run, make_picture, open_stream
):
    for name in ("cat", "dog"):
        (tmp_path / "f" / name).mkdir(parents=True)
        make_picture(1).save(tmp_path / "f" / name / "0.png")
    listed = tmp_path / "l.csv"
    listed.write_text("filepath,title\nf/cat/0.png,w1\n")
    sources = (tmp_path / "f", listed)
    begin(run, open_stream(*sources, batch_size=1))
    make_picture(7).save(tmp_path / "f" / "cat" / "0.png")
    with pytest.raises(InputError, match=r"2 changed \(cat/ holds other images, l.csv holds other"):
        go_on(run, open_stream(*sources, batch_size=1))


def test_what_else_decides_about_samples_is_compared_too(tmp_path, run, write_pairs, open_stream):
    write_pairs(tmp_path / "d", [3])
    parts = open_stream(tmp_path / "d").contents
    note_contents(run, parts, {"data.metadata": "1"})
    assert not check_contents(run, parts, told=None, allowed=False, also={"data.metadata": "1"})
    with pytest.raises(InputError, match="the tokenizer is another; what data"):
        check_contents(
            run, parts, told=None, allowed=False, also={"data.metadata": "2"},
            changes=["the tokenizer is another"],
        )  # fmt: skip


def test_notes_of_an_earlier_version_without_stamps_are_read(
    tmp_path, run, write_pairs, open_stream
):
    write_pairs(tmp_path / "d", [3])
    begin(run, open_stream(tmp_path / "d"))
    kept = json.loads((run.dir / FILE).read_text())
    (run.dir / FILE).write_text(json.dumps({"train": kept["train"]}))
    go_on(run, open_stream(tmp_path / "d"))
    assert json.loads((run.dir / FILE).read_text()) == kept


def test_data_may_move_as_a_whole(tmp_path, run, write_pairs, open_stream):
    write_pairs(tmp_path / "a" / "x", [3, 4])
    begin(run, open_stream(tmp_path / "a" / "x"))
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a" / "x", tmp_path / "b" / "y")
    go_on(run, open_stream(tmp_path / "b" / "y"))
    with pytest.raises(InputError, match="in another order"):
        go_on(run, open_stream(tmp_path / "b/y/{00001,00000}.tar"))


OF_OTHER_KINDS = (
    b'{"train": 3}', b'{"train": [[3]]}', b'{"train": [[[["x"], 40, "d"]]]}',
    b'{"train": [[["00000.tar", {"a": 1}, ["d"]]]], "stamps": [["a"]]}',
    b'{"train": [[["a", 1, "d"]]], "stamps": [[3]]}', b'{"train": [[["a", true, "d"]]]}',
    b'{"train": [[["a", 1, "d"]]], "also": [1]}',
    b'{"train": [[["a", 1, "d"]]], "also": {"x": []}}',
)  # fmt: skip


@pytest.mark.parametrize("content", [None, b"", b"{", *OF_OTHER_KINDS])
def test_where_the_notes_are_gone_or_damaged_the_checkpoint_tells(
    content, tmp_path, run, write_pairs, open_stream, caplog
):
    write_pairs(tmp_path / "d", [3, 4])
    before = open_stream(tmp_path / "d").contents
    run.dir.mkdir()
    if content is not None:
        (run.dir / FILE).write_bytes(content)
        with pytest.raises(InputError, match=r"data\.json"):
            go_on(run, open_stream(tmp_path / "d"))
    told = json.loads(json.dumps(noted(before, {})))
    remove(tmp_path / "d", write_pairs)
    with pytest.raises(InputError, match=r"1 gone \(00001.tar\)"):
        go_on(run, open_stream(tmp_path / "d"), told=told)
    assert "taking what the checkpoint says" in caplog.text


def test_a_folder_in_the_place_of_the_notes_is_told_before_anything_is_noted(
    tmp_path, run, write_pairs, open_stream
):
    write_pairs(tmp_path / "d", [3])
    contents = open_stream(tmp_path / "d").contents
    (run.dir / FILE).mkdir(parents=True)
    told = json.loads(json.dumps(noted(contents, {})))
    with pytest.raises(InputError, match=r"data\.json is a folder, where a file belongs"):
        go_on(run, open_stream(tmp_path / "d"), told=told)


def test_only_what_is_noted_by_content_is_known_wherever_it_lies(
    tmp_path, run, write_pairs, open_stream
):
    assert not is_known_by_content(run.dir, None)
    write_pairs(tmp_path / "d", [3, 3])
    begin(run, open_stream(f"pipe:cat {tmp_path}/d/{{00000..00001}}.tar", resampled_samples=6))
    assert not is_known_by_content(run.dir, None)
    begin(run, open_stream(tmp_path / "d"))
    told = json.loads((run.dir / FILE).read_text())
    assert is_known_by_content(run.dir, None)
    for content in (None, "{"):
        (run.dir / FILE).unlink()
        if content is not None:
            (run.dir / FILE).write_text(content)
        assert not is_known_by_content(run.dir, None)
        assert is_known_by_content(run.dir, told)
        assert not is_known_by_content(run.dir, {"train": told["train"]})
        (run.dir / FILE).touch()


def test_what_changed_beside_the_shards_is_refused_where_nothing_tells_of_them(
    tmp_path, run, write_pairs, open_stream
):
    write_pairs(tmp_path / "d", [3])
    contents = open_stream(tmp_path / "d").contents
    changes = ["the tokenizer is another"]
    with pytest.raises(InputError, match="the tokenizer is another"):
        check_contents(run, contents, told=None, allowed=False, changes=changes)
    assert check_contents(run, contents, told=None, allowed=True, changes=changes) == changes
    assert check_contents(run, contents, told=None, allowed=False) == []


def test_rows_of_lists_and_class_folders_are_compared(tmp_path, run, make_picture, open_stream):
    for name in ("cat", "dog"):
        (tmp_path / "f" / name).mkdir(parents=True)
        make_picture(1).save(tmp_path / "f" / name / "0.png")
    listed = tmp_path / "l.csv"
    listed.write_text("filepath,title\nf/cat/0.png,w1\n")
    options = {"batch_size": 1}
    begin(run, open_stream(tmp_path / "f", listed, **options))
    go_on(run, open_stream(tmp_path / "f", listed, **options))
    listed.write_text("filepath,title\nf/cat/0.png,w2\n")
    with pytest.raises(InputError, match=r"data.train\[1\]: 1 changed \(l.csv holds other samples"):
        go_on(run, open_stream(tmp_path / "f", listed, **options))
    listed.write_text("filepath,title\nf/cat/0.png,w1\nf/dog/0.png,w2\n")
    (tmp_path / "f" / "ape").mkdir()
    make_picture(1).save(tmp_path / "f" / "ape" / "0.png")
    make_picture(1).save(tmp_path / "f" / "dog" / "1.png")
    with pytest.raises(InputError) as caught:
        go_on(run, open_stream(tmp_path / "f", listed, **options))
    said = str(caught.value)
    assert "data.train[0]: 1 new (ape/)" in said and "dog/ had 1 samples and has 2" in said
    assert "l.csv had 1 samples and has 2" in said


def test_streams_are_compared_by_their_names(tmp_path, run, write_pairs, open_stream):
    write_pairs(tmp_path / "d", [3, 3, 3])
    pipe = f"pipe:cat {tmp_path}/d/{{00000..0000%d}}.tar"
    options = {"resampled_samples": 6}
    begin(run, open_stream(pipe % 1, **options))
    go_on(run, open_stream(pipe % 1, **options))
    with pytest.raises(InputError, match=r"1 new \(00002.tar\)"):
        go_on(run, open_stream(pipe % 2, **options))


def test_a_run_of_an_earlier_version_goes_on_and_is_noted(
    tmp_path, run, write_pairs, open_stream, caplog
):
    caplog.set_level(logging.INFO)
    write_pairs(tmp_path / "d", [3])
    go_on(run, open_stream(tmp_path / "d"))
    assert "does not say what it was trained on" in caplog.text
    ((entry,),) = json.loads((run.dir / FILE).read_text())["train"]
    assert entry[:2] == ["00000.tar", 3] and entry[2]


GO_ON = """
import sys, time
from pathlib import Path
from frugal.common.data.contents import check_contents, note_contents
from frugal.common.distributed import barrier
from frugal.common.run import join, open_run

run = open_run(Path(sys.argv[1]), "cpu")
join(run)
time.sleep(2 * run.rank)  # the first process is ready to note the data before the other one looks
check_contents(run, [], told=None, allowed=False)
if run.is_main:
    note_contents(run, [], {})
barrier()
"""


def test_processes_agree_on_whether_a_run_of_an_earlier_version_noted_its_data(tmp_path):
    script, log = tmp_path / "go_on.py", tmp_path / "log"
    script.write_text(GO_ON)
    (tmp_path / "run").mkdir()
    words, environments = [str(tmp_path / "run")], DDP.environments()
    processes = fork(str(script), words, log=log, cwd=ROOT, environments=environments)
    assert processes.wait(timeout=60) == 0, log.read_text()
    assert (tmp_path / "run" / FILE).exists()


def test_names_are_those_below_the_folder_that_all_lie_in():
    assert below_common_folder(["/m/a/0.tar", "/m/a/1.tar"]) == ["0.tar", "1.tar"]
    assert below_common_folder(["/m/a/0.tar", "/m/ab/0.tar"]) == ["a/0.tar", "ab/0.tar"]
    assert below_common_folder(["s3://b/x/0.tar"]) == ["0.tar"]
    assert below_common_folder(["0.tar", "1.tar"]) == ["0.tar", "1.tar"]
    assert streamed_contents([[]]) == [[]]
