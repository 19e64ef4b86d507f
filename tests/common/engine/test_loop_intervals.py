"""How often a run logs changes nothing but how often it logs."""

import math
import os
import signal
import time
from pathlib import Path

import pytest

from support import (
    ALONE,
    DDP,
    Launcher,
    largest_difference,
    metrics,
    newest,
    saved_tensors,
    start,
    train,
    wait_for_step,
    zero,
)  # fmt: skip

EVERYTHING = ("weight", "exp_avg", "exp_avg_sq", "ema")
OF_A_STEP = (
    "loss", "accuracy", "logit_scale", "gradient_norm", "image_tokens",
    "text_tokens", "mask_ratio",
)  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "tolerance"), [(ALONE, 0.0), (DDP, 1e-5), (zero(2), 1e-5)],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_a_line_holds_the_means_of_its_steps(
    launcher: Launcher, tolerance: float, alone: Path, scenes: Path, tmp_path: Path
) -> None:
    run, every = tmp_path / "run", 6  # does not divide 20: the last line is of two steps
    words = ("--engine.ema-decay=0.9", f"--run.log-every={every}", "--run.save-every=4")
    train(launcher, run, f"--data.train={scenes / 'train'}", *words)
    lines, single = metrics(run), metrics(alone)
    assert [line["step"] for line in lines] == [6, 12, 18, 20]
    for line in lines:
        steps = single[(line["step"] - 1) // every * every : line["step"]]
        for name in OF_A_STEP:
            expected = math.fsum(step[name] for step in steps) / len(steps)
            assert line[name] == pytest.approx(expected, rel=1e-12 + 100 * tolerance), name
        assert line["learning_rate"] == steps[-1]["learning_rate"]
        assert line["read_samples"] == 24 * line["step"] and line["skipped_steps"] == 0
    difference = largest_difference(saved_tensors(run), saved_tensors(alone), EVERYTHING)
    assert difference <= tolerance


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_is_told_to_stop_stops_all_after_the_same_step(
    rank: int, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=24000")
    process = start(DDP, run, *words)
    wait_for_step(process, run, 5)
    os.kill(process.pids[rank], signal.SIGTERM)
    deadline = time.monotonic() + 120
    while len(process.ended()) < 2:  # each by itself
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(process.ended().values()) == [143, 143]
    stopped_after = metrics(run)[-1]["step"]
    assert 5 <= stopped_after < 1000
    assert newest(run).name == f"step_{stopped_after:09d}"
