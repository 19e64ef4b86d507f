import gzip
import io
import random
import stat
import tarfile

import pytest
import webdataset

from frugal.common.data.damage import Damaged
from frugal.common.data.samples import Fields
from frugal.common.data.sources import build_index
from frugal.common.data.stores.index import find_index, load_index, read_summary
from frugal.common.data.stores.tar import TarReader
from frugal.common.errors import InputError


def headers(path):
    with tarfile.open(path) as archive:
        return archive.getmembers()


def webdataset_samples(path):
    """Keys and members as the webdataset library reads them."""
    samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {n: v for n, v in s.items() if not n.startswith("__")}) for s in samples]


def our_samples(path):
    build_index(path)
    reader = TarReader(path, Fields())
    return [
        (
            reader.key(number).removeprefix(f"{path}/"),
            {name: reader.content(member) for name, member in reader.members(number).items()},
        )
        for number in range(reader.index.num_samples)
    ]


def pairs(count, generator):
    for number in range(count):
        yield f"{number:04d}.jpg", generator.randbytes(generator.randrange(1, 3000))
        yield f"{number:04d}.txt", generator.randbytes(generator.randrange(0, 40))


def sound_samples(path):
    """The bytes of every sample that can be read, by number; and the others' damage."""
    reader = TarReader(path, Fields())
    sound, damaged = {}, {}
    for number in range(reader.index.num_samples):
        try:
            members = reader.members(number)
            sound[number] = {name: reader.content(member) for name, member in members.items()}
        except Damaged as error:
            damaged[number] = error.kind
    return sound, damaged


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_the_webdataset_library(tmp_path, write_tar, form):
    folder = "a_folder_of_some_length/" * 3
    long_name = "x" * 120 if form != tarfile.USTAR_FORMAT else "x" * 60
    names = [
        "__index__", "__meta__/0.json", "README",
        "0.jpg", "0.txt", "1.JPG", "1.seg.png", "1.txt",
        f"{folder}v1.2/2.jpg", f"{folder}v1.2/2.cls", f"{folder}no_extension",
        f"{long_name}.webp", f"{long_name}.json",
        "0.jpg", "0.txt", "ümläut/7.txt",
    ]  # fmt: skip
    if form == tarfile.USTAR_FORMAT:
        names.remove(f"{folder}no_extension")
    content = [f"{place} {name}".encode() * place for place, name in enumerate(names)]
    path = write_tar(tmp_path / "0.tar", list(zip(names, content, strict=True)), format=form)
    assert our_samples(path) == webdataset_samples(path)
    assert len(our_samples(path)) == 6


def test_real_shards_are_read_as_the_webdataset_library_reads_them(tmp_path, real_data):
    path = real_data / "coco_mini" / "val" / "00000.tar"
    assert our_samples(path) == webdataset_samples(path)


def test_links_folders_and_hidden_files_belong_to_no_sample(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("d", tarfile.DIRTYPE), ("d/._0.jpg", tarfile.REGTYPE), ("d/0.jpg", tarfile.REGTYPE),
            ("d/0.link", tarfile.SYMTYPE), ("d/0.txt", tarfile.REGTYPE),
        ):  # fmt: skip
            header = tarfile.TarInfo(name)
            header.type = kind
            header.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(header, io.BytesIO(b"abcd"))
    assert our_samples(path) == [("d/0", {"jpg": b"abcd", "txt": b"abcd"})]


@pytest.mark.parametrize("seed", range(12))
def test_a_shard_cut_anywhere_is_noticed_and_read_up_to_the_cut(tmp_path, write_tar, seed):
    generator = random.Random(seed)
    path = write_tar(tmp_path / "0.tar", list(pairs(8, generator)))
    build_index(path)
    whole, damaged = sound_samples(path)
    assert not damaged and not read_summary(path).note
    end = max(m.offset_data + m.size for m in headers(path))
    cut = generator.randrange(600, end)
    path.write_bytes(path.read_bytes()[:cut])
    find_index(path).unlink()
    build_index(path)
    assert "cut off" in read_summary(path).note
    sound, damaged = sound_samples(path)
    assert list(damaged.values()) == ["truncated"]
    assert sound == {number: whole[number] for number in range(len(sound))}


@pytest.mark.parametrize("member", [1, 6, 7, 15])
def test_a_shard_cut_between_two_members_is_noticed(tmp_path, write_tar, member):
    path = write_tar(tmp_path / "0.tar", list(pairs(8, random.Random(0))))
    place = headers(path)[member].offset
    path.write_bytes(path.read_bytes()[:place])
    assert webdataset_samples(path)  # which reads it as complete
    build_index(path)
    assert "end-of-archive marker is missing" in read_summary(path).note
    sound, damaged = sound_samples(path)
    # nobody can tell whether the last sample lacks a member
    last = (member - 1) // 2
    assert damaged == {last: "truncated"}
    assert list(sound) == list(range(last))


