"""What a run does whose loss is not finite: stop, go on, or go back and leave samples out."""

from __future__ import annotations

import json
import logging
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.engine.divergence import (
    last_good,
    left_out_steps,
    steps_in_row,
    steps_to_leave_out,
)
from frugal.common.report.collect import describe_history
from frugal.common.run import Run
from support import (
    ALONE,
    DDP,
    Launcher,
    kill_at_step,
    largest_difference,
    log_of,
    metrics,
    saved_tensors,
    start,
    train,
    zero,
)  # fmt: skip

EVERYTHING = ("weight", "exp_avg", "exp_avg_sq", "ema")
WORDS = (
    "--schedule.samples=576", "--run.save-every=4", "--run.max-skipped=3", "--run.keep=3",
    "--engine.ema-decay=0.9",
)  # fmt: skip
"""Twenty-four steps with a checkpoint after every fourth."""
SCRIPT = """
from dataclasses import replace

import torch

import frugal.common.engine.loop as loop
from frugal.common.train import main
from frugal.flip.recipes import RECIPES

honest = loop.train_step


def poisoned(engine, recipe, step, micro_batches, average=None):
    number = int(micro_batches[0].sample_numbers[0])
    place = number // 24 + 1
    if place in {bad} and number % 24 == 0:  # on the first process
        images = torch.full_like(micro_batches[0].images, torch.nan, dtype=torch.float32)
        micro_batches = [replace(micro_batches[0], images=images), *micro_batches[1:]]
    found = honest(engine, recipe, step, micro_batches, average)
    if place == {astray}:
        with torch.no_grad():
            engine.objective.get_parameter("model.image.blocks.0.mlp.fc2.weight").fill_(torch.nan)
    return found


loop.train_step = poisoned
main(RECIPES, method="flip")
"""
"""FLIP on samples of which some, by their number, make the loss or the weights not finite."""


def script(folder: Path, *, bad: set[int] | range, astray: int = 0) -> str:
    path = folder / "poisoned.py"
    text = SCRIPT.replace("{bad}", repr(set(bad))).replace("{astray}", str(astray))
    path.write_text(text)
    return str(path)


def rewinds(run: Path) -> list[tuple[int, int, list[int]]]:
    events = [json.loads(line) for line in (run / "history.jsonl").open()]
    return [(e["step"], e["to"], e["left_out"]) for e in events if e["event"] == "rewind"]


def test_killed_after_going_back_a_run_ends_as_one_that_was_not(
    scenes: Path, tmp_path: Path
) -> None:
    words = (f"--data.train={scenes / 'train'}", *WORDS, "--run.on-divergence=rewind")
    module, run = script(tmp_path, bad={10, 11, 12}), tmp_path / "undisturbed"
    output = train(zero(1), run, *words, "--run.log-every=5", module=module)
    assert "going back to the checkpoint of step 8, without the samples of 3 steps" in output
    assert [line["step"] for line in metrics(run)] == [5, 10, 15, 20, 24]
    expect_the_same_of_a_killed_run(zero(1), run, words, module)


def test_after_going_back_twice_nothing_is_told_twice(scenes: Path, tmp_path: Path) -> None:
    module, run = script(tmp_path, bad=set(), astray=9), tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", *WORDS, "--run.on-divergence=rewind")
    train(ALONE, run, *words, module=module)
    assert [to for _, to, _ in rewinds(run)] == [8, 8]
    events = [json.loads(line) for line in (run / "history.jsonl").open()]
    lost = [event["lost_seconds"] for event in events if event["event"] == "rewind"]
    spent = [metrics(run)[-1]["session_seconds"][name] for name in ("steps", "waiting")]
    kept = json.loads((run / "checkpoints" / "step_000000024" / "state.json").read_text())
    assert kept["lost_seconds"] == pytest.approx(sum(lost), abs=0.01)
    assert sum(lost) < sum(spent)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    drawn = [event.step for event in board.Scalars("loss")]
    assert drawn == [line["step"] for line in metrics(run)]


