"""One process, DDP and every ZeRO stage train the same model on the same samples."""

import json
from pathlib import Path

import pytest

from support import (
    ALONE,
    TORCHRUN,
    Launcher,
    deepspeed,
    largest_difference,
    losses,
    metrics,
    saved_tensors,
    train,
    zero,
)


@pytest.mark.parametrize(
    "launcher",
    [TORCHRUN, zero(0), deepspeed(1), zero(2), deepspeed(3), zero(2, processes=1)],
    ids=lambda launcher: launcher.name,
)
def test_twenty_steps_agree(launcher: Launcher, alone: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shared_memory = set(Path("/dev/shm").glob("deepspeed*"))
    train(launcher, run, f"--data.train={scenes / 'train'}", "--engine.ema-decay=0.9")
    assert set(Path("/dev/shm").glob("deepspeed*")) <= shared_memory, (
        "the run left shared memory behind"
    )
    expected, found = losses(alone), losses(run)
    assert list(found) == list(range(1, 21)) == list(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5)
    left, right = saved_tensors(alone), saved_tensors(run)
    assert largest_difference(left, right, ("weight", "ema")) < 1e-5
    assert largest_difference(left, right, ("exp_avg", "exp_avg_sq")) < 1e-4
    for mine, theirs in zip(metrics(run), metrics(alone), strict=True):
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        assert mine["read_samples"] == theirs["read_samples"] == mine["samples"]


def test_zero_3_evaluates_though_one_process_has_no_images(scenes: Path, tmp_path: Path) -> None:
    # 40 images are one group, which one process embeds while the other waits for its numbers
    words = (f"--data.train={scenes / 'train'}", f"--evaluation.1.data={scenes}")
    words = (*words, "--schedule.samples=144", "--run.evaluate-every=3")
    for launcher in (ALONE, zero(3)):
        train(launcher, tmp_path / launcher.name, *words)
    left, right = (
        json.loads((tmp_path / launcher.name / "evaluation/retrieval.json").read_text())
        for launcher in (ALONE, zero(3))
    )
    assert left["retrieval_candidates"] == 40
    assert left == pytest.approx(right, abs=0.051)
    found = largest_difference(*(saved_tensors(tmp_path / run.name) for run in (ALONE, zero(3))))
    assert found < 1e-5
