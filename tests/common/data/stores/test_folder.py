"""Folders as people have them: what is read, what is counted as passed over, what is refused."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from frugal.common.data.benchmark_layout import dataset_type
from frugal.common.data.damage import PassedOver
from frugal.common.data.decoding import FORMATS, decode_rgb, open_image
from frugal.common.data.labeled import CaptionedImages, LabeledImages
from frugal.common.data.patterns import find_files
from frugal.common.data.samples import IMAGE_EXTENSIONS, Fields
from frugal.common.data.sources import open_source
from frugal.common.data.stores.folder import refuse_without_words
from frugal.common.data.stores.image_walk import image_files
from frugal.common.errors import InputError
from frugal.common.recipe_json import difference, from_json, to_json, with_calibrated
from frugal.flip.recipes import RECIPES

IMAGES_ALONE = Fields(caption=())


@pytest.fixture
def two(tmp_path, make_picture):
    """Two class folders of three images each."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "f" / name).mkdir(parents=True)
        for place in range(3):
            make_picture(10 * number + place).save(tmp_path / "f" / name / f"{place}.png")
    return tmp_path / "f"


def opened(folder, fields=IMAGES_ALONE):
    find_files(str(folder), fields=fields)
    (shard,) = open_source(str(folder), fields).shards
    return shard


def labeled(shard):
    return [(shard.key(n), int(shard.labels[n])) for n in range(shard.num_samples)]


# Formats.


def test_images_of_folders_are_what_the_decoder_opens():
    ends = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
    assert {f".{extension}" for extension in IMAGE_EXTENSIONS} == ends


def test_every_format_is_read_and_decoded(two):
    written = {}
    for extension in IMAGE_EXTENSIONS:
        name = extension.upper() if len(written) % 2 else extension
        path = two / "dog" / f"own.{name}"
        picture = Image.new("1" if extension == "pbm" else "RGB", (9, 7))
        if extension in ("pgm", "pfm"):
            picture = picture.convert("F" if extension == "pfm" else "L")
        picture.save(path, Image.registered_extensions()[f".{extension}"])
        written[str(path)] = 1
    found = dict(labeled(opened(two)))
    assert written.items() <= found.items() and len(found) == 6 + len(IMAGE_EXTENSIONS)
    for path in written:
        assert decode_rgb(open_image(Path(path).read_bytes())).size == (9, 7)


def test_a_run_that_began_with_fewer_formats_goes_on_with_them():
    wanted = RECIPES["demo"]()
    former = ("jpg", "jpeg", "png", "webp")
    saved = replace(wanted, data=replace(wanted.data, fields=Fields(image=former)))
    assert difference(from_json(to_json(saved)), wanted)
    resumed = with_calibrated(wanted, from_json(to_json(saved)))
    assert resumed.data.fields.image == former and not difference(saved, resumed)
    # what was chosen is no former default
    chosen = replace(wanted, data=replace(wanted.data, fields=Fields(image=("png",))))
    assert with_calibrated(wanted, chosen) == wanted and with_calibrated(chosen, saved) == chosen


# What is no data.


SYSTEM = (
    "__MACOSX", ".ipynb_checkpoints", "lost+found", "@eaDir", "$RECYCLE.BIN", "#recycle", ".git",
    "System Volume Information",
)  # fmt: skip


@pytest.mark.parametrize("inside", ["", "cat"])
def test_folders_of_systems_are_passed_over_wherever_they_lie(two, inside, make_picture):
    for name in SYSTEM:
        (two / inside / name).mkdir()
        make_picture(1).save(two / inside / name / "0.png")
    (two / "cat" / "._0.png").write_bytes(b"\0\5\x16\7mac")
    (two / "dog" / "Thumbs.db").write_bytes(b"x")
    shard = opened(two)
    assert shard.class_folders == ("cat", "dog") and shard.num_samples == 6
    assert shard.passed_over.state() == {
        "hidden files and folders, or those of a system": len(SYSTEM) + 2
    }


def test_what_is_passed_over_is_counted_by_reason_and_named(two, make_picture, caplog):
    (two / "empty").mkdir()
    (two / "features").mkdir()
    (two / "features" / "0.npy").write_bytes(b"x")
    (two / "cat" / "notes.TXT").write_text("of no image")
    make_picture(1).save(two / "montage.png")
    (two / "noend").write_text("")
    with caplog.at_level(logging.INFO, logger="frugal"):
        data = LabeledImages(two, size=(8, 8))
    assert data.class_folders == data.class_names == ["cat", "dog"]
    assert data.empty_folders == ["empty", "features"]
    assert data.passed_over.state() == {
        "files that are no images (.npy)": 1,
        "files that are no images (.txt)": 1,
        "files of no known kind": 1,
        "images beside class folders, which have no class": 1,
        "folders without images, which are no classes": 2,
    }
    for named in ("montage.png", "notes.TXT", "empty", "features", "noend", "0.npy"):
        assert named in caplog.text