def test_a_step_that_is_skipped_and_one_that_is_left_out_change_nothing(
    scenes: Path, tmp_path: Path
) -> None:
    words = (f"--data.train={scenes / 'train'}", *WORDS)
    module, run = script(tmp_path, bad={10, 11, 12}), tmp_path / "skipped"
    output = train(ALONE, run, *words, "--run.on-divergence=skip", module=module)
    assert output.count("skipped: loss nan") == 3
    assert metrics(run)[-1]["skipped_steps"] == 3
    expect_the_same_of_a_killed_run(ALONE, run, (*words, "--run.on-divergence=rewind"), module)


def expect_the_same_of_a_killed_run(
    launcher: Launcher, other: Path, words: tuple[str, ...], module: str
) -> None:
    """Kill a run after it went back, and compare what it ends in with another."""
    run = other.parent / "killed"
    kill_at_step(start(launcher, run, *words, module=module), run, 14, signal.SIGKILL)
    assert metrics(run)[-1]["step"] < 24
    assert "going back" not in train(launcher, run, *words, module=module)
    assert rewinds(run) == [(12, 8, [10, 11, 12])]
    assert metrics(run)[-1]["skipped_steps"] == 0
    assert metrics(run)[-1]["read_samples"] == 576
    assert not {10, 11, 12} & {line["step"] for line in metrics(run)}
    assert largest_difference(saved_tensors(other), saved_tensors(run), EVERYTHING) == 0.0


def test_with_virtual_processes_one_and_two_go_back_alike(scenes: Path, tmp_path: Path) -> None:
    words = (
        f"--data.train={scenes / 'train'}", *WORDS, "--run.on-divergence=rewind",
        "--engine.virtual-processes=2", "--run.digests",
    )  # fmt: skip
    module = script(tmp_path, bad={10, 11, 12})
    one, two = tmp_path / "one", tmp_path / "two"
    digests = []
    for launcher, run in ((ALONE, one), (DDP, two)):
        train(launcher, run, *words, module=module)
        assert rewinds(run) == [(12, 8, [10, 11, 12])]
        lines = [json.loads(line) for line in (run / "digests.jsonl").open()]
        digests.append([(line["step"], line["gradient"], line["samples"]) for line in lines])
    assert digests[0] == digests[1]
    assert [step for step, _, _ in digests[0]] == [*range(1, 10), *range(13, 25)]
    assert largest_difference(saved_tensors(one), saved_tensors(two), EVERYTHING) == 0.0


@pytest.mark.parametrize(
    ("astray", "expected"),
    [
        (9, [(12, 8, [10, 11, 12]), (15, 8, [*range(9, 16)])]),
        # the checkpoint of step 8 holds them already, and no finite step follows it
        (8, [(11, 4, [9, 10, 11]), (14, 4, [*range(5, 15)])]),
    ],
)
def test_a_run_whose_weights_were_led_astray_trains_on_none_of_the_samples_since(
    astray: int, expected: list[tuple[int, int, list[int]]], scenes: Path, tmp_path: Path
) -> None:
    words = (f"--data.train={scenes / 'train'}", *WORDS, "--run.on-divergence=rewind")
    run = tmp_path / "run"
    output = train(ALONE, run, *words, module=script(tmp_path, bad=range(0), astray=astray))
    assert rewinds(run) == expected
    assert output.count("going back") == 2
    last = metrics(run)[-1]
    assert last["step"] == 24 and last["skipped_steps"] == 0 and last["loss"] < 4


