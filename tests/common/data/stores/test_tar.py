"""Tars as people make them, by index and as a stream: apart, with dots, cut, joined."""

import contextlib
import io
import random
import tarfile
from collections import Counter

import pytest

from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.samples import Fields, assemble
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.stores.index import find_earlier_index, find_index, load_index, read_summary
from frugal.common.data.stores.streamed_tar import stream_tar
from frugal.common.data.stores.tar import TarReader, index_tar
from frugal.common.errors import InputError

END = bytes(1024)


def members(numbers, extensions=("jpg", "txt"), key="{:03d}"):
    for number in numbers:
        for extension in extensions:
            name = f"{key.format(number)}.{extension}"
            text = {"txt": f"w{number}", "json": "{}"}.get(extension.rpartition(".")[2], name)
            yield name, text.encode()


def bare(*parts):
    """The bytes of tars one after the other, each a list of members, without end markers."""
    buffer = io.BytesIO()
    for part in parts:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, content in part:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
            end = archive.offset
        buffer.truncate(end)
        buffer.seek(end)
    return buffer.getvalue()


def outcomes(path, fields=None):
    """By index: (captions of the samples by key, damage by kind)."""
    if find_index(path) is None:
        build_index(path)
    reader = TarReader(path, fields or Fields())
    return tally(
        (reader.key(number), lambda number=number: reader.read(number))
        for number in range(reader.index.num_samples)
    )


def streamed(path, fields=None, passed_over=None):
    """The same as a stream."""

    def read(sample):
        if isinstance(sample, Damaged):
            raise sample
        return assemble(fields or Fields(), sample, sample.__getitem__)

    found = stream_tar(str(path), passed_over=passed_over)
    return tally((key, lambda sample=sample: read(sample)) for key, sample in found)


def tally(samples):
    captions, damage = {}, Counter()
    for key, read in samples:
        try:
            captions[key.partition(".tar/")[2]] = read().captions
        except Damaged as damaged:
            damage[damaged.kind] += 1
    return captions, damage


def whole(numbers, key="{:03d}"):
    return {key.format(number): [f"w{number}"] for number in numbers}


def remarks(path):
    return sum(read_summary(path).remarks.counts.values())


images, texts = list(members(range(9), ["jpg"])), list(members(range(9), ["txt"]))
pairs = list(members(range(9)))


@pytest.mark.parametrize(
    ("laid_out", "apart"),
    [
        (images + texts, 9),
        (texts + images, 9),
        (images + list(reversed(texts)), 8),  # the last image and its text are neighbors
        ([*pairs[:4], pairs[4], pairs[6], pairs[5], pairs[7], *pairs[8:]], 2),
        ([*pairs[:3], *pairs[4:], pairs[3]], 1),
    ],
)
def test_members_that_lie_apart_are_joined_by_the_index_and_told_in_a_stream(
    tmp_path, write_tar, laid_out, apart
):
    path = write_tar(tmp_path / "0.tar", laid_out)
    captions, damage = outcomes(path)
    assert captions == whole(range(9)) and not damage
    assert remarks(path) == apart
    captions, damage = streamed(path)
    assert damage["apart"] == apart
    assert all(captions[key] == text for key, text in whole(range(9)).items() if captions.get(key))


