"""Segmentation as users start it: several processes, interruptions, mistakes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from frugal.common.cli import read_command_line
from frugal.common.errors import InputError
from frugal.common.train import train_recipe
from frugal.common.weights.image_towers import read_encoder
from frugal.milan.segmentation_recipes import SEGMENTATION
from support import (
    ALONE,
    DDP,
    Launcher,
    command,
    largest_difference,
    losses,
    metrics,
    newest,
    run_code,
    saved_tensors,
    train,
    zero,
)

SEGMENT = {
    "module": "frugal.milan.segment",
    "small": (
        "--model.image.width=16", "--model.image.heads=2", "--model.image.mlp-width=32",
        "--model.image.image-size=32", "--model.width=16", "--model.auxiliary-width=16",
        "--model.image.drop-path=0", "--model.dropout=0", "--optimizer.learning-rate=1e-2",
        "--objective.from-scratch", "--data.workers=0", "--engine.precision=float32",
        "--run.log-every=1", "--batch-size=8", "--schedule.samples=80",
        "--schedule.warmup-samples=16", "--run.save-every=4", "--run.evaluate-every=4",
    ),
}  # fmt: skip
"""The demo, small enough for seconds: 10 steps of 8 samples in float32."""
EVERYTHING = ("weight", "exp_avg", "exp_avg_sq", "buffer")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with masks of their pixels, and nothing else."""
    folder = tmp_path_factory.mktemp("masked") / "scenes"
    words = [
        "frugal.common.scenes", "--out", folder, "--image-size", "32",
        "--train-samples", "0", "--zero-shot-samples", "0", "--probe-samples", "0",
        "--retrieval-samples", "0", "--compositional-samples", "0", "--segmentation-samples", "50",
        "--processes", "1",
    ]  # fmt: skip
    command(*words)
    damaged = folder / "segmentation" / "images" / "training" / "00000007.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def words(masked: Path) -> tuple[str, ...]:
    return (f"--data.train={masked}", f"--evaluation.0.data={masked}")


@pytest.fixture(scope="module")
def trained(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(ALONE, run, *words, **SEGMENT)
    return run


def measured(run: Path) -> dict:
    return json.loads((run / "evaluation" / "segmentation.json").read_text())


def test_a_run_learns_says_what_it_sees_and_keeps_its_best(trained: Path) -> None:
    lines = metrics(trained)
    assert lines[0]["loss"] == pytest.approx(1.4 * math.log(65), rel=0.02)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["main_loss"] + 0.4 * line["auxiliary_loss"])
        assert line["image_tokens"] == 17
    assert lines[-1]["read_samples"] == 80
    assert lines[-1]["damaged"] == {"image": 80 - lines[-1]["trained_samples"]}
    assert lines[-1]["damaged"]["image"] in (1, 2)
    numbers = measured(trained)
    assert numbers["step"] == 10
    assert numbers["segmentation_images"] == 13
    assert 0 < numbers["segmentation_miou"] < numbers["segmentation_pixel_accuracy"] < 1
    best = json.loads((trained / "checkpoints" / "best.json").read_text())
    assert best["number"] == "segmentation_miou"
    assert best["value"] >= numbers["segmentation_miou"]
    board = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert "batch" in board.Tags()["images"]
    assert len([n for n in board.Tags()["images"] if n.startswith("evaluation/")]) == 4
    assert "evaluation/segmentation_miou" in board.Tags()["scalars"]


GENTLY = "--optimizer.learning-rate=2e-5"
"""At the demo's rate ten steps of Adam make differences of a percent out of rounding."""


