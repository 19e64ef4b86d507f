"""A process that is gone or stuck is named, and the others end instead of waiting for it."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest

from frugal.common.run import lock_run_dir
from support import DDP, log_of, start, wait_for_step, zero

SHORT = ("--schedule.samples=240000", "--run.save-every=5", "--run.stall-minutes=0.1")


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
    time.sleep(2.5)  # what a process does is told every 1.2 s here
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
    said = log_of(run).read_text()
    assert "process 1 of 2" in said
    # that tells of a process in its steps, whatever the other one told before it had taken one
    assert re.search(r"; this process is (computing|waiting for the data of) step \d", said)


def test_a_run_directory_that_somebody_still_writes_to_is_waited_for(
    scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = lock_run_dir(run, patience=0, log=logging.getLogger("frugal.test"))
    assert lock is not None
    words = (f"--data.train={scenes / 'train'}", "--run.stall-minutes=0.05")
    process = start(DDP, run, *words, "--schedule.samples=48")
    while "waiting for the run in" not in log_of(run).read_text():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(8)  # longer than a process may stand still
    assert process.poll() is None
    lock.close()
    assert process.wait(timeout=60) == 0


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
from importlib import import_module

import torch

import frugal.common.engine.evaluator as evaluator
import frugal.common.engine.loop as loop
from frugal.common.distributed import barrier
from frugal.common.train import main

step_of, evaluate = loop.train_step, evaluator.Evaluator.evaluate


def endless(engine, recipe, step, micro_batches, average=None):
    while step == {endless} and engine.run.rank == 1:
        pass
    return step_of(engine, recipe, step, micro_batches, average)


def slow(self, step):
    end, factor = time.monotonic() + {seconds}, torch.eye(300)
    while self.run.is_main and time.monotonic() < end: factor = factor @ factor
    barrier()
    return evaluate(self, step)


def hangs(*given, **named):
    time.sleep(1000 if os.environ["RANK"] == "1" else 0)
    return inner(*given, **named)


loop.train_step, evaluator.Evaluator.evaluate = endless, slow
if "{hangs}":
    module, _, name = "{hangs}".partition(":")
    owner = import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name = name.rpartition(".")[2]
    inner = getattr(owner, name)
    setattr(owner, name, hangs)
main(import_module("frugal.{method}.recipes").RECIPES, method="{method}")
"""
"""Training with a process that computes without end in a step, or stays in one line for ever in
what all take part in, or with evaluations of the first process that take long."""


BACKGROUND = "--data.background"
CHOOSING = ("--data.period=1", "--data.scan=10", "--data.threshold=0.999", "--data.min-ratio=0.25")


def faulty(
    folder: Path, *, endless: int = -1, seconds: int = 0, hangs: str = "", method: str = "flip"
) -> str:
    path = folder / "faulty.py"
    path.write_text(FAULTY.format(endless=endless, seconds=seconds, hangs=hangs, method=method))
    return str(path)


@pytest.mark.parametrize(
    ("hangs", "method", "more", "doing"),
    [
        ("frugal.common.train:calibrate_reduction", "flip", (), "starting"),
        ("frugal.common.engine.evaluator:Evaluator.evaluate", "flip", (), "evaluating step 3"),
        ("frugal.cit.curation:_score", "cit", (), "waiting for the data of step 1"),
        ("frugal.cit.curation:_score", "cit", (BACKGROUND,), "waiting for the data of step 1"),
    ],
    ids=["start", "evaluation", "curation", "curation in the background"],
)
def test_a_process_that_stays_in_one_line_while_others_wait_is_named(
    hangs: str, method: str, more: tuple[str, ...], doing: str, scenes: Path, tmp_path: Path
) -> None:
    module, run = faulty(tmp_path, hangs=hangs, method=method), tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--run.stall-minutes=0.1", *more)
    words += ("--run.evaluate-every=3",) if "evaluator" in hangs else ()
    if method == "cit":
        classes = scenes / "zero_shot" / "classnames.txt"
        words += (f"--data.metadata.sources={classes}", *CHOOSING)
    process = start(DDP, run, *words, module=module)
    assert process.wait(timeout=60) in (1, -9)
    said = log_of(run).read_text()
    assert f"no process has come further than {doing}" in said
    found = said.partition("no process has come further")[2]
    assert re.search(r"process 0 \(on \S+\) waits for others in line \d+ of ", found)
    assert re.search(r"process 1 \(on \S+\) in line \d+ of \S*faulty.py \(hangs\)", found)
    assert "Traceback" not in said


def test_an_evaluation_that_takes_longer_is_waited_for(scenes: Path, tmp_path: Path) -> None:
    module, run = faulty(tmp_path, seconds=8), tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=72")
    words += ("--schedule.warmup-samples=0", "--run.stall-minutes=0.08")
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
    process = start(DDP, run, *words, "--schedule.samples=2400")
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
