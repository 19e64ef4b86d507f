"""Rates are those of steps: what else a run does is told under its own name."""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from frugal.common.contracts import EvaluationTask
from frugal.common.engine.throughput import Meter
from frugal.common.recipe import EngineOptions, RunOptions
from frugal.common.train import train_recipe
from frugal.flip.recipes import demo
from support import metrics

SLEEP = 0.4


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(meter: Meter, clock: Clock, count: int) -> None:
    """Each 3 seconds, one of them waiting for data."""
    for _ in range(count):
        with meter.waiting():
            clock.now += 1
        clock.now += 2
        meter.add({"loss": 5.0})


def test_pauses_are_no_part_of_a_step() -> None:
    clock = Clock()
    meter = Meter(torch.device("cpu"), clock=clock)
    with meter.paused("peak"):
        clock.now += 50
    steps(meter, clock, 2)
    with meter.paused("pictures"):
        clock.now += 7
    steps(meter, clock, 2)
    line = meter.take()
    assert (line.step_seconds, line.wait) == (3.0, 1 / 3)
    assert line.pauses == {"peak": 50.0, "pictures": 7.0}
    for _ in range(2):
        with meter.paused("checkpoint"):
            clock.now += 11
            assert meter.seconds == 12.0  # a checkpoint that is being written tells it
    steps(meter, clock, 3)
    line = meter.take()
    assert (line.step_seconds, line.pauses) == (3.0, {"checkpoint": 22.0})
    assert meter.seconds == 7 * 3.0
    assert meter.paused_seconds == {"peak": 50.0, "pictures": 7.0, "checkpoint": 22.0}


def test_a_pause_that_fails_is_over() -> None:
    clock = Clock()
    meter = Meter(torch.device("cpu"), clock=clock)
    with pytest.raises(KeyError), meter.paused("evaluation"):
        clock.now += 5
        raise KeyError
    clock.now += 2
    assert meter.seconds == 2.0


@dataclass(frozen=True, kw_only=True)
class Sleep(EvaluationTask):
    """An evaluation that takes its time."""

    name: str = "sleep"

    def folder(self) -> None:
        """None: it needs no data."""

    def evaluate(
        self, bundle: Any, run: Any, *, show: Any = None, keep: Any = None
    ) -> dict[str, Any]:
        time.sleep(SLEEP)
        return {"sleep_seconds": SLEEP}


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_lines_and_checkpoints_of_a_run_leave_out_what_is_no_step(
    scenes: Path, tmp_path: Path
) -> None:
    recipe = demo()
    model = replace(recipe.model, image=replace(recipe.model.image, width=32, depth=1))
    recipe = replace(
        recipe,
        model=model,
        data=replace(recipe.data, train=(str(scenes / "train"),)),
        schedule=replace(recipe.schedule, samples=6 * 8, warmup_samples=0),
        batch_size=8,
        engine=EngineOptions(threads=1),
        run=RunOptions(dir=tmp_path / "run", log_every=1, save_every=2, evaluate_every=2),
        evaluation=(Sleep(),),
    )
    train_recipe(recipe)
    lines = metrics(tmp_path / "run")
    assert {"seconds/peak"} <= lines[0].keys()
    assert {"seconds/pictures"} <= lines[1].keys()
    for line in lines[2::2]:
        assert line["seconds/evaluation"] >= SLEEP
        assert line["seconds/checkpoint"] > 0
    # the rest of the time between two lines is the step's: nothing is counted twice
    for before, line in itertools.pairwise(lines):
        paused = sum(value for name, value in line.items() if name.startswith("seconds/"))
        step = recipe.batch_size / line["samples_per_second"]
        assert paused + step <= line["time"] - before["time"] + SLEEP / 2
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step_000000006/state.json")
    spent = json.loads(newest.read_text())["seconds"]
    assert (
        spent <= sum(recipe.batch_size / line["samples_per_second"] for line in lines) + SLEEP / 2
    )
