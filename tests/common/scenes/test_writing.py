"""The files of the embedded data set: bytes, layouts, refusals."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frugal.common.scenes import (
    CLASSES,
    COLORS,
    HELD_OUT,
    SHAPES,
    Scene,
    Settings,
    class_names,
    draw,
    held_out,
    mask,
    write,
)
from frugal.common.scenes.__main__ import main
from support import command, cpu_seconds_of, run_code

pytestmark = pytest.mark.slow

SMALL = {
    "train_samples": 70,
    "zero_shot_samples": 2 * len(CLASSES) + 5,
    "probe_samples": len(CLASSES),
    "retrieval_samples": 40,
    "compositional_samples": 5,
    "image_size": 32,
    "shard_size": 30,
    "processes": 1,
}


def drawn(out: Path, **options) -> Path:
    write(Settings(out=out, **{**SMALL, **options}))
    return out


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("usual") / "scenes")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lossless pictures with masks."""
    return drawn(tmp_path_factory.mktemp("exact") / "scenes", format="png", masks=True)


def tree(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def samples(folder: Path) -> list[dict[str, bytes]]:
    """The members of every sample of a split, shard by shard, by extension."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar"), key=lambda path: int(path.stem)):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content
                found.setdefault(key, {})[extension] = content.read()
    return list(found.values())


def about(folder: Path) -> list[dict]:
    return [json.loads(sample["json"]) for sample in samples(folder)]


def without_key(folder: Path) -> list[dict]:
    return [{**one, "key": None} for one in about(folder)]


# ---------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(
    usual: Path, tmp_path: Path
) -> None:
    assert tree(drawn(tmp_path / "scenes", processes=3)) == tree(usual)


def test_another_seed_gives_other_scenes(usual: Path, tmp_path: Path) -> None:
    other = drawn(tmp_path / "scenes", seed=1)
    for split in ("train", "zero_shot/test", "retrieval/test"):
        pairs = zip(about(usual / split), about(other / split), strict=True)
        assert not any(a["scene"] == b["scene"] for a, b in pairs)


def test_sample_i_depends_on_no_size_of_picture_set_or_shard(usual: Path, tmp_path: Path) -> None:
    other = drawn(
        tmp_path / "scenes",
        image_size=48,
        shard_size=17,
        train_samples=101,
        zero_shot_samples=60,
        retrieval_samples=45,
    )
    for split in ("train", "zero_shot/test", "zero_shot/train", "retrieval/test"):
        compared = zip(without_key(usual / split), without_key(other / split), strict=False)
        pairs = [[(one["scene"], one["caption"]) for one in pair] for pair in compared]
        assert len(pairs) >= 40
        assert all(one == same for one, same in pairs)


def test_splits_share_no_scene(usual: Path) -> None:
    splits = ("train", "zero_shot/test", "zero_shot/train", "retrieval/test")
    found = [json.dumps(one["scene"]) for split in splits for one in about(usual / split)]
    for path in (usual / "compositional").glob("*.json"):
        found += [json.dumps(item["scene"]) for item in json.loads(path.read_text()).values()]
    assert len(set(found)) == len(found)


# ------------------------------------------------------------------------------------- contents


def test_the_json_of_a_sample_redraws_its_picture_and_mask(exact: Path) -> None:
    for split in ("train", "zero_shot/test", "retrieval/test"):
        for sample in samples(exact / split):
            one = json.loads(sample["json"])
            scene = Scene.from_json(one["scene"])
            picture = np.asarray(Image.open(io.BytesIO(sample["png"])))
            assert np.array_equal(picture, draw(scene, one["width"]))
            labels = np.asarray(Image.open(io.BytesIO(sample["mask.png"])))
            assert np.array_equal(labels, mask(scene, one["width"]))
            assert {1 + thing.label for thing in scene.things} | {0} == set(np.unique(labels))


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_lossy_pictures_stay_close_to_the_drawing(kind: str, tmp_path: Path) -> None:
    out = drawn(tmp_path / "scenes", format=kind, image_size=64, train_samples=20)
    for sample in samples(out / "train"):
        scene = Scene.from_json(json.loads(sample["json"])["scene"])
        picture = np.asarray(Image.open(io.BytesIO(sample[kind])).convert("RGB"), float)
        assert np.abs(picture - draw(scene, 64)).mean() < 10  # most of it noise


def test_held_out_classes_occur_in_the_test_classification_only(usual: Path) -> None:
    names = "|".join(f"{color} {shape}" for color, shape in HELD_OUT)
    found = about(usual / "train") + about(usual / "zero_shot/train")
    found += about(usual / "retrieval/test")
    for one in found:
        assert not HELD_OUT & {(thing["color"], thing["shape"]) for thing in one["scene"]["things"]}
        assert not re.search(names, one["caption"])
    for path in (usual / "compositional").glob("*.json"):
        assert not re.search(names, path.read_text())
    tested = [one["scene"]["things"][0] for one in about(usual / "zero_shot/test")]
    assert {(thing["color"], thing["shape"]) for thing in tested} == set(CLASSES)


def test_txt_and_json_hold_the_same_caption(usual: Path) -> None:
    for sample in samples(usual / "train"):
        assert json.loads(sample["json"])["caption"] == sample["txt"].decode()


def test_zero_shot_pictures_are_balanced_over_all_classes_and_labeled_truly(usual: Path) -> None:
    found = samples(usual / "zero_shot/test")
    labels = [int(sample["cls"]) for sample in found]
    counts = np.bincount(labels, minlength=len(CLASSES))
    assert counts.max() - counts.min() <= 1
    assert len(labels) == SMALL["zero_shot_samples"]
    for label, sample in zip(labels, found, strict=True):
        (thing,) = json.loads(sample["json"])["scene"]["things"]
        assert f"{thing['color']} {thing['shape']}" == class_names()[label]
    lines = (usual / "zero_shot/held_out.txt").read_text().split()
    assert [int(line) for line in lines] == held_out()


def test_no_retrieval_caption_fits_two_pictures(tmp_path: Path) -> None:
    out = drawn(tmp_path / "scenes", retrieval_samples=512, image_size=16)
    found = about(out / "retrieval/test")
    assert len(found) == 512
    named = [
        set(re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", one["caption"]))
        for one in found
    ]
    shown = [{(t["color"], t["shape"]) for t in one["scene"]["things"]} for one in found]
    for row, caption_things in enumerate(named):
        assert caption_things == shown[row]
        assert [i for i, things in enumerate(shown) if caption_things <= things] == [row]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_the_irrelevant_fraction_is_exact_and_changes_no_other_pair(
    fraction: float, usual: Path, tmp_path: Path
) -> None:
    out = drawn(tmp_path / "scenes", irrelevant=fraction, train_samples=53)
    found, usual_ones = without_key(out / "train"), without_key(usual / "train")
    irrelevant = [one for one in found if not one["relevant"]]
    assert abs(len(irrelevant) - 53 * fraction) <= 0.5
    for one, before in zip(found, usual_ones, strict=False):
        assert one == before or not one["relevant"]
    for one in irrelevant:
        assert "scene" not in one
        assert not re.search("|".join((*COLORS, *SHAPES)), one["caption"])
    assert all(one["relevant"] for one in about(out / "zero_shot/test"))


def test_masks_of_irrelevant_pictures_are_empty(tmp_path: Path) -> None:
    out = drawn(tmp_path / "scenes", irrelevant=1.0, masks=True, train_samples=3)
    for sample in samples(out / "train"):
        assert not np.asarray(Image.open(io.BytesIO(sample["mask.png"]))).any()


def test_long_captions_lengthen_the_training_captions_only(usual: Path, tmp_path: Path) -> None:
    out = drawn(tmp_path / "scenes", long_captions=True)
    for one, before in zip(about(out / "train"), about(usual / "train"), strict=True):
        assert one["scene"] == before["scene"]
        assert len(one["caption"].split()) >= 20
    assert about(out / "retrieval/test") == about(usual / "retrieval/test")


# -------------------------------------------------------------------------------------- layouts


def test_training_shards_are_img2dataset_ones(usual: Path) -> None:
    shards = sorted((usual / "train").iterdir())
    assert [path.name for path in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(shards[1]) as tar:
        names = tar.getnames()
    keys = [f"00001{number:04d}" for number in range(30)]
    assert names == [f"{key}.{extension}" for key in keys for extension in ("jpg", "txt", "json")]


def test_webdataset_reads_the_training_shards(exact: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pattern = str(exact / "train" / "{00000..00002}.tar")
    found = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("pil"))
    assert len(found) == SMALL["train_samples"]
    assert {one["png"].size for one in found} == {(32, 32)}
    assert all(one["txt"] == one["json"]["caption"] for one in found)
    assert all(one["mask.png"].size == (32, 32) for one in found)


@pytest.mark.parametrize("which", ["usual", "exact"])
def test_clip_benchmark_reads_the_evaluation_sets(
    which: str, request: pytest.FixtureRequest
) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    folder = request.getfixturevalue(which)
    build = builder.build_wds_dataset
    zero_shot = build("scenes", np.asarray, split="test", data_dir=str(folder / "zero_shot"))
    assert zero_shot.classes == class_names()
    assert {"{c}" in template for template in zero_shot.templates} == {True}
    found = list(zero_shot)
    assert len(found) == SMALL["zero_shot_samples"]
    assert {picture.shape for picture, _ in found} == {(32, 32, 3)}
    assert {label for _, label in found} == set(range(len(CLASSES)))
    probe = build("scenes", np.asarray, split="train", data_dir=str(folder / "zero_shot"))
    assert {label for _, label in probe} == set(range(len(CLASSES))) - set(held_out())
    retrieval = build("scenes", np.asarray, split="test", data_dir=str(folder / "retrieval"))
    texts = [captions for _, captions in retrieval]
    assert len(texts) == SMALL["retrieval_samples"]
    assert all(len(captions) == 1 for captions in texts)


def test_clip_benchmark_reads_the_compositional_items(usual: Path) -> None:
    sugar_crepe = pytest.importorskip("clip_benchmark.datasets.sugar_crepe")
    root = usual / "compositional"
    kinds = {path.stem for path in root.glob("*.json")}
    assert kinds == {
        "swap_obj", "swap_att", "replace_obj", "replace_att", "replace_rel", "add_obj", "add_att"
    }  # fmt: skip
    for kind in kinds:
        items = sugar_crepe.SugarCrepe(str(root / "images"), str(root / f"{kind}.json"))
        assert len(items) == SMALL["compositional_samples"]
        for number in range(len(items)):
            picture, (caption, negative) = items[number]
            assert picture.size == (32, 32)
            assert caption != negative


def test_the_information_file_names_the_world(usual: Path) -> None:
    information = json.loads((usual / "scenes.json").read_text())
    assert information["class_names"] == class_names()
    assert information["held_out"] == held_out()
    settings = information["settings"]
    assert {name: settings[name] for name in SMALL if name != "processes"} == {
        name: value for name, value in SMALL.items() if name != "processes"
    }
    assert settings["seed"] == 0


def test_a_set_of_no_samples_is_left_out(tmp_path: Path) -> None:
    names = ("train", "zero_shot", "probe", "compositional")
    out = drawn(tmp_path / "scenes", **{f"{name}_samples": 0 for name in names})
    assert {path.name for path in out.iterdir()} == {"retrieval", "scenes.json"}


# --------------------------------------------------------------------------------- command line


def arguments(out: Path, *more: str) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return ["--out", str(out), *flags, *more]


def test_the_second_time_nothing_is_done(
    usual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scenes"
    assert main(arguments(out)) == 0
    assert "drew" in capsys.readouterr().out
    assert tree(out) == tree(usual)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(arguments(out, "--processes=2")) == 0
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_interrupted_drawing_is_finished_by_the_same_command(
    usual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = drawn(tmp_path / "scenes")
    (out / "scenes.json").rename(out / "scenes.json.unfinished")
    (out / "train" / "00001.tar").write_bytes(b"half a shard")
    (out / "retrieval" / "test" / "0.tar").unlink()
    assert main(arguments(out, "--seed=5")) == 2
    assert "seed = 0, not 5" in capsys.readouterr().err
    assert main(arguments(out)) == 0
    assert tree(out) == tree(usual)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size=15"], "--image-size is 15"),
        (["--irrelevant=1.5"], "--irrelevant is 1.5"),
        (["--irrelevant=-0.1"], "--irrelevant is -0.1"),
        (["--irrelevant=nan"], "--irrelevant is nan"),
        (["--processes=0"], "--processes is 0"),
        (["--shard-size=0"], "--shard-size is 0"),
        (["--shard-size=10001"], "--shard-size is 10001"),
        (["--train-samples=-1"], "--train-samples is -1"),
        (["--retrieval-samples=5000"], "--retrieval-samples is 5000"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_sentence(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "scenes", *more)) == 2
    written = capsys.readouterr()
    assert written.err.startswith(f"error: {message}")
    assert written.err.count("\n") == 1
    assert not written.out
    assert not (tmp_path / "scenes").exists()


def fill_with_other_settings(out: Path) -> None:
    drawn(out, seed=3)


def fill_with_strange_files(out: Path) -> None:
    out.mkdir()
    (out / "letters.txt").write_text("dear")


def fill_with_damaged_information(out: Path) -> None:
    drawn(out)
    (out / "scenes.json").write_text('{"settings"')


def fill_with_no_information(out: Path) -> None:
    drawn(out)
    (out / "scenes.json").write_text("[]")


def fill_with_information_of_another_shape(out: Path) -> None:
    drawn(out)
    (out / "scenes.json").write_text('{"settings": 3}')


def fill_with_a_file(out: Path) -> None:
    out.write_text("a file")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (fill_with_other_settings, "was drawn with seed = 3, not 0"),
        (fill_with_strange_files, "holds files that are not a drawn data set"),
        (fill_with_damaged_information, "cannot be read"),
        (fill_with_no_information, "cannot be read"),
        (fill_with_information_of_another_shape, "cannot be read"),
        (fill_with_a_file, "is a file"),
    ],
)
def test_what_stands_in_the_output_folder_is_never_overwritten(
    fill, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "scenes")
    before = tree(tmp_path)
    assert main(arguments(tmp_path / "scenes")) == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1
    assert tree(tmp_path) == before


def test_an_output_folder_below_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path / "file" / "scenes")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_help_answers_as_soon_as_torch_is_there_and_without_transformers() -> None:
    torch_alone, _ = cpu_seconds_of("-c", "import torch")
    seconds, said = cpu_seconds_of("-m", "frugal.common.scenes", "--help")
    assert seconds - torch_alone < 1
    for flag in ("--out", "--seed", "--image-size", "--irrelevant", "--long-captions", "--masks"):
        assert flag in said
    heavy = "import sys, frugal.common.scenes as s; sys.exit('transformers' in sys.modules)"
    assert run_code(heavy).returncode == 0


def test_the_command_ends_with_two_and_no_trace_on_a_mistake(tmp_path: Path) -> None:
    for words in (["--out", str(tmp_path / "a"), "--image-size", "3"], ["--no-such-flag"], []):
        answer = command("frugal.common.scenes", *words, expect=2)
        assert "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())
