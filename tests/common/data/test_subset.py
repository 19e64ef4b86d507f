"""Training on a list of samples, or on the first ones."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frugal.common.data.config import PairData, make_order
from frugal.common.data.samples import Fields
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.subset import first_of, read_subset
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.errors import InputError
from support import ALONE, DDP, Launcher, largest_difference, saved_tensors, train

FIELDS = Fields()


def shard(path: Path, keys: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for extension in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
    build_index(path)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        shard(tmp_path / "data" / f"{name}.tar", [f"{name}/{number}" for number in range(4)])
    return tmp_path / "data"


def data_of(*train_on: Path, **options: object) -> PairData:
    return PairData(train=tuple(map(str, train_on)), tokenizer=ClipBpe(), **options)  # type: ignore[arg-type]


def epochs(data: PairData, count: int) -> list[Counter[str]]:
    """The keys of the samples of some epochs."""
    sources = [open_source(entry, FIELDS) for entry in data.train]
    order = make_order(data, sources, seed=3)
    readers = [each.open(FIELDS) for source in sources for each in source.shards]
    found = []
    for epoch in range(count):
        numbers = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
        places = zip(*(each.tolist() for each in order.locate(numbers)), strict=True)
        found.append(Counter(readers[s].key(i).rpartition("data/")[2] for s, i in places))
    return found


def test_an_epoch_has_what_the_list_names_as_often_as_it_names_it(tars: Path) -> None:
    listed = tars.parent / "list.txt"
    lines = ["c.tar/c/3", "a.tar/a/0", "c.tar/c/3", f"{tars}/a.tar/a/2", "", "a.tar/a/1"]
    listed.write_text("\n".join(lines))
    expected = Counter({"c.tar/c/3": 2, "a.tar/a/0": 1, "a.tar/a/1": 1, "a.tar/a/2": 1})
    assert epochs(data_of(tars, subset=listed), 3) == [expected] * 3
    few = epochs(data_of(tars, subset=listed, max_samples=2), 1)
    assert few == [Counter({"a.tar/a/0": 1, "a.tar/a/2": 1})]  # as listed, shard by shard


def test_the_first_samples_are_those_that_are_stored_first(tars: Path) -> None:
    for most, expected in ((3, ["a/0", "a/1", "a/2"]), (6, ["b/0", "b/1"])):
        (found,) = epochs(data_of(tars, max_samples=most), 1)
        assert len(found) == most and all(found[f"{k[0]}.tar/{k}"] == 1 for k in expected)
    assert epochs(data_of(tars, max_samples=99), 1) == epochs(data_of(tars), 1)
    source = open_source(str(tars), FIELDS)
    kept = first_of(source.counts, 6)
    assert [each.tolist() for each in kept] == [[0, 1, 2, 3], [0, 1], []]


def test_shares_of_sources_hold_for_what_is_left_of_them(tars: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "data"
    shard(other / "x.tar", ["x/0", "x/1"])
    listed = tmp_path / "list.txt"
    listed.write_text("a.tar/a/0\na.tar/a/1\nx.tar/x/1\n")
    data = data_of(tars, other, subset=listed, weights=(3.0, 1.0))
    sources = [open_source(entry, FIELDS) for entry in data.train]
    order = make_order(data, sources, seed=0)
    shards, indices = order.locate(np.arange(16_384))
    assert Counter(zip(shards.tolist(), indices.tolist(), strict=True)) == {
        (0, 0): 6144, (0, 1): 6144, (3, 1): 4096,
    }  # fmt: skip
    listed.write_text("a.tar/a/0\n")
    with pytest.raises(InputError, match=f"leave nothing of {other}"):
        make_order(data, sources, seed=0)


def test_images_of_folders_and_rows_of_lists_are_named_by_their_paths(tmp_path: Path) -> None:
    pixels = Image.new("RGB", (4, 4))
    for name in ("cats/1.png", "dogs/1.png", "dogs/2.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels.save(tmp_path / "classes" / name)
    table = tmp_path / "pairs.csv"
    table.write_text("filepath\ttitle\nclasses/cats/1.png\tone\nclasses/dogs/1.png\ttwo\n")
    sources = [open_source(str(tmp_path / "classes"), FIELDS), open_source(str(table), FIELDS)]
    listed = tmp_path / "list.txt"
    listed.write_text(
        f"classes/dogs/2.png\n{tmp_path}/classes/cats/1.png\n{table}/classes/dogs/1.png\n"
    )
    assert [each.tolist() for each in read_subset(listed, sources, FIELDS)] == [[2, 0], [1]]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "names no sample"),
        ("a.tar/a/0\na.tar/a/9\n", r"names 1 of 1 samples|names 1 of 2 samples"),
        ("z.tar/a/0\n", "1 of 1 samples that data.train does not have .z.tar/a/0."),
        ("000001\n", "a line is a shard, a slash and the key"),
    ],
)
def test_what_a_list_cannot_name_is_one_sentence(lines: str, sentence: str, tars: Path) -> None:
    listed = tars.parent / "list.txt"
    listed.write_text(lines)
    with pytest.raises(InputError, match=sentence):
        read_subset(listed, [open_source(str(tars), FIELDS)], FIELDS)


def table_of(folder: Path, *captions: str) -> Path:
    """A CSV file with one image under several captions."""
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    rows = "".join(f"1.png\t{caption}\n" for caption in captions)
    (folder / "pairs.csv").write_text(f"filepath\ttitle\n{rows}")
    return folder / "pairs.csv"


def test_what_a_line_looks_like_is_said_of_folders_and_lists_too(tmp_path: Path) -> None:
    table = table_of(tmp_path, "one")
    listed = tmp_path / "list.txt"
    listed.write_text("1.png\r\n")
    with pytest.raises(InputError, match=r"as in folder/cats/1\.jpg or pairs\.csv/images/1\.jpg"):
        read_subset(listed, [open_source(str(table), FIELDS)], FIELDS)
    listed.write_text("pairs.csv/1.png\r\n")
    assert len(read_subset(listed, [open_source(str(table), FIELDS)], FIELDS)[0]) == 1


def test_a_key_that_two_rows_have_cannot_be_named(tmp_path: Path) -> None:
    table = table_of(tmp_path, "one", "two")
    listed = tmp_path / "list.txt"
    listed.write_text("pairs.csv/1.png\n")
    with pytest.raises(InputError, match=r"names 1\.png, of which .*pairs\.csv has several"):
        read_subset(listed, [open_source(str(table), FIELDS)], FIELDS)


def test_the_same_name_in_two_folders_has_to_be_written_out(tars: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "data"
    shard(other / "a.tar", ["a/0"])
    sources = [open_source(str(tars), FIELDS), open_source(str(other), FIELDS)]
    listed = tmp_path / "list.txt"
    listed.write_text("a.tar/a/0\n")
    with pytest.raises(InputError, match="does not have"):
        read_subset(listed, sources, FIELDS)
    listed.write_text(f"{other}/a.tar/a/0\n")
    assert [len(each) for each in read_subset(listed, sources, FIELDS)] == [0, 0, 0, 1]


@pytest.mark.parametrize("launcher", [ALONE, DDP], ids=lambda launcher: launcher.name)
def test_a_run_on_a_list_goes_on_where_it_was_and_not_with_another_list(
    launcher: Launcher, scenes: Path, tmp_path: Path
) -> None:
    for path in sorted((scenes / "train").glob("*.tar")):
        build_index(path)
    source = open_source(str(scenes / "train"), FIELDS)
    readers = [each.open(FIELDS) for each in source.shards]
    keys = [r.key(n) for r, count in zip(readers, source.counts, strict=True) for n in range(count)]
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{key}\n" for key in [*keys[::3], keys[0]]))
    words = (f"--data.train={scenes / 'train'}", f"--data.subset={listed}", "--run.save-every=4")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    said = train(launcher, whole, *words, "--schedule.samples=240")
    assert f"data: {len(keys[::3]) + 1} samples in" in said
    train(launcher, cut, *words, "--schedule.samples=240", "--run.keep=9")
    for folder in sorted((cut / "checkpoints").glob("step_*"))[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert "from step 4 of 10" in train(launcher, cut, *words, "--schedule.samples=240")
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert largest_difference(saved_tensors(cut), saved_tensors(whole), kinds) == 0.0
    told = json.loads((cut / "data.json").read_text())
    assert "data.subset" in told["also"]
    listed.write_text("".join(f"{key}\n" for key in keys[::4]))
    longer = (*words, "--schedule.samples=240")
    for folder in sorted((cut / "checkpoints").glob("step_*"))[-1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert "data.subset" in train(launcher, cut, *longer, expect=2)
    listed.unlink()
    said = train(launcher, cut, *longer, expect=2)
    assert f"data.subset: {listed} cannot be read (No such file or directory)" in said
