"""A user's mistake: one sentence, exit code 2, no stack trace, nothing overwritten."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from support import ALONE, ROOT, deepspeed, newest, train


def refused(*words: str, run: Path, launcher=ALONE, recipe: str = "demo", code: int = 2) -> str:
    """The one sentence a mistake gets."""
    before = listing(run)
    output = train(launcher, run, *words, recipe=recipe, expect=code)
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output[-3000:]
    assert listing(run) == before, "something was written"
    return errors[0]


def listing(folder: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def data(scenes: Path) -> str:
    return f"--data.train={scenes / 'train'}"


def test_a_missing_data_pattern(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "{00000..00003}.tar"
    assert str(tmp_path / "nowhere") in refused(f"--data.train={missing}", run=tmp_path / "run")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(f"--data.train={tmp_path / 'empty'}", run=tmp_path / "run")


def test_no_data_at_all(tmp_path: Path) -> None:
    words = ("--data.train",)
    assert "data.train" in refused(*words, run=tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + b"\0" * 600])
def test_an_unreadable_shard(content: bytes, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    shard.write_bytes(content)
    assert str(shard) in refused(f"--data.train={shard}", run=tmp_path / "run")


def test_a_shard_that_was_cut_after_it_was_indexed(scenes: Path, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    shutil.copy(scenes / "train" / "00000.tar", shard)
    words = (f"--data.train={shard}", "--schedule.samples=48")
    train(ALONE, tmp_path / "first", *words)
    with tarfile.open(shard) as archive:
        boundary = archive.getmembers()[6].offset
    shard.write_bytes(shard.read_bytes()[:boundary])
    assert str(shard) in refused(*words, run=tmp_path / "second")


def test_an_image_smaller_than_a_patch(data: str, tmp_path: Path) -> None:
    words = (data, "--model.image.image-size=4")
    assert "smaller than a patch" in refused(*words, run=tmp_path / "run")


def test_an_image_size_that_is_no_multiple_of_the_patch(data: str, tmp_path: Path) -> None:
    words = (data, "--model.image.image-size=30")
    assert "not a multiple" in refused(*words, run=tmp_path / "run")


def test_a_mask_ratio_that_keeps_nothing(data: str, tmp_path: Path) -> None:
    words = (data, "--reduction.image.mask-ratio=0.99")
    assert "0.99" in refused(*words, run=tmp_path / "run")


def test_a_batch_that_the_processes_do_not_divide(data: str, tmp_path: Path) -> None:
    sentence = refused(data, "--batch-size=25", run=tmp_path / "run", launcher=deepspeed(2))
    assert "batch_size 25 does not divide among 2 processes" in sentence


def test_an_unknown_recipe(tmp_path: Path) -> None:
    assert "no recipe 'base16'" in refused(run=tmp_path / "run", recipe="base16")


def test_an_unknown_flag(tmp_path: Path) -> None:
    output = train(ALONE, tmp_path / "run", "--mask-ration=0.5", expect=2)
    assert "Traceback" not in output
    assert "--mask-ration" in output
    assert not (tmp_path / "run").exists()


def test_resuming_into_another_recipe(data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(ALONE, run, data, "--schedule.samples=48")
    sentence = refused(data, "--schedule.samples=48", "--model.embed-dim=24", run=run)
    assert "model.embed_dim was 16 and is now 24" in sentence


def test_starting_from_another_architecture(data: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    train(ALONE, source, data, "--schedule.samples=48")
    sentence = refused(
        data, "--model.image.depth=2", f"--run.start-from={source}", run=tmp_path / "run"
    )
    assert str(source) in sentence
    sentence = refused(
        data, "--model.image.image-size=48", f"--run.start-from={source}", run=tmp_path / "run"
    )
    assert "--run.interpolate" in sentence


def test_starting_from_nothing(data: str, tmp_path: Path) -> None:
    words = (data, f"--run.start-from={tmp_path / 'nothing'}")
    said = refused(*words, run=tmp_path / "run")
    assert f"{tmp_path / 'nothing'} does not exist; give a run directory" in said
    (tmp_path / "nothing").mkdir()
    assert "no checkpoint" in refused(*words, run=tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_batch_size": 17}, "train_batch_size to 17"),
        ({"gradient_clipping": 0.3}, "gradient_clipping to 0.3"),
        ({"bf16": {"enabled": True}}, "engine.precision"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe(
    content: dict, said: str, data: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}} | content))
    words = (data, f"--engine.deepspeed-config={file}")
    sentence = refused(*words, run=tmp_path / "run")
    assert said in sentence
    assert str(file) in sentence


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_deepspeed_file_that_is_none(content: str | None, data: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    words = (data, f"--engine.deepspeed-config={file}")
    assert str(file) in refused(*words, run=tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(
    data: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(ALONE, run, data, "--schedule.samples=48")
    file = next(run.rglob("tensors-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    assert str(file) in refused(data, "--schedule.samples=48", run=run)


def test_evaluation_data_that_is_not_there(data: str, tmp_path: Path) -> None:
    words = (data, f"--evaluation.0.data={tmp_path / 'nothing'}")
    assert str(tmp_path / "nothing") in refused(*words, run=tmp_path / "run")


def test_a_gpu_that_is_not_there(data: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    sentence = refused(data, "--engine.device=cuda", run=tmp_path / "run")
    assert "no CUDA device" in sentence


def test_the_ready_files_for_deepspeed_suit_every_recipe() -> None:
    from frugal.common.engine.deepspeed import fill_config
    from frugal.flip.recipes import RECIPES

    for file in sorted((ROOT / "ds_configs").glob("*.json")):
        for make in RECIPES.values():
            filled = fill_config(file, make(), 2)
            assert "auto" not in json.dumps(filled), file.name


def test_data_that_changed_behind_a_run(scenes: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for shard in sorted((scenes / "train").glob("*.tar"))[:2]:
        shutil.copy(shard, data / shard.name)
    words = (f"--data.train={data}", "--schedule.samples=48", "--run.save-every=1")
    train(ALONE, run, *words)
    shutil.rmtree(newest(run))  # so that a step is left to do
    shutil.copy(data / "00000.tar", data / "00002.tar")
    sentence = refused(*words, run=run)
    assert "data.train[0]: 1 new (00002.tar)" in sentence
    output = train(ALONE, run, *words, "--run.allow-changed-data")
    assert "the data have changed since the run began" in output
    assert "continuing" in output and newest(run).name.endswith("2")
