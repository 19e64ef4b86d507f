"""What cannot be saved does not stop a run before its end, and is a sentence there."""

import os
from pathlib import Path

import psutil
import pytest

from frugal.common.checkpoint import writer
from support import ALONE, DDP, Launcher, metrics, start, train, wait_for_step


@pytest.mark.parametrize("launcher", [ALONE, DDP], ids=lambda launcher: launcher.name)
def test_a_run_trains_to_its_end_though_nothing_can_be_saved_and_then_says_so(
    launcher: Launcher, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("no folder")
    words = (f"--data.train={scenes / 'train'}", "--run.save-every=5")
    output = train(launcher, run, *words, expect=2)
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))
    assert "the checkpoint of step 5 could not be written to" in output
    assert "File exists" in output and "training goes on, older checkpoints are unt" in output
    assert "that of step 10 takes its place" in output
    error = next(line for line in output.splitlines() if line.startswith("error"))
    assert "the checkpoint of step 20 could not be written" in error


def test_a_run_stops_at_the_next_checkpoint_after_enough_attempts(
    scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("no folder")
    words = (f"--data.train={scenes / 'train'}", "--run.save-every=5")
    output = train(ALONE, run, *words, "--run.max-failed-saves=1", expect=2)
    assert "1 attempts in a row failed, and run.max_failed_saves is 1" in output
    assert len(metrics(run)) == 10


def test_no_writer_outlives_a_run_that_ended(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(ALONE, run, f"--data.train={scenes / 'train'}", "--run.save-every=5")
    wait_for_step(process, run, 10)
    writers = [p for p in psutil.Process(process.pid).children() if writer.__name__ in p.cmdline()]
    assert process.wait(timeout=60) == 0
    assert len(writers) == 1 and not any(p.is_running() for p in writers)
    assert not [n for n in os.listdir(run / "checkpoints") if n.startswith(".")]  # noqa: PTH208