def test_a_garbled_header_is_not_taken_for_the_end(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", list(pairs(8, random.Random(0))))
    place = headers(path)[8].offset
    content = bytearray(path.read_bytes())
    content[place + 20] ^= 0x55
    path.write_bytes(content)
    build_index(path)
    assert "a header is unreadable" in read_summary(path).note
    assert sound_samples(path)[1] == {3: "truncated"}


def test_one_flipped_bit_after_indexing_damages_exactly_its_sample(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", list(pairs(8, random.Random(0))))
    build_index(path)
    whole, _ = sound_samples(path)
    member = headers(path)[10]
    content = bytearray(path.read_bytes())
    content[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(content)
    sound, damaged = sound_samples(path)
    assert damaged == {5: "checksum"}
    assert sound == {number: sample for number, sample in whole.items() if number != 5}


def test_two_members_of_one_name_damage_their_sample(tmp_path, write_tar):
    members = [("0.jpg", b"a"), ("1.jpg", b"b"), ("1.txt", b"c"), ("1.JPG", b"d"), ("2.jpg", b"e")]
    path = write_tar(tmp_path / "0.tar", members)
    build_index(path)
    assert sound_samples(path) == ({0: {"jpg": b"a"}, 2: {"jpg": b"e"}}, {1: "duplicate"})


def test_a_shard_that_changed_its_size_after_indexing_is_refused(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", list(pairs(8, random.Random(0))))
    build_index(path)
    with path.open("ab") as file:
        file.write(b"\0" * 512)
    for read in (read_summary, load_index):
        with pytest.raises(InputError, match=r"0\.tar has \d+ bytes but had \d+ when it was inde"):
            read(path)
    build_index(path)
    assert read_summary(path).num_samples == 8


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"<html><body>404 Not Found</body></html>" * 40, "is not a tar archive"),
        (b"short", "is not a tar archive"),
        (gzip.compress(b"\0" * 10240), "is compressed .gzip."),
        (b"BZh91AY" + b"x" * 600, "is compressed .bzip2."),
    ],
    ids=["empty", "a web page", "short", "gzip", "bzip2"],
)
def test_what_is_no_plain_tar_is_refused(tmp_path, content, sentence):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"0\.tar {sentence}"):
        build_index(path)
    assert find_index(path) is None


def test_an_index_says_how_many_samples_there_are(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", list(pairs(8, random.Random(0))))
    assert build_index(path) == tmp_path / "0.tar.index.safetensors"
    assert read_summary(path).num_samples == load_index(path).num_samples == 8
    empty = write_tar(tmp_path / "1.tar", [])
    build_index(empty)
    assert read_summary(empty).num_samples == load_index(empty).num_samples == 0
    assert {p.name for p in tmp_path.iterdir()} - {"cache_home"} == {
        "0.tar", "0.tar.index.safetensors", "1.tar", "1.tar.index.safetensors"
    }  # fmt: skip


def test_a_folder_that_must_not_be_written_stays_untouched(tmp_path, write_tar, own_cache):
    path = write_tar(tmp_path / "data" / "0.tar", list(pairs(3, random.Random(0))))
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        place = build_index(path)
        assert [p.name for p in path.parent.iterdir()] == ["0.tar"]
        assert own_cache in place.parents
        assert find_index(path) == place
        assert read_summary(path).num_samples == 3
    finally:
        path.parent.chmod(stat.S_IRWXU)


def test_shards_of_one_name_in_two_folders_have_indexes_of_their_own(
    tmp_path, write_tar, own_cache
):
    folders = [tmp_path / "a", tmp_path / "b"]
    for count, folder in enumerate(folders, start=1):
        write_tar(folder / "0.tar", list(pairs(count, random.Random(0))))
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        build_index(folder / "0.tar")
    try:
        assert [read_summary(folder / "0.tar").num_samples for folder in folders] == [1, 2]
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)


def test_a_damaged_or_foreign_index_is_refused(tmp_path, write_tar):
    path = write_tar(tmp_path / "0.tar", list(pairs(3, random.Random(0))))
    with pytest.raises(InputError, match=r"0\.tar has no index"):
        read_summary(path)
    index = build_index(path)
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(InputError, match=r"cannot be read .* --rebuild"):
        read_summary(path)