def test_links_that_lead_back_are_not_followed(two, tmp_path, make_picture):
    elsewhere = tmp_path / "elsewhere" / "bird"
    elsewhere.mkdir(parents=True)
    make_picture(30).save(elsewhere / "0.png")
    plain = labeled(opened(two))
    for link, target in (
        ("cat/self", ".."), ("cat/up", "../.."), ("cat/here", "."), ("dog/cats", "../cat"),
        ("dog2", "dog"), ("a", "cat"), ("cat/all", str(tmp_path)), ("dog/root", "/"),
    ):  # fmt: skip
        (two / link).symlink_to(target)
    shard = opened(two)
    assert labeled(shard) == plain
    ((reason, count),) = shard.passed_over.counts.items()
    assert count == 8 and "lead back" in reason
    # other links are followed, as torchvision does
    for link in two.rglob("*"):
        if link.is_symlink():
            link.unlink()
    (two / "bird").symlink_to(elsewhere)
    (two / "cat" / "more").symlink_to(elsewhere.parent)
    found = labeled(opened(two))
    # the bird is reached twice and read once
    assert [label for _, label in found].count(0) == 1 and len(found) == 7
    (two / "cat" / "more").unlink()
    assert labeled(opened(two)) == torchvision.datasets.ImageFolder(two).samples


def test_masks_and_pictures_of_other_layouts_are_found_by_the_same_walk(two):
    (two / "cat" / "._0.png").write_bytes(b"x")
    (two / "cat" / "loop").symlink_to("..")
    passed_over = PassedOver()
    found = image_files(two / "cat", ("png",), passed_over)
    assert [path.name for path in found] == ["0.png", "1.png", "2.png"]
    assert sum(passed_over.counts.values()) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_refused(two):
    (two / "cat").chmod(0)
    try:
        with pytest.raises(InputError, match="cat cannot be read"):
            opened(two)
    finally:
        (two / "cat").chmod(0o755)


# Two kinds of data.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", "filepath,title\ncat/0.png,a cat\n"),
        ("captions.TSV", "image\ttext\n0.png\ta cat\n1.png\ta cat\n"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a cat"}\n'),
        ("captions.txt", "0.png#0\ta cat\n0.png#1\tone cat\n"),
    ],
)
@pytest.mark.parametrize("where", ["", "cat"])
def test_a_list_beside_images_is_refused_by_name(two, name, content, where):
    (two / where / name).write_text(content)
    with pytest.raises(InputError, match=r"holds images and, in .*, a list of images") as caught:
        opened(two)
    assert name in str(caught.value) and "move the list" in str(caught.value)


def test_other_text_beside_images_is_passed_over(two):
    (two / "README.txt").write_text("Cats and dogs.\nSee cat/0.png for one.\nAnd more.\n")
    (two / "urls.csv").write_text("https://x/0.png\nhttps://x/1.png\n")
    (two / "scores.tsv").write_text("cat\t1\ndog\t2\n")
    shard = opened(two)
    assert shard.num_samples == 6 and sum(shard.passed_over.counts.values()) == 3


def test_captions_beside_every_image_are_refused_where_captions_are_wanted(two):
    for image in two.rglob("*.png"):
        image.with_suffix(".txt").write_text("a caption")
    with pytest.raises(InputError, match=r"6 of the 6 images .* have a text file of their name"):
        opened(two, Fields())
    shard = opened(two)  # where only classes are wanted, they are counted
    assert shard.passed_over.state() == {"files that are no images (.txt)": 6}


def test_one_class_folder_is_no_source_of_captions(tmp_path, make_picture, open_stream):
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    (tmp_path / "set" / "captions").mkdir()
    for number in range(3):
        make_picture(number).save(images / f"{number}.png")
        (tmp_path / "set" / "captions" / f"{number}.txt").write_text("a caption")
    with pytest.raises(InputError, match=r"one class folder only \(images\).*same caption"):
        open_stream(tmp_path / "set", batch_size=2)
    (tmp_path / "set" / "drawings").mkdir()
    make_picture(9).save(tmp_path / "set" / "drawings" / "9.png")
    assert open_stream(tmp_path / "set", batch_size=2).epoch_samples == 4


