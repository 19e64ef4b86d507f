"""The learning rate as a function of samples seen, against FLIP's own schedule."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from frugal.common.errors import InputError
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupConstantCooldown, WarmupCosine
from frugal.flip.recipes import demo

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


def cooling(**changes: object) -> WarmupConstantCooldown:
    given = {"samples": 1000, "warmup_samples": 100, "cooldown_samples": 200, "floor": 0.5}
    return WarmupConstantCooldown(**(given | changes))


@pytest.mark.parametrize(
    ("shape", "middle"), [("1-sqrt", 2.0 - 1.5 * math.sqrt(0.5)), ("linear", 1.25)]
)
def test_the_rate_stays_at_its_peak_and_cools_down_at_the_end(shape: str, middle: float) -> None:
    rates = [cooling(shape=shape).learning_rate(s, peak=2.0) for s in range(0, 1100, 50)]
    assert rates[:3] == [0.0, 1.0, 2.0]
    assert set(rates[2:17]) == {2.0}  # up to 800 samples
    assert rates[18] == pytest.approx(middle)
    assert rates[16:21] == sorted(rates[16:21], reverse=True)
    assert rates[20:] == [0.5, 0.5]


def test_a_fifth_of_a_run_is_cooldown_where_nothing_is_said() -> None:
    rates = [cooling(cooldown_samples=None).learning_rate(s, peak=1.0) for s in (800, 801)]
    assert rates[0] == 1.0 > rates[1]
    recipe = replace(
        demo(), batch_size=32, schedule=cooling(cooldown_samples=None, cooldown_from=50)
    )
    assert recipe.schedule.samples == 2000  # 1600 and a fifth of all
    assert recipe.schedule.learning_rate(1600, peak=1.0) == 1.0
    assert recipe.schedule.learning_rate(1601, peak=1.0) < 1.0


def test_a_step_to_cool_down_from_sets_the_samples_of_a_recipe() -> None:
    recipe = replace(demo(), batch_size=32, schedule=cooling(cooldown_from=50))
    assert recipe.schedule.samples == 50 * 32 + 200
    # the step counts, whatever the batch
    assert replace(recipe, batch_size=64).schedule.samples == 50 * 64 + 200
    few = cooling(cooldown_from=50, samples=10)  # fewer than it warms up for
    assert replace(recipe, schedule=few).schedule == recipe.schedule


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cooldown_samples": 901}, "together more than schedule.samples"),
        ({"cooldown_from": 3}, "schedule.cooldown_from is step 3, which is after 96 samples"),
        ({"cooldown_samples": 0}, "schedule.cooldown_samples is 0"),
        ({"cooldown_from": 0}, "schedule.cooldown_from is 0"),
        ({"shape": "sqrt"}, "schedule.shape is 'sqrt'; choose from 1-sqrt, linear"),
    ],
)
def test_a_cooldown_without_room_is_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        replace(demo(), batch_size=32, schedule=cooling(**changes))
