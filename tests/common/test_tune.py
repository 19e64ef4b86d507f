"""A model tuned on pairs of one's own."""

import json
from pathlib import Path

import pytest

from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.errors import InputError
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import load_recipe
from frugal.common.tune import batch_for, epochs_for, rate_for, tuned_recipe
from frugal.common.weights.load import load_model
from frugal.common.weights.save import save_model
from support import command, losses, metrics

QUICK = ("--data.workers", "0", "--engine.precision", "float32", "--engine.device", "cpu")


def test_batches_epochs_and_rates_follow_the_rules() -> None:
    pairs = (1, 500, 1_850, 5_120, 20_000, 100_000, 1_000_000, 12_000_000)
    assert [batch_for(count) for count in pairs] == [2, 64, 64, 128, 256, 1024, 1024, 1024]
    # no pair comes twice in a batch
    assert [batch_for(count) for count in (2, 3, 10, 63, 64)] == [2, 2, 8, 32, 64]
    assert [epochs_for(count) for count in pairs] == [10, 10, 10, 10, 5, 5, 2, 1]
    assert rate_for(256, 768) == 2e-5
    assert rate_for(256, 32) == 1e-3 and rate_for(1024, 768) == 4e-5 and rate_for(256, 384) == 8e-5


@pytest.fixture(scope="module")
def tuned(alone: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    said = command(
        "frugal.common.tune", alone, "--data.train", scenes / "train",
        "--evaluation.0.data", scenes, "--run.dir", run, *QUICK, "--schedule.samples", "384",
    ).stderr  # fmt: skip
    assert "150 pairs: batches of 64, 2.6 epochs, learning rate 0.001 at its peak" in said
    return run


def test_a_run_starts_from_the_model_and_keeps_the_best_checkpoint(
    alone: Path, tuned: Path
) -> None:
    recipe = load_recipe(tuned / "recipe.json")
    assert recipe.run.start_from == alone and recipe.model == load_model(alone).config
    assert list(losses(tuned)) == list(range(1, 7))
    measured = [line for line in metrics(tuned) if "retrieval_candidates" in json.dumps(line)]
    assert measured or (tuned / "evaluation" / "retrieval.json").is_file()
    best = find_checkpoint(tuned / "checkpoints" / "best.json")
    assert best.step in (3, 6)


def test_the_same_command_finds_it_complete(alone: Path, scenes: Path, tuned: Path) -> None:
    said = command(
        "frugal.common.tune", alone, "--data.train", scenes / "train",
        "--evaluation.0.data", scenes, "--run.dir", tuned, *QUICK, "--schedule.samples", "384",
    ).stderr  # fmt: skip
    assert "is complete (6 steps); nothing left to train" in said


def recipe_of(*words: object) -> Recipe:
    return tuned_recipe([str(word) for word in words])


def test_flags_win_over_rules_and_rules_follow_flags(
    alone: Path, scenes: Path, tmp_path: Path
) -> None:
    data = ("--data.train", scenes / "train")
    recipe = recipe_of(alone, *data, "--batch-size", "30", "--optimizer.layer-decay", "0.9")
    assert recipe.batch_size == 30 and recipe.schedule.samples == 10 * 150
    assert recipe.optimizer.peak(30) == rate_for(30, 32)
    assert recipe.optimizer.layer_decay == 0.9  # type: ignore[attr-defined]
    assert recipe.run.best is None and recipe.run.evaluate_every == 5
    assert recipe_of(alone, *data, "--data.max-samples", "70").schedule.samples == 11 * 64
    listed = tmp_path / "list.txt"
    listed.write_text("00000.tar/1\n" * 3)
    assert recipe_of(alone, *data, "--data.subset", listed).schedule.samples == 10 * 3


@pytest.mark.parametrize("name", ["optimizers.LARS", "muon.Muon"])
def test_other_optimizers_tune_too(
    name: str, alone: Path, scenes: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ("--data.train", scenes / "train", "--optimizer", f"frugal.common.optim.{name}")
    recipe = recipe_of(alone, *given)
    assert type(recipe.optimizer).__name__ == name.partition(".")[2]


def test_models_of_open_clip_are_tuned_too(
    alone_with_clips_words: Path, scenes: Path, tmp_path: Path
) -> None:
    save_model(load_model(alone_with_clips_words), tmp_path / "open_clip", to="open_clip")
    recipe = recipe_of(tmp_path / "open_clip", "--data.train", scenes / "train")
    assert recipe.run.start_from == tmp_path / "open_clip"
    run = tmp_path / "run"
    words = ("--data.train", scenes / "train", "--schedule.samples", "64", "--run.dir", run)
    said = command("frugal.common.tune", tmp_path / "open_clip", *words, *QUICK).stderr
    assert "nothing is held out" in said and list(losses(run)) == [1]


def test_what_cannot_be_tuned_is_one_sentence(alone: Path, scenes: Path, tmp_path: Path) -> None:
    for words, sentence in (
        ((), "give the model to tune first"),
        (("--data.train", scenes), "give the model to tune first"),
        ((alone,), "say what to tune on"),
        ((alone, "--data.train", "pipe:cat x.tar"), "cannot be counted"),
        ((alone, "--data.trian", scenes / "train"), "did you mean --data.train"),
        ((tmp_path / "none", "--data.train", scenes / "train"), "there is no file or folder"),
    ):
        with pytest.raises(InputError, match=sentence):
            recipe_of(*words)
    save_model(load_model(alone), tmp_path / "tower", to="timm")
    with pytest.raises(InputError, match="holds no pair of towers that can be trained here"):
        recipe_of(tmp_path / "tower", "--data.train", scenes / "train")
