"""Fine-tuning as users start it: several processes, interruptions, mistakes."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from frugal.common.cli import read_command_line
from frugal.common.errors import InputError
from frugal.common.train import train_recipe
from frugal.milan.transfer_recipes import FINE_TUNING
from support import (
    ALONE,
    kill_at_step,
    largest_difference,
    losses,
    metrics,
    saved_tensors,
    start,
    train,
    zero,
)  # fmt: skip

TOWER = (
    "--model.image.width=32", "--model.image.depth=2", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--data.workers=0", "--engine.precision=float32",
    "--run.log-every=1",
)  # fmt: skip
PRETRAIN = {
    "module": "frugal.milan.pretrain",
    "recipe": "demo-pixels",
    "small": (
        *TOWER, "--model.decoder.width=16", "--model.decoder.heads=2", "--batch-size=24",
        "--schedule.samples=96", "--schedule.warmup-samples=0",
    ),
}  # fmt: skip
FINE_TUNE = {
    "module": "frugal.milan.finetune",
    "small": (
        *TOWER, "--model.image.drop-path=0", "--batch-size=24", "--schedule.samples=288",
        "--schedule.warmup-samples=24", "--optimizer.learning-rate=2e-3",
        "--run.evaluate-every=4", "--run.save-every=5", "--objective.mixing.together=6",
    ),
}  # fmt: skip
"""The demo, small enough for seconds: 12 steps of 24 samples in float32, measured at 4, 8, 12."""
EVERYTHING = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def encoder(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("encoder") / "run"
    train(ALONE, run, f"--data.train={scenes / 'train'}", **PRETRAIN)
    return run


@pytest.fixture(scope="module")
def words(encoder: Path, scenes: Path) -> tuple[str, ...]:
    return (
        f"--run.start-from={encoder}", f"--data.train={scenes / 'zero_shot' / 'train'}",
        f"--evaluation.0.data={scenes}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    output = train(ALONE, run, *words, "--run.keep=20", **FINE_TUNE)
    assert "the encoder starts from" in output
    return run


def best_of(run: Path) -> dict:
    return json.loads((run / "checkpoints" / "best.json").read_text())


def test_a_run_learns_and_is_measured_as_it_goes(tuned: Path) -> None:
    lines = metrics(tuned)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["image_tokens"] == 17 for line in lines)
    numbers = json.loads((tuned / "evaluation" / "accuracy.json").read_text())
    assert numbers["step"] == 12
    assert numbers["accuracy_images"] == 112 and numbers["accuracy_classes"] == 64


def test_two_processes_of_zero_2_agree_with_one(
    tuned: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(zero(2), run, *words, **FINE_TUNE)
    expected = losses(tuned)
    assert losses(run) == {step: pytest.approx(loss, abs=1e-5) for step, loss in expected.items()}
    left, right = saved_tensors(tuned), saved_tensors(run)
    assert largest_difference(left, right) < 1e-5
    assert largest_difference(left, right, ("exp_avg", "exp_avg_sq")) < 1e-6
    mine, theirs = (
        json.loads((run / "evaluation/accuracy.json").read_text()) for run in (run, tuned)
    )
    assert mine == {name: pytest.approx(value, abs=1e-5) for name, value in theirs.items()}


def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(
    tuned: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(ALONE, run, *words, **FINE_TUNE)
    kill_at_step(process, run, random.Random().randint(3, 9), signal.SIGKILL)
    assert len(metrics(run)) < 12
    train(ALONE, run, *words, **FINE_TUNE)
    assert largest_difference(saved_tensors(tuned), saved_tensors(run), EVERYTHING) == 0.0
    assert losses(run) == losses(tuned)
    assert best_of(run) == best_of(tuned)
    again, before = (
        json.loads((run / "evaluation/accuracy.json").read_text()) for run in (run, tuned)
    )
    assert again == before


def test_a_finished_run_goes_on_at_another_size_from_its_best_checkpoint(
    tuned: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    best = tuned / "checkpoints" / "best.json"
    output = train(
        ALONE, tmp_path / "run", *words[1:], f"--run.start-from={best}", "--run.interpolate",
        "--model.image.image-size=40", "--schedule.samples=24", **FINE_TUNE,
    )  # fmt: skip
    assert "positions resampled from 4x4 to 5x5 patches" in output
    assert "with new weights" not in output


def tune(run: Path, *words: str) -> None:
    """The same in this process."""
    arguments = ["demo", *FINE_TUNE["small"], f"--run.dir={run}", "--engine.threads=1", *words]
    train_recipe(read_command_line(FINE_TUNING, program="test", arguments=arguments)[1])


def test_the_best_and_the_newest_checkpoint_stay(
    tuned: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    tune(tmp_path / "run", *words, "--run.keep=1", "--run.evaluate-every=1")
    kept = {folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step_*")}
    best = best_of(tmp_path / "run")
    assert kept == {"step_000000012", best["checkpoint"]}
    assert best["value"] >= best_of(tuned)["value"]


def test_an_evaluation_that_an_interruption_left_out_is_made_up_for(
    tuned: Path, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    # as if it had been killed between the checkpoint of step 8 and the evaluation behind it
    for step in (10, 12):
        shutil.rmtree(run / "checkpoints" / f"step_{step:09d}")
    (run / "checkpoints" / "latest").write_text("step_000000008\n")
    (run / "checkpoints" / "best.json").unlink()
    (run / "evaluation" / "accuracy.json").write_text('{"step": 4}')
    tune(run, *words, "--run.keep=20")
    output = capsys.readouterr().err
    assert "from step 8 of 12" in output
    assert [s for s in (4, 8, 12) if f"evaluation after step {s}:" in output] == [8, 12]
    assert best_of(run)["value"] <= best_of(tuned)["value"]


def test_images_without_class_folders_are_refused(
    words: tuple[str, ...], scenes: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(scenes / "compositional" / "images", flat)
    with pytest.raises(InputError, match="class"):
        tune(tmp_path / "run", words[0], f"--data.train={flat}", "--evaluation.0.data=None")


def test_other_classes_than_the_models_are_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged"):
        # labels that the model does not have are damage, and here all are
        tune(tmp_path / "run", *words[:2], "--evaluation.0.data=None", "--model.num-classes=2")
    with pytest.raises(InputError, match="num_classes is 0"):
        tune(tmp_path / "run", *words, "--model.num-classes=0")


def test_a_source_that_is_no_encoder_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not an image encoder"):
        tune(tmp_path / "run", *words[1:], f"--run.start-from={tmp_path / 'other.safetensors'}")
    with pytest.raises(InputError, match=r"needs an encoder.*--run\.start-from"):
        tune(tmp_path / "run", *words[1:])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--engine.cache-chunk=4",), r"engine\.cache_chunk"),
        (("--model.image.positions=sincos",), "choose learned"),
        (("--objective.from-scratch",), "choose one of them"),
        (("--run.best=top1", "--run.evaluate-every=1"), "run.best is 'top1'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    flags: tuple[str, ...], sentence: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        tune(tmp_path / "run", *words, *flags)
