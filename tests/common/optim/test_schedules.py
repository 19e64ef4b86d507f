"""The learning rate as a function of samples seen, against FLIP's own schedule."""

import json
import math
from pathlib import Path

import pytest

from frugal.common.errors import InputError
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine

GOLDEN = Path(__file__).parents[2] / "golden" / "flip"
CASES = json.loads((GOLDEN / "lr_schedules.json").read_text())


@pytest.mark.parametrize("name", sorted(CASES))
def test_learning_rates_are_the_published_ones(name: str) -> None:
    case = CASES[name]
    batch = case["batch_size"]
    optimizer = AdamW(learning_rate_per_256=case["base_lr_per_256"])
    # the README of the numbers states the ends of its one artificial configuration
    start, floor = (1e-7, 1e-6) if name == "small_batch_with_floor" else (0.0, 0.0)
    schedule = WarmupCosine(
        samples=case["total_steps"] * batch,
        warmup_samples=case["warmup_steps"] * batch,
        start=start,
        floor=floor,
    )
    peak = optimizer.peak(batch)
    assert peak == pytest.approx(case["peak_lr"], rel=1e-6)
    for step, expected in case["values"]:
        rate = schedule.learning_rate(step * batch, peak=peak)
        assert rate == pytest.approx(expected, abs=1e-6 * peak)


def test_warm_up_may_fill_the_whole_schedule() -> None:
    schedule = WarmupCosine(samples=100, warmup_samples=100)
    assert schedule.learning_rate(50, peak=2.0) == 1.0
    assert schedule.learning_rate(100, peak=2.0) == 2.0


def test_the_rate_depends_on_samples_and_not_on_the_batch() -> None:
    schedule = WarmupCosine(samples=10_000, warmup_samples=1_000)
    at_half = schedule.learning_rate(5_500, peak=1.0)
    assert at_half == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


@pytest.mark.parametrize(("samples", "warmup"), [(0, 0), (-1, 0), (10, 11), (10, -1)])
def test_impossible_schedules_are_refused(samples: int, warmup: int) -> None:
    field = "warmup_samples" if samples > 0 else "samples"
    with pytest.raises(
        InputError, match=rf"schedule\.{field} is {warmup if samples > 0 else samples}"
    ):
        WarmupCosine(samples=samples, warmup_samples=warmup)
