import random
import struct
import zlib

import pytest
import torchvision
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter

from frugal.common.data.damage import Damaged
from frugal.common.data.patterns import find_files, is_stream
from frugal.common.data.samples import Fields
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.stores.index import find_index, read_summary
from frugal.common.data.stores.tfrecord import RecordReader, crc32c, mask_checksum, parse_example
from frugal.common.errors import InputError


def names(pattern):
    return [path.name for path in find_files(str(pattern))]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for number in (0, 1, 2, 10):
        (folder / f"{number}.tar").write_bytes(b"x")
    (folder / "notes.txt").write_text("")
    return folder


def test_patterns_name_files_as_webdataset_and_the_shell_do(shards):
    assert names(shards / "1.tar") == ["1.tar"]
    assert names(shards / "{0..2}.tar") == ["0.tar", "1.tar", "2.tar"]
    assert names(shards / "{10,0}.tar") == ["10.tar", "0.tar"]
    assert names(shards / "[01]*.tar") == ["0.tar", "1.tar", "10.tar"]
    assert names(shards) == ["0.tar", "1.tar", "2.tar", "10.tar"]
    assert names(f"{shards.parent}/{{d,d}}") == names(shards) * 2


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("{0..3}.tar", r"3\.tar, which does not exist \(1 of 4 are missing\); copy"),
        ("{0..2.tar", "unbalanced brace"),
        ("*.tfrecord", "matches nothing"),
        ("notes.txt", "of no known kind"),
        ("no/such/folder", "does not exist"),
    ],
)
def test_a_pattern_that_names_no_data_is_refused(shards, pattern, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        find_files(f"{shards}/{pattern}")
    assert pattern in str(caught.value)


def test_a_glob_and_a_folder_have_one_order(shards):
    for name in ("part_10", "part_9"):
        (shards.parent / name).mkdir()
        (shards.parent / name / "0.tar").write_bytes(b"x")
    assert names(shards / "*.tar") == names(shards) == ["0.tar", "1.tar", "2.tar", "10.tar"]
    found = find_files(f"{shards.parent}/part_*/*.tar")
    assert [path.parent.name for path in found] == ["part_9", "part_10"]
    assert [path.parent.name for path in find_files(f"{shards.parent}/part_*")] == [
        "part_9", "part_10"
    ]  # fmt: skip


def test_two_stars_stand_for_any_number_of_folders(shards):
    deep = shards / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "3.tar").write_bytes(b"x")
    (shards / "__MACOSX").mkdir()
    (shards / "__MACOSX" / "4.tar").write_bytes(b"x")
    (shards / ".hidden.tar").write_bytes(b"x")
    (shards / "0.tar.index.safetensors").write_bytes(b"x")
    expected = ["0.tar", "1.tar", "2.tar", "10.tar", "3.tar"]
    assert sorted(names(shards / "**" / "*.tar")) == sorted(expected)
    assert names(shards.parent / "**" / "b" / "*.tar") == ["3.tar"]
    (shards / "notes.txt").unlink()
    assert sorted(names(shards / "**")) == sorted(expected)


@pytest.mark.parametrize(
    "name", ["a{0..2}b", "x[1]", "odd\\name", "{a,b}", "w*?", "open{", "two words"]
)
def test_what_exists_is_taken_as_it_is_written(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for number in (0, 10, 9):
        (folder / f"{number}.tar").write_bytes(b"x")
    (folder / f"{name}.tar").write_bytes(b"x")
    assert names(folder / f"{name}.tar") == [f"{name}.tar"]
    # and so is the folder at the beginning of a pattern
    assert names(folder / "{0..0}.tar") == ["0.tar"]
    assert names(folder / "[19]*.tar") == ["9.tar", "10.tar"]
    assert len(find_files(str(folder))) == 4


def test_all_that_is_missing_is_counted_and_the_first_are_named(shards):
    with pytest.raises(InputError) as caught:
        find_files(f"{shards}/{{0..9}}.tar")
    sentence = str(caught.value)
    assert "3.tar" in sentence and "5.tar and 4 more" in sentence
    assert "(7 of 10 are missing)" in sentence and "'*.tar'" in sentence


@pytest.mark.parametrize("pattern", ["", "  "])
def test_an_empty_pattern_is_not_the_current_folder(pattern):
    with pytest.raises(InputError, match="a data pattern is empty"):
        find_files(pattern)


def test_a_folder_with_splits_or_several_sets_is_refused(tmp_path, make_picture):
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split / "n01").mkdir(parents=True)
        make_picture(0).save(tmp_path / "imagenet" / split / "n01" / "0.jpg")
    with pytest.raises(InputError, match="data sets in folders of their own"):
        find_files(str(tmp_path / "imagenet"))
    (tmp_path / "sets" / "a").mkdir(parents=True)
    (tmp_path / "sets" / "a" / "0.tar").write_bytes(b"x")
    with pytest.raises(
        InputError, match="data sets in folders of their own; give one of them, such as a"
    ):
        find_files(str(tmp_path / "sets"))


