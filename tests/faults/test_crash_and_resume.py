"""A run that is killed and continued ends as the run that was left alone."""

import random
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from support import (
    ALONE,
    DDP,
    Launcher,
    deepspeed,
    kill_at_step,
    largest_difference,
    log_of,
    losses,
    metrics,
    saved_tensors,
    start,
    train,
    wait_for_step,
    zero,
)  # fmt: skip

LONG = ("--schedule.samples=864", "--engine.ema-decay=0.9")
"""36 steps, so that there is time to interrupt them."""
EVERYTHING = ("weight", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(scope="module")
def undisturbed_long(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed_long") / "run"
    train(ALONE, run, f"--data.train={scenes / 'train'}", *LONG)
    return run


@pytest.mark.parametrize("launcher", [ALONE, zero(3)], ids=lambda launcher: launcher.name)
def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(
    launcher: Launcher, scenes: Path, tmp_path: Path
) -> None:
    # 150 training samples and batches of 24: every epoch ends inside a batch
    words = (f"--data.train={scenes / 'train'}", *LONG, "--schedule.samples=576")
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    train(launcher, undisturbed, *words)
    process = start(launcher, disturbed, *words, "--run.save-every=5")
    kill_at_step(process, disturbed, random.Random().randint(2, 14), signal.SIGKILL)
    assert len(metrics(disturbed)) < 24
    train(launcher, disturbed, *words)
    left, right = saved_tensors(undisturbed), saved_tensors(disturbed)
    assert largest_difference(left, right, EVERYTHING) == 0.0
    assert losses(disturbed) == losses(undisturbed)
    steps = [line["step"] for line in metrics(disturbed)]
    assert steps == list(range(1, 25)), "metrics.jsonl holds every step once"
    assert metrics(disturbed)[-1]["read_samples"] == 576


CHAIN = [
    ALONE,
    DDP,
    zero(1),
    deepspeed(0),
    zero(2),
    zero(3, processes=4),  # the slowest has the fewest steps left
    ALONE,
]


def test_a_run_continues_under_any_engine_stage_and_number_of_processes(
    alone: Path, scenes: Path, tmp_path: Path
) -> None:
    # every launcher continues, to the end, from an early checkpoint of the one before it
    words = (
        f"--data.train={scenes / 'train'}", "--engine.ema-decay=0.9",
        "--run.save-every=3", "--run.keep=20",
    )  # fmt: skip
    run = tmp_path / "run"
    expected = losses(alone)
    for place, launcher in enumerate(CHAIN):
        if place:
            forget_after(run, step=3 * place)
        output = train(launcher, run, *words)
        assert not place or f"from step {3 * place} of 20" in output, launcher.name
        found = losses(run)
        assert list(found) == list(expected), launcher.name
        worst = max(abs(found[step] - loss) for step, loss in expected.items())
        assert worst < 1e-5, f"{launcher.name} after {CHAIN[place - 1].name}"
        distance = largest_difference(saved_tensors(run), saved_tensors(alone), ("weight", "ema"))
        assert distance < 1e-5, f"{launcher.name} after {CHAIN[place - 1].name}"


def forget_after(run: Path, *, step: int) -> None:
    """Leave a run as if it had ended right after the checkpoint of a step."""
    checkpoints = run / "checkpoints"
    for folder in checkpoints.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    (checkpoints / "latest").write_text(f"step_{step:09d}\n")


def check_saved_and_continue(
    launcher: Launcher, run: Path, undisturbed_long: Path, words: tuple[str, ...]
) -> None:
    stopped_after = metrics(run)[-1]["step"]
    assert 5 <= stopped_after < 36
    pointer = (run / "checkpoints" / "latest").read_text().strip()
    assert pointer == f"step_{stopped_after:09d}"
    train(launcher, run, *words)
    expected = saved_tensors(undisturbed_long)
    assert largest_difference(saved_tensors(run), expected, ("weight",)) < 1e-5


@pytest.mark.parametrize("launcher", [deepspeed(2)], ids=lambda launcher: launcher.name)
def test_sigterm_writes_a_checkpoint_first(
    launcher: Launcher, undisturbed_long: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", *LONG)
    process = start(launcher, run, *words)
    kill_at_step(process, run, 5, signal.SIGTERM)
    assert process.returncode != 0
    check_saved_and_continue(launcher, run, undisturbed_long, words)


@pytest.mark.parametrize("number", [signal.SIGKILL])
def test_a_launcher_that_ends_alone_takes_its_processes_along(
    number: int, undisturbed_long: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", *LONG)
    process = start(deepspeed(1), run, *words)
    wait_for_step(process, run, 5)
    process.send_signal(number)  # to the deepspeed command only, which hands nothing on
    process.wait(timeout=60)
    # at once: the continued run waits until the processes of the first have saved and gone
    train(deepspeed(1), run, *words)
    expected = saved_tensors(undisturbed_long)
    assert largest_difference(saved_tensors(run), expected, ("weight",)) < 1e-5
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, 37))


def test_a_finished_run_is_left_alone(alone: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    output = train(ALONE, run, f"--data.train={scenes / 'train'}", "--engine.ema-decay=0.9")
    assert "complete (20 steps)" in output
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == before


@pytest.mark.parametrize("launcher", [DDP, zero(2)], ids=lambda launcher: launcher.name)
def test_processes_of_which_one_loses_a_loader_process_save_together(
    launcher: Launcher, undisturbed_long: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", *LONG, "--run.save-every=1000")
    process = start(launcher, run, *words, "--data.workers=1")
    wait_for_step(process, run, 5)
    mine = psutil.Process(process.pid)
    # a loader process is a fork of the one that trains, and has its command line
    (loader,) = [child for child in mine.children() if child.cmdline() == mine.cmdline()]
    loader.kill()
    assert process.wait(timeout=120) == 2
    said = log_of(run).read_text()
    assert "process 0: loader process 1 of 1" in said and "was ended by SIGKILL" in said
    assert "with a checkpoint" in said and "Traceback" not in said
    check_saved_and_continue(launcher, run, undisturbed_long, words)