def test_neighbors_are_a_sample_of_their_own_where_a_key_comes_again(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", [*members([1, 2, 1]), ("1.json", b"{}")])
    build_index(path)
    reader = TarReader(path, Fields())
    assert [reader.key(n).rpartition("/")[2] for n in range(4)] == ["001", "002", "001", "1"]
    assert "earlier one of the same tar" in " ".join(read_summary(path).remarks.lines(""))
    assert [reader.read(n).captions for n in range(3)] == [["w1"], ["w2"], ["w1"]]


def test_a_text_that_may_be_of_two_images_is_given_to_neither(tmp_path, write_tar):
    doubled = [("0.jpg", b"a"), ("1.jpg", b"b"), ("0.jpg", b"c"), ("1.txt", b"w1"), ("0.txt", b"?")]
    captions, damage = outcomes(write_tar(tmp_path / "0.tar", doubled))
    assert captions == {"1": ["w1"]} and damage == {"duplicate": 2}


@pytest.mark.parametrize(
    "key",
    [
        "IMG_2020.01.{:02d}",
        "2020.01.{:02d}",
        "photo.v{}.final",
        "0.{}",
        "a.b/x.{}",
        "https:a.b_{}",
    ],
)
def test_dots_in_names_do_not_make_one_sample_of_many(tmp_path, write_tar, key):
    numbers = range(40)
    path = write_tar(tmp_path / "0.tar", [*members(range(100, 120)), *members(numbers, key=key)])
    expected = whole(range(100, 120)) | whole(numbers, key=key)
    captions, damage = outcomes(path)
    assert captions == expected and not damage
    assert read_summary(path).remarks.counts.popitem()[1] == 40
    assert streamed(path) == (expected, {})


def test_names_of_people_are_told_apart_where_the_whole_shard_shows_it(tmp_path, write_tar):
    names = ["john.smith", "john.doe", "jane.smith", "jane.roe", "jim.poe", "jim.coe"]
    content = [(f"{n}.{e}", n.encode()) for n in names for e in ("jpg", "txt")]
    captions, damage = outcomes(write_tar(tmp_path / "0.tar", content))
    assert captions == {name: [name] for name in names} and not damage


@pytest.mark.parametrize("read", [outcomes, streamed])
def test_compound_extensions_are_read_by_their_last_part_or_whole(tmp_path, write_tar, read):
    path = write_tar(
        tmp_path / "0.tar", list(members(range(5), ["input.jpg", "output.txt", "n.json"]))
    )
    assert read(path) == (whole(range(5)), {})
    named = Fields(image=("input.jpg",), caption=("output.txt",))
    assert read(path, named) == (whole(range(5)), {})
    words = ["before.jpg", "before.txt", "after.jpg", "after.txt"]
    path = write_tar(tmp_path / "1.tar", list(members(range(5), words)))
    assert read(path)[1] == {"no image": 5}  # which of the two, only the fields can say
    named = Fields(image=("after.jpg",), caption=("before.txt",))
    assert read(path, named) == (whole(range(5)), {})


@pytest.mark.parametrize("read", [outcomes, streamed])
def test_a_whole_name_goes_before_the_last_part_of_another(tmp_path, write_tar, read):
    content = [
        ("0.seg.png", b"mask"),
        ("0.webp", b"photo"),
        ("0.old.txt", b"old"),
        ("0.txt", b"w0"),
    ]
    path = write_tar(tmp_path / "0.tar", content)
    assert read(path) == ({"0": ["w0"]}, {})
    build_index(path)
    assert TarReader(path, Fields()).read(0).image == b"photo"


def test_a_field_of_json_under_a_compound_extension_is_read(tmp_path, write_tar):
    content = [("0.jpg", b"a"), ("0.meta.json", b'{"title": "w7"}')]
    path = write_tar(tmp_path / "0.tar", content)
    for field in ("meta.json.title", "json.title"):
        assert outcomes(path, Fields(caption=(field,))) == ({"0": ["w7"]}, {})


@pytest.mark.parametrize("read", [outcomes, streamed])
def test_equal_names_and_names_of_another_case_are_as_many_damaged_samples(
    tmp_path, write_tar, read
):
    same = write_tar(tmp_path / "0.tar", [*members([1]), *list(members([7])) * 20, *members([2])])
    assert read(same) == (whole([1, 2]), {"duplicate": 20})
    case = [m for n in range(6) for m in members([n], ["jpg", "JPG", "txt"])]
    assert read(write_tar(tmp_path / "1.tar", case)) == ({}, {"duplicate": 6})


def test_images_of_two_formats_are_told(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", list(members(range(3), ["png", "jpg", "txt"])))
    assert outcomes(path) == (whole(range(3)), {})
    (line,) = read_summary(path).remarks.lines("")
    assert line.startswith("3 samples hold images of several formats") and "000: png, jpg" in line


def test_what_belongs_to_no_sample_is_counted_by_reason(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("d", tarfile.DIRTYPE), ("d/._0.jpg", tarfile.REGTYPE), (".1.jpg", tarfile.REGTYPE),
            ("d/0.jpg", tarfile.REGTYPE), ("d/0.link", tarfile.SYMTYPE), ("d/0", tarfile.REGTYPE),
            ("__meta__/a.json", tarfile.REGTYPE), ("d/0.txt", tarfile.REGTYPE),
        ):  # fmt: skip
            header = tarfile.TarInfo(name)
            header.type = kind
            archive.addfile(header)
    build_index(path)
    found = read_summary(path).passed_over
    assert sorted(found.counts.values()) == [1, 1, 1, 2]
    assert f"2 passed over: hidden members, whose names begin with a dot ({path}/d/._0.jpg" in (
        "; ".join(found.lines())
    )
    as_stream = PassedOver()
    streamed(path, passed_over=as_stream)
    assert as_stream.state() == found.state()


def test_a_tar_of_hidden_members_is_refused_with_their_names(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", list(members(range(4), key=".{}")))
    build_index(path)
    with pytest.raises(InputError, match=r"holds no sample \(8 passed over: hidden members"):
        open_source(str(path), Fields())


def test_names_that_are_no_utf_8_are_told_all_the_same(tmp_path, write_tar):
    content = [("b\udcff.jpg", b"a"), ("._\udcff\n.jpg", b"b"), ("b\udcff.jpg", b"c")]
    path = write_tar(tmp_path / "0.tar", content)
    path.write_bytes(path.read_bytes().rstrip(b"\0"))  # so that its note names a member too
    build_index(path)
    summary = read_summary(path)
    assert "udcff" in summary.note and "\n" not in summary.passed_over.lines()[0]


@pytest.mark.parametrize("marker", [END, bytes(10240 - 512 * 7), bytes(512 * 3)])
def test_tars_that_were_joined_are_read_and_told(tmp_path, marker):
    path = tmp_path / "0.tar"
    first, second = bare(members(range(3))), bare(members(range(3, 7)))
    if marker != END and len(marker) > len(END):  # padded to a record, as tar does
        marker = bytes(-len(first) % 10240) if len(marker) > 2000 else marker
    path.write_bytes(first + marker + second + END)
    captions, damage = outcomes(path)
    assert captions == whole(range(7)) and not damage
    summary = read_summary(path)
    if len(marker) == 512 * 3:  # no program ends a tar so: members may lie under the zeros
        assert "zeros are in place of a member at byte" in summary.note
    else:
        assert f"another tar begins behind the end-of-archive marker at byte {len(first)}" in (
            summary.behind
        )
        assert f"byte {len(first) + len(marker)}" in summary.behind and not summary.note
    assert streamed(path) == (whole(range(7)), {})


def test_samples_of_equal_keys_in_joined_tars_stay_apart(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(bare(members([0])) + END + bare(members([0])) + END)
    build_index(path)
    assert read_summary(path).num_samples == 2 and not load_index(path).damage.any()
    assert len(list(stream_tar(str(path)))) == 2


def test_images_and_texts_in_two_joined_tars_are_one_set(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(bare(images) + END + bare(texts) + END)
    assert outcomes(path) == (whole(range(9)), {})


@pytest.mark.parametrize("read", [outcomes, streamed])
@pytest.mark.parametrize("fill", [bytes(512), b"\xff" * 512, bytes(1024)])
def test_a_header_that_is_overwritten_costs_its_sample_and_the_one_in_front(tmp_path, fill, read):
    path = tmp_path / "0.tar"
    long = [("005.jpg", b"x" * 900), ("005.txt", b"w5")]
    before, after = bare(members(range(5))), bare([*long, *members(range(6, 12))])
    path.write_bytes(before + fill + after[len(fill) :] + END)
    captions, damage = read(path)
    assert captions.keys() >= whole([0, 1, 2, 3, *range(6, 12)]).keys()
    assert captions == {key: [f"w{int(key)}"] for key in captions}
    assert damage["no image"] == 1 and damage.total() in (1, 2)
    if read is outcomes:
        assert f"at byte {len(before)}; members go on at byte {len(before) + 1536}" in (
            read_summary(path).note
        )
    else:
        assert damage["truncated"] == 1


def test_junk_behind_the_end_is_told_with_its_place(tmp_path):
    path = tmp_path / "0.tar"
    content = bare(members(range(3)))
    path.write_bytes(content + END + b"junk" * 1000)
    assert outcomes(path) == (whole(range(3)), {})
    assert f"4,000 bytes behind the end-of-archive marker at byte {len(content)}" in (
        read_summary(path).behind
    )
    assert streamed(path) == (whole(range(3)), {"truncated": 1})


def test_members_behind_unaligned_junk_are_found(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(bare(members(range(3))) + END + b"x" * 777 + bare(members(range(3, 5))) + END)
    assert outcomes(path) == (whole(range(5)), {})
    assert "members go on at byte" in read_summary(path).note


def test_a_size_beyond_the_file_hides_nothing_behind_its_header(tmp_path):
    path = tmp_path / "0.tar"
    before, after = bare(members(range(3))), bytearray(bare(members(range(3, 9))))
    header = tarfile.TarInfo("003.jpg")
    header.size = 1 << 50
    after[:512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(before + after + END)
    captions, damage = outcomes(path)
    assert captions == whole([0, 1, 2, *range(4, 9)]) and damage == {"truncated": 1}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<!DOCTYPE html><title>404</title>" * 40, "a page that a server sent"),
        (b"\n <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "AccessDenied"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "git lfs pull"),
        (b"PK\x03\x04" + b"x" * 600, r"compressed \(zip\)"),
        (bytes(51200), "51,200 zeros and nothing else"),
    ],
)
def test_what_lies_in_the_place_of_a_tar_is_named_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        build_index(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_images_whose_texts_have_other_names_are_told(tmp_path, write_tar):
    content = [*members(range(3), ["jpg"], "images/{}"), *members(range(3), ["txt"], "texts/{}")]
    path = write_tar(tmp_path / "0.tar", content)
    assert outcomes(path)[1] == {"no image": 3}
    (line,) = read_summary(path).remarks.lines("")
    assert "images/0 and texts/0" in line


def test_damage_shows_the_members_and_what_was_looked_for(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", [("0.heic", b"a"), ("0.TXT", b"b"), ("1.jpg", b"")])
    build_index(path)
    with pytest.raises(Damaged, match=r"looked for jpg, jpeg, png, webp, .* members are heic, txt"):
        TarReader(path, Fields()).read(0)


def test_an_index_of_an_earlier_version_is_renewed_without_reading_the_data(
    tmp_path, write_tar, old_index
):
    path = write_tar(tmp_path / "0.tar", images + texts)
    old_index(path, names=[name for name, _ in images + texts], checksums=range(18))
    assert find_index(path) is None and find_earlier_index(path) is not None
    build_index(path)
    renewed = load_index(path)
    assert renewed.num_samples == 9
    # members 0, 9, 1, 10 ...: what the old one says of them is believed, and damage is noticed
    assert renewed.checksums.tolist() == [
        n for pair in zip(range(9), range(9, 18), strict=True) for n in pair
    ]
    build_index(path, rebuild=True)
    assert outcomes(path) == (whole(range(9)), {})


def test_an_earlier_index_in_a_folder_that_must_not_be_written_is_renewed_elsewhere(
    tmp_path, write_tar, old_index, own_cache
):
    path = write_tar(tmp_path / "d" / "0.tar", pairs)
    old = old_index(path, names=[name for name, _ in pairs], checksums=[0] * 18)
    kept = old.read_bytes()
    path.parent.chmod(0o555)
    try:
        assert own_cache in build_index(path).parents
        assert find_index(path) is not None and read_summary(path).num_samples == 9
        assert old.read_bytes() == kept
    finally:
        path.parent.chmod(0o755)


def test_a_broken_extended_header_behind_joined_tars_ends_the_search(tmp_path):
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, 512
    path = tmp_path / "0.tar"
    path.write_bytes(
        bare(members(range(3))) + END + extended.tobuf(tarfile.USTAR_FORMAT) + b"\xff" * 1024
    )
    assert outcomes(path) == (whole(range(3)), {})
    assert "damaged or cut off behind 002.txt" in read_summary(path).note


def test_no_damage_ends_in_anything_but_damage_or_one_sentence(tmp_path):
    sound = bytearray(bare(members(range(12))) + END)
    generator = random.Random(0)
    path = tmp_path / "0.tar"
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(generator.randrange(1, 5)):
            place, length = generator.randrange(len(content)), generator.randrange(2000)
            content[place : place + length] = generator.choice(
                [b"", bytes(length), generator.randbytes(length), content[:512]]
            )
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            index_tar(path)
        assert list(stream_tar(str(path)))
