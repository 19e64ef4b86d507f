"""The script that chains pretraining and tuning, as a user runs it."""

import signal
import subprocess
from pathlib import Path

import pytest

from frugal.common.recipe_json import load_recipe
from support import ROOT, environment, kill_at_step, metrics

VOCABULARY = ROOT / "tests" / "golden" / "flip" / "bert_uncased_vocab.txt"
SMALL = (
    "--model.image.width=16", "--model.image.depth=1", "--model.image.heads=2",
    "--model.image.mlp-width=16", "--model.image.image-size=32", "--model.text.width=16",
    "--model.text.depth=1", "--model.text.heads=2", "--model.text.mlp-width=16",
    "--model.embed-dim=8", f"--data.tokenizer.vocab={VOCABULARY}", "--data.workers=0",
    "--engine.precision=float32", "--run.log-every=1", "--batch-size=24",
    "--optimizer.learning-rate-per-256=0.01",
    "--schedule.samples=96", "--schedule.warmup-samples=24",
)  # fmt: skip
"""FLIP's large model in small: four steps of 24 samples."""
TUNING = ("--model.image.image-size=48", "--schedule.samples=960")


def script(*words: str, run: Path, **variables: str) -> list[str]:
    settings = {"RUN": str(run), "LAUNCHER": "accelerate", "PROCESSES": "1", **variables}
    return [
        "env", *(f"{name}={value}" for name, value in settings.items()),
        "bash", str(ROOT / "launch" / "flip_two_stage.sh"), *words,
    ]  # fmt: skip


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(quick=True), timeout=600
    )


def latest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


def test_tuning_follows_pretraining_and_continues_after_an_interruption(
    tmp_path: Path, scenes: Path
) -> None:
    run = tmp_path / "run"
    words = ("large", *SMALL, f"--data.train={scenes / 'train'}", "--", *TUNING)
    command = script(*words, run=run, TUNING="large-tuning-336")
    said = tmp_path / "run" / "tuning-336.log"
    said.parent.mkdir()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=said.open("wb"),
    )  # fmt: skip
    kill_at_step(process, run / "tuning-336", 3, signal.SIGTERM)
    assert process.returncode != 0
    assert f"started from step 4 of {run}/pretraining" in said.read_text()
    masked, unmasked = (load_recipe(run / s / "recipe.json") for s in ("pretraining", "tuning-336"))
    assert (masked.model.image.grid, unmasked.model.image.grid) == ((2, 2), (3, 3))
    assert (masked.steps, unmasked.steps) == (4, 40)
    assert latest(run / "pretraining") == 4
    assert 3 <= latest(run / "tuning-336") < 40

    again = call(command)
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"{run}/pretraining is complete" in again.stderr
    assert f"continuing {run}/tuning-336 from step" in again.stderr
    assert latest(run / "tuning-336") == 40
    steps = [line["step"] for line in metrics(run / "tuning-336")]
    assert steps == list(range(1, 41))


def test_a_stage_that_fails_is_not_followed_by_the_next(tmp_path: Path) -> None:
    words = ("large", *SMALL, f"--data.train={tmp_path}/nothing.tar")
    result = call(script(*words, run=tmp_path / "run"))
    assert result.returncode != 0
    assert "nothing.tar" in result.stderr
    assert not (tmp_path / "run" / "tuning").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "launch/two_stage.sh METHOD RECIPE"),
        (("demo", "--run.dir", "x"), "--run.dir is set for each stage"),
        (("demo", "--", "--run.start_from=x"), "--run.start_from is set for each stage"),
        (("ablation-mask0-16k",), "no recipe 'ablation-mask0-16k-tuning'"),
        (("demo", "--", "--bogus", "1"), "--bogus"),
        (("demo", "--", "--batch-size", "0"), "batch_size is 0"),
    ],
)
def test_a_slip_is_found_before_anything_is_trained(
    tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    result = call(script(*words, run=tmp_path / "run"))
    assert result.returncode == 2
    assert sentence in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