def test_urls_are_told_from_paths():
    urls = ["pipe:cat x", "s3://b/{00..10}.tar", "https://h/x.tar", "gs://b/x.tar"]
    assert all(map(is_stream, urls))
    assert not any(map(is_stream, ["a/b.tar", "/a/{0..1}.tar", "c:x.tar", "pipes/x.tar"]))


@pytest.fixture
def class_folders(tmp_path, make_picture):
    folder = tmp_path / "classes"
    for number, name in enumerate(
        ("n02_dog", "n01_cat", "n01_cat/z", "n03", "n01_cat/b", "n01_cat/a", "n01_cat/y")
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for picture in range(2):
            make_picture(10 * number + picture).save(folder / name / f"{picture}.png")
    (folder / "n03" / "read me.txt").write_text("")
    make_picture(99).save(folder / "n03" / "upper.JPG")
    return folder


def test_class_folders_are_read_as_torchvision_reads_them(class_folders):
    theirs = torchvision.datasets.ImageFolder(class_folders)
    (ours,) = open_source(str(class_folders), Fields()).shards
    found = [(ours.key(n), ours.read(n).label) for n in range(ours.num_samples)]
    assert found == theirs.samples
    assert ours.read(0).image == (class_folders / "n01_cat" / "0.png").read_bytes()


def test_class_folders_get_captions_from_the_template(class_folders):
    fields = Fields(template="a drawing of a {}")
    (ours,) = open_source(str(class_folders), fields).shards
    assert ours.captions(0) == ["a drawing of a n01 cat"]
    (class_folders / "classnames.txt").write_text("tabby cat\nterrier\nbird\n")
    (ours,) = open_source(str(class_folders), fields).shards
    assert [ours.captions(n)[0] for n in (0, 10, 12)] == [
        "a drawing of a tabby cat", "a drawing of a terrier", "a drawing of a bird"
    ]  # fmt: skip
    (class_folders / "classnames.txt").write_text("tabby cat\nterrier\n")
    with pytest.raises(InputError, match=r"names 2 classes but .* has 3 class folders"):
        open_source(str(class_folders), fields)


@pytest.mark.parametrize(
    ("name", "text", "fields"),
    [
        ("a.csv", 'filepath,title\n{0},"one, two"\n{1},three\n', Fields()),
        ("a.csv", "filepath\ttitle\n{0}\tone, two\n{1}\tthree\n", Fields()),
        (
            "a.tsv",
            "url|caption|path\nu|one, two|{0}\nu|three|{1}\n",
            Fields(csv_image="path", csv_caption="caption", csv_separator="|"),
        ),
    ],
)
@pytest.mark.parametrize("is_absolute", [True, False])
def test_csv_files_list_images_and_captions(
    tmp_path, class_folders, name, text, fields, is_absolute
):
    files = [class_folders / "n03" / "0.png", class_folders / "n03" / "1.png"]
    written = files if is_absolute else [file.relative_to(tmp_path) for file in files]
    (tmp_path / name).write_text(text.format(*written))
    (ours,) = open_source(str(tmp_path / name), fields).shards
    samples = [ours.read(number) for number in range(ours.num_samples)]
    assert [sample.captions for sample in samples] == [["one, two"], ["three"]]
    assert [sample.image for sample in samples] == [file.read_bytes() for file in files]


def test_csv_rows_without_a_readable_image_are_damage(tmp_path, class_folders):
    image = class_folders / "n03" / "0.png"
    path = tmp_path / "a.csv"
    path.write_text(f"filepath,title\n{image},fine\n,none\nmissing.png,gone\n{image}\n")
    (ours,) = open_source(str(path), Fields()).shards
    kinds = []
    for number in range(ours.num_samples):
        try:
            kinds.append(ours.read(number).captions)
        except Damaged as damaged:
            kinds.append(damaged.kind)
    assert kinds == [["fine"], "no image", "unreadable", "row"]


def test_a_csv_file_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("url,caption\n1,2\n")
    with pytest.raises(InputError, match=r"no column 'filepath' among .'url', 'caption'."):
        open_source(str(path), Fields())
    path.write_text("filepath,title\n")
    with pytest.raises(InputError, match="holds no sample"):
        open_source(str(path), Fields())


# ------------------------------------------------------------------------------------------------
# TFRecords: framing by tensorboard's own writer, messages by Google's protocol buffers


def example_class():
    """tf.train.Example, declared anew."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    repeated, single = field.LABEL_REPEATED, field.LABEL_OPTIONAL
    for name, kind in (
        ("BytesList", field.TYPE_BYTES), ("FloatList", field.TYPE_FLOAT),
        ("Int64List", field.TYPE_INT64),
    ):  # fmt: skip
        message = file.message_type.add(name=name)
        message.field.add(name="value", number=1, type=kind, label=repeated)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), start=1):
        feature.field.add(
            name=name.lower(), number=number, type=field.TYPE_MESSAGE, label=single,
            type_name=f".t.{name}", oneof_index=0,
        )  # fmt: skip
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=single)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, label=single, type_name=".t.Feature"
    )
    features.field.add(
        name="feature", number=1, type=field.TYPE_MESSAGE, label=repeated,
        type_name=".t.Features.FeatureEntry",
    )  # fmt: skip
    example = file.message_type.add(name="Example")
    example.field.add(
        name="features", number=1, type=field.TYPE_MESSAGE, label=single, type_name=".t.Features"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = example_class()


def example(**features):
    message = EXAMPLE()
    for name, values in features.items():
        feature = message.features.feature[name]
        if isinstance(values[0], bytes):
            feature.byteslist.value.extend(values)
        elif isinstance(values[0], int):
            feature.int64list.value.extend(values)
        else:
            feature.floatlist.value.extend(values)
    return message.SerializeToString()


@pytest.fixture
def write_records(encode, make_picture):
    """Writes TFRecords as img2dataset does."""

    def write(path, count, **extra):
        with path.open("wb") as file:
            writer = RecordWriter(file)
            for number in range(count):
                features = {
                    "jpg": [encode(make_picture(number))],
                    "txt": [f"w{number}".encode()],
                    "key": [b"%09d" % number],
                    "width": [56],
                    "similarity": [0.25, 0.5],
                }
                writer.write(example(**features | extra))
        return path

    return write


def read_all(path):
    reader = RecordReader(path, Fields())
    found = []
    for number in range(reader.index.num_samples):
        try:
            found.append(reader.read(number).captions[0])
        except Damaged as damaged:
            found.append(damaged.kind)
    return found


def test_examples_are_parsed_as_protocol_buffers_are():
    generator = random.Random(0)
    features = {
        "bytes": [generator.randbytes(n) for n in (0, 1, 200, 70_000)],
        "integers": [0, 1, -1, 127, 128, -(2**63), 2**63 - 1],
        "x" * 300: [b"long name"],
    }
    assert parse_example(example(**features, floats=[1.5])) == features
    assert parse_example(b"") == {}
    message = EXAMPLE()
    message.features.feature["empty"].byteslist.SetInParent()
    assert parse_example(message.SerializeToString()) == {"empty": []}


def test_what_is_no_example_is_refused():
    whole = example(jpg=[b"abc" * 50], txt=[b"hello"])
    for broken in (whole[:-3], b"\xff" * 30, b"\x0b\x00", whole[:1]):
        with pytest.raises(ValueError):
            parse_example(broken)


def test_our_checksum_is_crc_32c():
    # test vectors of RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_records_are_read_from_any_place(tmp_path, write_records, encode, make_picture):
    path = write_records(tmp_path / "0.tfrecord", 7)
    build_index(path)
    assert read_summary(path).num_samples == 7
    reader = RecordReader(path, Fields())
    for number in (5, 0, 6, 3):
        sample = reader.read(number)
        assert sample.image == encode(make_picture(number))
        assert sample.captions == reader.captions(number) == [f"w{number}"]
        assert sample.label is None
        assert reader.key(number) == f"{path}/{number}"


def test_records_may_hold_several_captions_and_a_class(tmp_path, write_records):
    path = write_records(tmp_path / "0.tfrecord", 1, captions=[b"a", b"b"], cls=[7])
    build_index(path)
    sample = RecordReader(path, Fields()).read(0)
    assert sample.captions == ["a", "b"] and sample.label == 7
    lines = Fields(caption=("txt",), caption_per_line=True)
    path = write_records(tmp_path / "1.tfrecord", 1, txt=[b"a\n\nb\n"], cls=[b"12"])
    build_index(path)
    sample = RecordReader(path, lines).read(0)
    assert sample.captions == ["a", "b"] and sample.label == 12


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_record_file_is_noticed(tmp_path, write_records, seed):
    path = write_records(tmp_path / "0.tfrecord", 5)
    content = path.read_bytes()
    cut = random.Random(seed).randrange(20, len(content))
    path.write_bytes(content[:cut])
    build_index(path)
    assert "cut off" in read_summary(path).note
    found = read_all(path)
    assert found == [f"w{number}" for number in range(len(found) - 1)] + ["truncated"]


def test_a_record_altered_before_or_after_indexing_is_noticed(tmp_path, write_records):
    path = write_records(tmp_path / "0.tfrecord", 5)
    build_index(path)
    offsets = RecordReader(path, Fields()).index.offsets
    content = bytearray(path.read_bytes())
    content[int(offsets[3]) + 200] ^= 1
    path.write_bytes(content)
    expected = ["w0", "w1", "w2", "checksum", "w4"]
    assert read_all(path) == expected
    find_index(path).unlink()
    build_index(path)
    assert read_all(path) == expected


def test_a_broken_length_loses_what_lies_behind_it_and_is_noticed(tmp_path, write_records):
    path = write_records(tmp_path / "0.tfrecord", 5)
    build_index(path)
    offset = int(RecordReader(path, Fields()).index.offsets[2]) - 12
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    find_index(path).unlink()
    build_index(path)
    assert f"no readable record at byte {offset}" in read_summary(path).note
    assert read_all(path) == ["w0", "w1", "truncated"]


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b" + b"x" * 100, zlib.compress(b"x" * 1000)])
def test_what_holds_no_records_is_refused(tmp_path, content):
    path = tmp_path / "0.tfrecord"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"0\.tfrecord (is empty|does not begin like)"):
        build_index(path)


def test_a_record_that_is_no_example_or_has_no_image_is_damage(tmp_path):
    path = tmp_path / "0.tfrecord"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for data in (b"\xff" * 20, example(txt=[b"a"]), example(jpg=[b""], txt=[b"w2"])):
            writer.write(data)
    build_index(path)
    assert read_all(path) == ["unreadable", "no image", "w2"]


def test_every_kind_of_source_trains(
    tmp_path, write_pairs, write_records, class_folders, open_stream
):
    write_pairs(tmp_path / "tars", [3, 2])
    write_records(tmp_path / "0.tfrecord", 4)
    csv = tmp_path / "a.csv"
    csv.write_text("filepath,title\n" + "classes/n03/0.png,w7\n" * 3)
    stream = open_stream(
        tmp_path / "tars", tmp_path / "0.tfrecord", csv, class_folders, batch_size=27
    )
    assert stream.epoch_samples == 5 + 4 + 3 + 15
    batch = next(iter(stream))
    assert batch.valid.all()
    folders = [key.removeprefix(f"{tmp_path}/").partition("/")[0] for key in batch.keys]
    assert {name: folders.count(name) for name in folders} == {
        "tars": 5, "0.tfrecord": 4, "classes": 18
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["0.TFRecord", "a.tfrec", "a.tfrecord-00000-of-00001", "a.TFRECORDS", "b.TFREC-00003-OF-00010"],
)
def test_records_are_known_by_every_name_that_is_in_use(tmp_path, write_records, name):
    path = write_records(tmp_path / name, 3)
    assert find_files(str(tmp_path)) == [path]
    build_index(path)
    shard = open_source(str(path), Fields()).shards[0]
    assert [shard.open(Fields()).read(n).captions for n in range(3)] == [["w0"], ["w1"], ["w2"]]


def test_tars_are_known_in_capitals(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.TAR", [("0.jpg", b"a")])
    assert find_files(str(tmp_path)) == find_files(str(path)) == [path]


@pytest.mark.parametrize(
    "data", [b"\xff" * 100_000, b"\x0a" + b"\x80" * 5000 + b"\x01", b"\x0b\x00"]
)
def test_a_record_that_is_no_example_is_damage(tmp_path, data):
    length = struct.pack("<Q", len(data))
    path = tmp_path / "0.tfrecord"
    path.write_bytes(
        length
        + struct.pack("<I", mask_checksum(crc32c(length)))
        + data
        + struct.pack("<I", mask_checksum(crc32c(data)))
    )
    build_index(path)
    assert read_all(path) == ["unreadable"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x1f\x8b" + b"x" * 100, "compressed .gzip."),
        (b"<html>503</html>" * 9, "a page that a server sent"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
    ],
)
def test_what_lies_in_the_place_of_records_is_named(tmp_path, content, what):
    path = tmp_path / "0.tfrecord"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"does not begin like a TFRecord file: it is {what}"):
        build_index(path)
