import json
import tarfile

import pytest
import webdataset

from frugal.common import shards
from frugal.common.data.stores.index import find_index, read_summary
from support import cpu_seconds_of, run_code


def run(capsys, *words):
    code = shards.main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def test_help_answers_at_once_and_needs_nothing_slower_than_torch():
    torch_alone, _ = cpu_seconds_of("-c", "import torch")
    seconds, said = cpu_seconds_of("-m", "frugal.common.shards", "--help")
    assert seconds - torch_alone < 2
    assert all(word in said for word in ("index", "check", "convert"))
    check = (
        "import sys, frugal.common.shards;"
        "heavy = {'deepspeed', 'transformers', 'accelerate', 'open_clip', 'timm', 'nltk'};"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    run_code(check).check_returncode()


def test_index_builds_what_is_missing_with_several_processes(tmp_path, write_pairs, capsys):
    paths = write_pairs(tmp_path / "d", [3, 1, 4, 2])
    code, out, _ = run(capsys, "index", tmp_path / "d", "--processes", 2)
    assert code == 0 and "indexed 4 of 4 shards" in out and "10 samples" in out
    assert [read_summary(path).num_samples for path in paths] == [3, 1, 4, 2]
    code, out, _ = run(capsys, "index", tmp_path / "d" / "{00000..00003}.tar")
    assert code == 0 and "indexed 0 of 4 shards" in out


def test_index_tells_of_every_shard_that_cannot_be_indexed(tmp_path, write_pairs, capsys):
    paths = write_pairs(tmp_path / "d", [3, 1, 4])
    paths[0].write_bytes(b"")
    paths[2].write_bytes(b"no tar" * 200)
    code, out, err = run(capsys, "index", tmp_path / "d")
    assert code == 2
    assert "indexed 1 of 3" in out and "1 samples" in out
    assert f"error: {paths[0]} is empty" in err and f"error: {paths[2]} is not a tar" in err


def test_a_replaced_shard_needs_a_rebuild(tmp_path, write_pairs, capsys):
    paths = write_pairs(tmp_path / "d", [3, 3])
    run(capsys, "index", tmp_path / "d")
    write_pairs(tmp_path / "d", [30])
    code, _, err = run(capsys, "index", tmp_path / "d")
    assert code == 2 and "--rebuild" in err and str(paths[0]) in err
    code, out, _ = run(capsys, "index", "--rebuild", tmp_path / "d")
    assert code == 0 and "indexed 2 of 2" in out and "33 samples" in out


def test_check_says_what_a_set_contains(tmp_path, write_tar, pair, capsys):
    members = [*pair(0, ["a", "b"]), *pair(1), *pair(2), ("x.png", pair(3)[0][1])]
    members += pair(4)
    path = write_tar(tmp_path / "d" / "0.tar", members)
    code, out, _ = run(capsys, "check", path, "--decode", "all")
    assert code == 1
    assert f"5 samples, {path.stat().st_size:,} bytes" in out
    assert "members: jpg 4, json 4, png 1, txt 4" in out
    assert "captions per image: 0 (1), 1 (3), 2 (1)" in out
    assert "width at 0/5/50/95/100 %: 24/24/26/28/28" in out
    assert "decoded 5 images" in out and "damage: no caption 1" in out


def test_check_decodes_a_spread_of_images(tmp_path, write_pairs, capsys):
    write_pairs(tmp_path / "d", [10, 10])
    code, out, _ = run(capsys, "check", tmp_path / "d", "--decode", 4)
    assert code == 0 and "decoded 4 images" in out and "20 samples" in out


def test_check_finds_every_kind_of_damage(tmp_path, write_pairs, write_tar, pair, capsys):
    paths = write_pairs(tmp_path / "d", [5, 5, 5, 5])
    run(capsys, "index", tmp_path / "d")
    with tarfile.open(paths[0]) as archive:
        place = archive.getmembers()[4].offset_data
    content = bytearray(paths[0].read_bytes())
    content[place] ^= 1  # of the JSON of sample 1, which is not read in training
    paths[0].write_bytes(content)
    find_index(paths[1]).unlink()
    paths[1].write_bytes(paths[1].read_bytes().rstrip(b"\0"))
    find_index(paths[2]).unlink()
    paths[2].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:4096])
    write_tar(tmp_path / "d" / "00004.tar", [("0.jpg", pair(0)[0][1][:200]), ("0.txt", b"a")])
    code, out, _ = run(capsys, "check", tmp_path / "d")
    assert code == 1
    assert "damage: checksum 1, image 1, shard 3, truncated 1" in out
    assert f"{paths[0]}/000000001: checksum" in out
    assert f"{paths[1]} is damaged or cut off" in out
    assert f"{paths[2]} is empty" in out
    assert f"{paths[3]} has 4096 bytes but had" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["check", "/no/such/place"], "does not exist"),
        (["index"], "no shards are given"),
        (["index", ".", "--processes", "0"], "holds no data"),
        (["convert", "/no/such/place", "--out", "x"], "does not exist"),
    ],
)
def test_mistakes_end_with_one_sentence(tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        shards.main(["check", "--no-such-flag"])
    assert caught.value.code == 2


def test_class_folders_and_lists_become_shards(tmp_path, make_picture, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "f" / name).mkdir(parents=True)
        for number in range(3):
            make_picture(number).save(tmp_path / "f" / name / f"{number}.png")
    make_picture(9).save(tmp_path / "f" / "dog" / "9.bmp")
    (tmp_path / "f" / "dog" / "broken.jpg").write_bytes(b"x")
    csv = tmp_path / "a.csv"
    csv.write_text("filepath,title\nf/cat/0.png,a drawn cat\nf/dog/9.bmp,a bitmap\n")
    words = ["convert", tmp_path / "f", csv, "--out", tmp_path / "out", "--samples-per-shard", 3]
    code, out, _ = run(capsys, *words)
    assert code == 1 and "wrote 9 samples in 3 shards" in out and "left out: image 1" in out
    samples = list(
        webdataset.WebDataset(f"{tmp_path}/out/{{00000..00002}}.tar", shardshuffle=False).decode()
    )
    assert [s["__key__"] for s in samples] == [
        f"{shard:05d}{number:04d}" for shard in range(3) for number in range(3)
    ]
    assert [s.get("cls") for s in samples] == [0, 0, 0, 1, 1, 1, 1, None, None]
    assert [s["txt"] for s in samples][3:] == ["a photo of a dog."] * 4 + [
        "a drawn cat",
        "a bitmap",
    ]
    assert samples[7]["png"] is not None and samples[8]["json"]["caption"] == "a bitmap"
    assert samples[7]["json"]["source"] == str(tmp_path / "f" / "cat" / "0.png")
    assert read_summary(tmp_path / "out" / "00002.tar").num_samples == 3
    assert not list((tmp_path / "out").glob("*.unfinished"))
    code, _, err = run(capsys, *words)
    assert code == 2 and "there already" in err


def test_conversion_keeps_captions_and_bytes(tmp_path, write_tar, pair, capsys, open_stream):
    path = write_tar(tmp_path / "d" / "0.tar", [*pair(0, ["w5", "w6"]), *pair(1)])
    code, _, _ = run(capsys, "convert", path, "--out", tmp_path / "out")
    assert code == 0
    first, second = webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False)
    assert first["jpg"] == pair(0)[0][1] and second["jpg"] == pair(1)[0][1]
    assert json.loads(first["json"])["captions"] == ["w5", "w6"]
    assert json.loads(second["json"])["caption"] == second["txt"].decode() == "w1 w1 w2"
    batch = next(iter(open_stream(tmp_path / "out", batch_size=64)))
    assert set(batch.token_ids[:, 0].tolist()) == {8, 9, 4}