def test_shards_beside_class_folders_are_refused(two, write_tar, pair):
    write_tar(two / "val.tar", pair(0))
    with pytest.raises(
        InputError, match=r"two kinds, tars \(val.tar\) and folders of images \(cat"
    ) as c:
        find_files(str(two))
    assert f"'{two}/*.tar'" in str(c.value)
    assert [path.name for path in find_files(f"{two}/*.tar")] == ["val.tar"]


def test_tars_beside_records_are_refused(tmp_path):
    for name in ("0.tar", "1.tfrecord"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"two kinds, tars \(0.tar\) and TFRecords \(1.tfrecord\)"):
        find_files(str(tmp_path))


def test_what_lies_beside_shards_is_counted(tmp_path):
    for name in ("0.tar", "10.tar", "2.tar", "0.json", "0_stats.json", "0.tar.index.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("1.tar.gz", "2.tgz", "3.tar.part", ".4.tar", "._0.tar", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "1.tar").write_bytes(b"x")
    (tmp_path / "5.tar").mkdir()
    passed_over = PassedOver()
    found = find_files(str(tmp_path), passed_over=passed_over)
    assert [path.name for path in found] == ["0.tar", "2.tar", "10.tar"]
    assert passed_over.state() == {
        "hidden files": 2,
        "files that are no tars (.gz)": 1,
        "files that are no tars (.tgz)": 1,
        "files that are no tars (.part)": 1,
        "files that are no tars (.md)": 1,
        "folders with shards beside tars": 1,
        "folders that are called as shards": 1,
    }


def test_a_folder_of_lists_stands_for_its_lists(tmp_path):
    for name in ("10.csv", "9.tsv"):
        (tmp_path / name).write_text("filepath,title\n")
    assert [path.name for path in find_files(str(tmp_path))] == ["9.tsv", "10.csv"]


# Names and order of classes.


def make_classes(folder, names, make_picture, *, empty=()):
    for name in (*names, *empty):
        (folder / name).mkdir(parents=True)
    for number, name in enumerate(names):
        make_picture(number, 20, 20).save(folder / name / "0.png")
    return folder


def test_a_list_of_names_whose_lines_may_belong_to_others_is_refused(tmp_path, make_picture):
    twelve = [f"class_{number}" for number in range(12)]
    folder = make_classes(tmp_path / "f", twelve, make_picture)
    (folder / "classnames.txt").write_text("".join(f"name {n}\n" for n in range(12)))
    with pytest.raises(InputError, match=r"cannot be told which line of .*belongs to 'class_10'"):
        opened(folder)
    (folder / "classnames.txt").unlink()
    names = {name: f"name {number}" for number, name in enumerate(twelve)}
    (folder / "classnames.json").write_text(json.dumps(names))
    assert opened(folder).class_names == tuple(names[name] for name in sorted(twelve))


def test_lines_of_names_belong_to_numbers_by_their_value(tmp_path, make_picture):
    folder = make_classes(tmp_path / "f", ["2", "10", "9"], make_picture)
    (folder / "classnames.txt").write_text("\ufefftwo\r\nnine\r\nten\r\n\r\n")
    shard = opened(folder)
    assert dict(zip(shard.class_folders, shard.class_names, strict=True)) == {
        "2": "two", "9": "nine", "10": "ten"
    }  # fmt: skip


def test_one_stray_folder_does_not_reorder_numbers(tmp_path, make_picture):
    folder = make_classes(tmp_path / "f", ["2", "10", "misc"], make_picture)
    with pytest.raises(InputError, match=r"class folders that are numbers and 'misc'"):
        opened(folder)
    (folder / "misc" / "0.png").unlink()  # without images it is none of the classes
    shard = opened(folder)
    assert shard.class_folders == ("2", "10") and shard.empty_folders == ("misc",)


def test_numbers_and_wordnet_ids_without_images_stay_classes(tmp_path, make_picture, caplog):
    folder = make_classes(tmp_path / "n", ["2", "10"], make_picture, empty=("9", "aa"))
    with caplog.at_level(logging.INFO, logger="frugal"):
        data = LabeledImages(folder, size=(8, 8))
    assert (data.class_folders, data.empty_folders) == (["2", "9", "10"], ["aa"])
    assert data.filled_folders == ["2", "10"]
    assert "3 classes, 2 -> '2' to 10 -> '10'" in caplog.text and "no image of 9" in caplog.text


@pytest.mark.parametrize("names", [["1", "2"], ["n01440764", "n01443537"], ["cat", "007"]])
def test_captions_are_not_made_of_numbers_and_ids(tmp_path, make_picture, names):
    folder = make_classes(tmp_path / "f", names, make_picture)
    shard = opened(folder, Fields())
    assert [shard.captions(n) for n in range(2)] == [[], []]
    with pytest.raises(InputError, match=r"of which no caption can be made; write the name"):
        refuse_without_words(shard)
    (folder / "classnames.json").write_text(json.dumps({name: f"a {name}" for name in names}))
    shard = opened(folder, Fields())
    refuse_without_words(shard)
    assert all(shard.captions(n)[0].startswith("a photo of a a ") for n in range(2))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("classnames.txt", "a\n\nb\n", "blank line between others"),
        ("classnames.txt", "a\n", "names 1 classes but .* has 2 class folders"),
        ("classnames.json", '{"cat": " ", "dog": "a dog"}', "has no name for 'cat'"),
        ("Classnames.json", '{"cat": "a"}', "is not called classnames.json; rename it"),
        ("classnames.TXT", "a\nb\n", "is not called classnames.txt; rename it"),
    ],
)
def test_names_that_do_not_fit_are_refused(two, name, content, sentence):
    (two / name).write_text(content)
    with pytest.raises(InputError, match=sentence):
        opened(two)


