"""A process that is gone or stuck is named, and the others end instead of waiting for it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from support import DDP, log_of, start, wait_for_step, zero

SHORT = ("--schedule.samples=240000", "--run.save-every=5", "--run.stall-minutes=0.15")


@pytest.mark.parametrize(
    ("launcher", "stopped"),
    [(DDP, 0), (DDP, 1), (zero(2), 1)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_process_that_stands_still_is_named_with_what_it_did_last(
    launcher, stopped: int, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", *SHORT)
    process = start(launcher, run, *words)
    wait_for_step(process, run, 6)
    time.sleep(4)  # what a process does is told every 1.8 s here
    os.kill(process.pids[stopped], signal.SIGSTOP)
    begun = time.monotonic()
    assert process.wait(timeout=60) in (1, -9)  # a launcher kills the one that stands still
    assert time.monotonic() - begun < 30
    said = log_of(run).read_text()
    if stopped == 1:
        assert "process 1 of 2 (on " in said
        assert "has given no sign of life for" in said or "while others wait for it" in said
        assert "step" in said.partition("process 1 of 2")[2]
    else:  # it keeps the meeting place
        assert "process 0" in said
    # nothing is lost: the same command goes on
    process = start(launcher, run, words[0], SHORT[0])
    wait_for_step(process, run, 8)
    process.send_signal(signal.SIGKILL)


def test_a_process_that_stands_still_before_it_told_anything_is_named_too(
    scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(DDP, run, f"--data.train={scenes / 'train'}", *SHORT)
    wait_for_step(process, run, 1)
    os.kill(process.pids[1], signal.SIGSTOP)
    assert process.wait(timeout=60) in (1, -9)
    assert "process 1 of 2" in log_of(run).read_text()


def test_a_slow_process_is_waited_for(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--run.stall-minutes=0.2")
    process = start(DDP, run, *words, "--schedule.samples=2400")
    wait_for_step(process, run, 3)
    for _ in range(3):
        os.kill(process.pids[1], signal.SIGSTOP)
        time.sleep(2)
        os.kill(process.pids[1], signal.SIGCONT)
    assert process.wait(timeout=120) == 0


FAULTY = """
import os
import time

import frugal.common.engine.evaluator as evaluator
import frugal.common.engine.loop as loop
from frugal.common.distributed import barrier
from frugal.common.train import main
from frugal.flip.recipes import RECIPES

step_of, evaluate = loop.train_step, evaluator.Evaluator.evaluate


def endless(engine, recipe, step, micro_batches, average=None):
    while step == {endless} and engine.run.rank == 1:
        pass
    return step_of(engine, recipe, step, micro_batches, average)


def slow(self, step):
    time.sleep({seconds})
    barrier()
    return evaluate(self, step)


loop.train_step, evaluator.Evaluator.evaluate = endless, slow
main(RECIPES, method="flip")
"""
"""FLIP with a process that computes without end in a step, or with evaluations that take long."""


def faulty(folder: Path, *, endless: int = -1, seconds: float = 0.0) -> str:
    path = folder / "faulty.py"
    path.write_text(FAULTY.format(endless=endless, seconds=seconds))
    return str(path)


def test_an_evaluation_that_takes_longer_is_waited_for(scenes: Path, tmp_path: Path) -> None:
    module, run = faulty(tmp_path, seconds=8), tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--run.evaluate-every=3")
    words += ("--schedule.samples=216", "--run.stall-minutes=0.08")
    process = start(DDP, run, *words, module=module)
    assert process.wait(timeout=120) == 0, log_of(run).read_text()


def test_a_process_that_computes_without_end_is_named_with_its_line(
    scenes: Path, tmp_path: Path
) -> None:
    module, run = faulty(tmp_path, endless=4), tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--run.stall-minutes=0.1")
    process = start(DDP, run, *words, module=module)
    assert process.wait(timeout=60) in (1, -9)
    said = log_of(run).read_text()
    assert "no process has come further than computing step 5" in said
    assert "faulty.py (endless)" in said.partition("process 1 (on ")[2]


def test_a_run_that_is_suspended_with_all_of_its_processes_goes_on(
    scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--run.stall-minutes=0.08")
    process = start(DDP, run, *words, "--schedule.samples=4800")
    wait_for_step(process, run, 3)
    time.sleep(2)  # each has told what it does
    for sent, seconds in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
        for pid in process.pids:
            os.kill(pid, sent)
        time.sleep(seconds)
    assert process.wait(timeout=120) == 0, log_of(run).read_text()


def test_processes_that_were_started_with_other_words_are_refused(
    scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(DDP, run, f"--data.train={scenes / 'train'}", "--run.seed={rank}")
    assert process.wait(timeout=120) == 2
    said = log_of(run).read_text()
    assert "the recipe is not the same everywhere: process 1 of 2 sees another copy than" in said
    assert "start all of them with the same command" in said
    assert not (run / "recipe.json").exists()