@pytest.mark.parametrize("joined", ["end", "cut"])
def test_check_never_says_that_joined_tars_are_sound(tmp_path, write_pairs, capsys, joined):
    (path,) = write_pairs(tmp_path / "d", [4])
    content = path.read_bytes()
    path.write_bytes((content if joined == "end" else content.rstrip(b"\0")) + content)
    if joined == "cut":  # the last member is filled up to its block, as tar does
        body = content.rstrip(b"\0")
        path.write_bytes(body + bytes(-len(body) % 512) + content)
    code, out, _ = run(capsys, "check", path)
    assert code == 1 and "8 samples" in out and "repeated key 4" in out
    assert ("behind the end-of-archive marker" in out) == (joined == "end")


def test_check_tells_what_is_left_out_of_every_shard(
    tmp_path, write_pairs, write_tar, pair, capsys
):
    write_pairs(tmp_path / "d", [3])
    hidden = [(f".{name}", content) for name, content in pair(7)]
    lone = [("9.txt", b"w1")]
    path = write_tar(tmp_path / "d" / "00001.tar", [*pair(5), *hidden, *lone])
    code, out, _ = run(capsys, "check", tmp_path / "d")
    assert code == 1 and "damage: no image 1" in out
    assert f"3 passed over: hidden members, whose names begin with a dot ({path}/.000000007" in out
    assert f"{path}: 1 of 2 samples sound, damage: no image 1, 3 members passed over" in out
    code, out, _ = run(capsys, "convert", tmp_path / "d", "--out", tmp_path / "out")
    assert code == 1 and "wrote 4 samples in 1 shards" in out
    assert "left out: no image 1 (of 5 samples in 2 shards)" in out and "3 passed over" in out


def test_check_reads_pipes(tmp_path, write_pairs, capsys):
    paths = write_pairs(tmp_path / "d", [3, 5])
    words = ["check", f"pipe:cat {tmp_path}/d/{{00000,00001}}.tar", "--decode", "all"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and "8 samples" in out and "decoded 8 images" in out
    assert "members: jpg 8, json 8, txt 8" in out and "damage: none" in out
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    code, out, _ = run(capsys, *words)
    assert code == 1 and "truncated 1" in out
    code, _, err = run(capsys, "convert", words[1], "--out", tmp_path / "out")
    assert code == 2 and "can only be read from its beginning on" in err


def test_a_shard_of_another_content_and_equal_size_points_to_rebuild(tmp_path, write_tar, capsys):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"a" * 40), ("0.txt", b"w1")])
    run(capsys, "index", path)
    write_tar(path, [("0.jpg", b"b" * 40), ("0.txt", b"w2")])
    code, out, _ = run(capsys, "check", path)
    assert code == 1 and "damage: checksum 1" in out and "index --rebuild" in out


def test_index_renews_what_an_earlier_version_wrote(tmp_path, write_pairs, old_index, capsys):
    (path,) = write_pairs(tmp_path / "d", [2])
    with tarfile.open(path) as archive:
        names = archive.getnames()
    old_index(path, names=names, checksums=[0] * len(names))
    code, out, _ = run(capsys, "index", tmp_path / "d")
    assert code == 0 and "indexed 1 of 1 shards" in out and "2 samples" in out