# clip_benchmark's small files.


@pytest.fixture
def benchmark(tmp_path, write_tar, pair):
    members = [m for n in range(2) for m in (*pair(n), (f"{n:09d}.cls", str(n).encode()))]
    write_tar(tmp_path / "d" / "test" / "0.tar", members)
    return tmp_path / "d"


@pytest.mark.parametrize("content", ["a\nb\n", "\ufeffa\r\nb\r\n\r\n", "a \n b", "a\rb\r"])
def test_class_names_are_read_however_they_were_saved(benchmark, content):
    (benchmark / "classnames.txt").write_bytes(content.encode())
    assert LabeledImages(benchmark, size=(8, 8)).class_names == ["a", "b"]


def test_only_ends_of_lines_end_a_name(benchmark):
    (benchmark / "classnames.txt").write_text("a\u2028x\nb\x0by\n", encoding="utf-8")
    assert LabeledImages(benchmark, size=(8, 8)).class_names == ["a\u2028x", "b\x0by"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("classnames.txt", "a\n\nb\n", "blank line between others"),
        ("classnames.txt", b"caf\xe9\n", "is not UTF-8 text .* in line 1"),
        ("zeroshot_classification_templates.txt", "", "holds no template"),
        ("zeroshot_classification_templates.txt", "\n \n", "holds no template"),
        ("zeroshot_classification_templates.txt", "a {c}\n\n{c}\n", "blank line between others"),
        ("test/nshards.txt", "one", "must hold one whole number.*says 'one'"),
        ("test/nshards.txt", "", "must hold one whole number"),
        ("test/nshards.txt", "1.0", "must hold one whole number"),
        ("test/nshards.txt", "2", "says '2' shards but .* holds 1; copy what is missing"),
        ("test/nshards.txt", "0", "says '0' shards but .* holds 1; remove what is not of it"),
    ],
)
def test_small_files_that_say_nothing_are_refused(benchmark, name, content, sentence):
    encoded = content if isinstance(content, bytes) else content.encode()
    (benchmark / name).write_bytes(encoded)
    with pytest.raises(InputError, match=sentence) as caught:
        LabeledImages(benchmark, size=(8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["1", "\ufeff1\r\n", "01\n\n"])
def test_the_number_of_shards_is_read_however_it_was_saved(benchmark, content):
    (benchmark / "test" / "nshards.txt").write_bytes(content.encode())
    assert len(LabeledImages(benchmark, size=(8, 8))) == 2


def test_the_kind_of_a_data_set_is_one_of_the_fields_words(benchmark):
    assert dataset_type(benchmark) is None
    for content in ("retrieval", "\ufeffRetrieval\r\n\r\n", " RETRIEVAL \n"):
        (benchmark / "dataset_type.txt").write_bytes(content.encode())
        assert dataset_type(benchmark) == "retrieval"
    for content in ("retreival\n", "retrieval\nclassification\n", ""):
        (benchmark / "dataset_type.txt").write_text(content)
        with pytest.raises(InputError, match=r"no kind of data set; write one of classification"):
            CaptionedImages(benchmark, size=(8, 8))