def test_an_evaluation_that_finds_nothing_finite_has_a_run_go_back_too(
    scenes: Path, tmp_path: Path
) -> None:
    words = (
        f"--data.train={scenes / 'train'}", *WORDS, f"--evaluation.0.data={scenes}",
        "--run.evaluate-every=8", "--engine.ema-decay=None", "--model.image.drop-path=0.3",
        "--schedule.samples=384",
    )  # fmt: skip
    module, run, killed = script(tmp_path, bad=set(), astray=8), tmp_path / "a", tmp_path / "b"
    output = train(ALONE, run, *words, "--run.on-divergence=rewind", module=module)
    assert "embeddings of 128 of 128 images are not finite" in output
    expected = "the weights after step 8 are of no use: going back to the checkpoint of step 4"
    assert expected in output
    assert rewinds(run) == [(8, 4, [8])]
    # one that stopped there goes on, and ends in the same bits also where it is killed behind that
    train(ALONE, killed, *words, module=module, expect=2)
    process = start(ALONE, killed, *words, "--run.on-divergence=rewind", module=module)
    kill_at_step(process, killed, 10, signal.SIGKILL)
    assert expected in log_of(killed).read_text()
    train(ALONE, killed, *words, "--run.on-divergence=rewind", module=module)
    assert rewinds(killed) == rewinds(run)
    assert largest_difference(saved_tensors(run), saved_tensors(killed), EVERYTHING[:3]) == 0.0


def test_going_back_ends_where_it_does_not_help(scenes: Path, tmp_path: Path) -> None:
    words = (f"--data.train={scenes / 'train'}", *WORDS, "--run.on-divergence=rewind")
    run = tmp_path / "run"
    bad = script(tmp_path, bad=range(10, 99))
    output = train(ALONE, run, *words, "--schedule.samples=600", module=bad, expect=1)
    # further and further back, until nothing is left
    assert [event[:2] for event in rewinds(run)] == [(12, 8), (15, 8), (18, 4), (21, 4)]
    assert "24, and there is no checkpoint to go back to" in output
    ((_, table),) = describe_history({"flip": run})
    assert "diverged and went back after step 12" in table
    assert "to step 8, without the samples of 3 steps" in table
    run = tmp_path / "without"
    output = train(ALONE, run, *words, module=script(tmp_path, bad={2, 3, 4}), expect=1)
    assert "there is no checkpoint to go back to" in output


def test_steps_that_are_finite_in_between_do_not_make_a_useless_checkpoint_good(
    scenes: Path, tmp_path: Path
) -> None:
    """At such a rate every way back takes one finite step, and diverges behind it."""
    run = tmp_path / "run"
    output = train(
        ALONE, run, f"--data.train={scenes / 'train'}", "--run.on-divergence=rewind",
        "--run.max-skipped=2", "--run.save-every=1", "--run.keep=4",
        "--optimizer.learning-rate=1e20", "--schedule.warmup-samples=400", expect=1,
    )  # fmt: skip
    assert "there is no checkpoint to go back to" in output
    assert max(Counter(event[1] for event in rewinds(run)).values()) == 2


def test_what_is_left_out_is_read_from_the_history() -> None:
    begun = {"event": "began", "step": 0}
    first = {"event": "rewind", "to": 8, "left_out": [11, 12]}
    assert left_out_steps([begun, first, {"event": "continued", "step": 8}]) == {11, 12}
    assert left_out_steps([first, begun]) == set(), "a run that began anew"
    assert steps_in_row(14, 3, {12, 13}) == [10, 11, 14]
    assert steps_to_leave_out([begun], to=8, not_finite=[11, 12]) == [11, 12]
    assert steps_to_leave_out([begun, first], to=8, not_finite=[13, 14]) == [*range(9, 15)]
    assert steps_to_leave_out([begun, first], to=10, not_finite=[13, 14]) == [13, 14]


def test_a_damaged_checkpoint_is_none_to_go_back_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, 0, 1, 0, torch.device("cpu"), logging.getLogger("frugal.test"))
    store = CheckpointStore(run, keep=9)
    folders = [store.save({"weight/a": torch.ones(2)}, {"step": step}) for step in (4, 8, 12)]

    def found() -> int | None:
        checkpoint = last_good(store, before=14, left_out={13}, history=[])
        return None if checkpoint is None else checkpoint.step

    assert found() == 8, "behind the last one no step was taken"
    for folder, older in zip(reversed(folders[:2]), (4, None), strict=True):
        (file,) = folder.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[::-1])
        assert found() == older
        assert f"{file} was altered" in caplog.text
    assert f"taking {folders[0]}" in caplog.text
    assert "there is none before it to go back to" in caplog.text