@pytest.fixture(scope="module")
def gently_trained(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("gently") / "run"
    train(ALONE, run, *words, GENTLY, **SEGMENT)
    return run


@pytest.mark.parametrize("launcher", [DDP, zero(2)], ids=lambda launcher: launcher.name)
def test_processes_agree_on_losses_weights_batch_norms_and_measures(
    launcher: Launcher, gently_trained: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    trained, run = gently_trained, tmp_path / "run"
    train(launcher, run, *words, GENTLY, **SEGMENT)
    expected, found = losses(trained), losses(run)
    assert list(found) == list(range(1, 11)) == list(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=2e-4)
    left, right = saved_tensors(trained), saved_tensors(run)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if name.startswith(("weight/", "buffer/")):
            assert torch.allclose(tensor, right[name], rtol=1e-3, atol=3e-4), name
    for mine, theirs in zip(metrics(run), metrics(trained), strict=True):
        assert mine["damaged"] == theirs["damaged"]
        assert mine["pixel_accuracy"] == pytest.approx(theirs["pixel_accuracy"], abs=2e-3)
    mine, theirs = measured(run), measured(trained)
    assert mine["segmentation_miou"] == pytest.approx(theirs["segmentation_miou"], abs=2e-3)
    assert mine["segmentation_images"] == theirs["segmentation_images"]


def test_a_run_that_is_continued_ends_where_it_would_have_ended(
    trained: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(newest(run))
    step = next(path for path in (run / "checkpoints").glob("step_*8"))
    (run / "checkpoints" / "latest").write_text(step.name + "\n")
    train(ALONE, run, *words, **SEGMENT)
    left, right = saved_tensors(trained), saved_tensors(run)
    assert largest_difference(left, right, EVERYTHING) == 0
    assert measured(run)["segmentation_miou"] == measured(trained)["segmentation_miou"]


def test_the_measure_of_a_checkpoint_is_the_same_on_any_number_of_processes(
    trained: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "evaluation")
    train(DDP, run, *words, **SEGMENT)  # complete: nothing is left but to measure
    assert measured(run) == measured(trained)
    table = "evaluation/segmentation_classes.csv"
    assert (run / table).read_text() == (trained / table).read_text()


def test_an_encoder_comes_out_and_goes_into_another_run(
    trained: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    encoder = read_encoder(trained)
    assert encoder.missing() == ["norm.bias", "norm.weight"]
    run = tmp_path / "run"
    small = [word for word in SEGMENT["small"] if word != "--objective.from-scratch"]
    output = train(
        ALONE, run, *words, f"--run.start-from={trained}", "--schedule.samples=16",
        "--optimizer.learning-rate=1e-12", "--data.max-damaged=0.5",
        module="frugal.milan.segment", small=small,
    )  # fmt: skip
    assert "the encoder starts from" in output
    tensors = saved_tensors(run)
    for name, tensor in encoder.state.items():
        assert torch.allclose(tensors[f"weight/model.image.{name}"], tensor, atol=1e-8)


MISTAKES = {
    "needs an encoder: give a pretraining run": ["--objective.no-from-scratch"],
    "not an image encoder of a known kind": [
        "--objective.no-from-scratch", "--run.start-from={masked}/other.safetensors"
    ],
    "not laid out as ADE20K": ["--data.train", "{masked}/segmentation/images"],
    "names 65 classes": ["--model.num-classes=64"],
    "end at the last block": ["--model.image.depth=5"],
    "does not exist; check the path": ["--evaluation.0.data={masked}/nowhere"],
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_on_the_command_line_is_answered_by_a_sentence(
    sentence: str, masked: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    save_file({"layer.weight": torch.zeros(3)}, masked / "other.safetensors")
    mistake = [word.format(masked=masked) for word in MISTAKES[sentence]]
    arguments = ["demo", *SEGMENT["small"], *words, *mistake, "--engine.threads=1"]
    with pytest.raises(InputError, match=sentence):
        _, recipe = read_command_line(SEGMENTATION, program="segment", arguments=arguments)
        train_recipe(replace(recipe, run=replace(recipe.run, dir=tmp_path / "run")))


def test_help_and_recipes_need_nothing_slower_than_torch() -> None:
    check = (
        "import sys; from frugal.milan.segmentation_recipes import SEGMENTATION as m;"
        "[make() for make in m.values()];"
        "sys.exit(' '.join({'transformers', 'timm'} & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr
