"""A learning rate, from a run whose rate rises."""

import json
import math
import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from forks import fork
from frugal.common.errors import InputError
from frugal.common.find_learning_rate import Options, analyze, rising
from frugal.common.optim.schedules import RisingRate
from frugal.flip.recipes import demo
from support import ALONE, ROOT, TINY, command, metrics


def test_the_rate_rises_by_the_same_factor_from_the_lowest_to_the_highest() -> None:
    options = Options(recipe="flip:demo", steps=50, lowest=1e-5, highest=0.1)
    recipe = rising(demo(), options)
    assert isinstance(recipe.schedule, RisingRate) and recipe.steps == 50
    peak = recipe.optimizer.peak(recipe.batch_size)
    rates = [
        recipe.schedule.learning_rate(step * recipe.batch_size, peak=peak) for step in range(51)
    ]
    assert rates[0] == pytest.approx(1e-5) and rates[-1] == pytest.approx(0.1)
    factors = [after / before for before, after in pairwise(rates)]
    assert factors == pytest.approx([1e4 ** (1 / 50)] * 50)


def curve(best: float, count: int = 200) -> tuple[list[float], list[float]]:
    """Rates, and losses that fall around a tenth of the best rate and explode behind it."""
    rates = [1e-6 * 1e5 ** (step / count) for step in range(count)]
    losses = [
        5 - 3 / (1 + (best / (10 * rate)) ** 2) + 40 * (rate / best) ** 4 * (rate > best)
        for rate in rates
    ]
    return rates, losses


@pytest.mark.parametrize("best", [1e-4, 3e-3, 2e-2])
def test_of_a_known_curve_the_rates_are_found(best: float) -> None:
    found = analyze(*curve(best))
    assert found.is_bounded
    assert best / 2 < found.lowest < 2 * best
    assert best / 40 < found.steepest < best / 2
    assert found.suggested == pytest.approx(found.lowest / 10, rel=0.06)
    # what is not finite, and what comes behind it, counts no more, and bounds the rate
    rates, losses = curve(best)
    place = next(n for n, rate in enumerate(rates) if rate > best / 2)
    again = analyze(rates, [*losses[:place], math.nan, *losses[place + 1 :]])
    assert len(again.smoothed) == place
    assert again.steepest == pytest.approx(found.steepest, rel=0.1)
    assert again.lowest == rates[place - 1] and again.is_bounded


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_fall(seed: int) -> None:
    rates, losses = curve(3e-3)
    draws = random.Random(seed)
    noisy = [loss + draws.gauss(0, 0.3) for loss in losses]
    wanted = analyze(rates, losses).steepest
    assert wanted / 4 < analyze(rates, noisy).steepest < 4 * wanted


@pytest.mark.parametrize(
    "flag", ["--run.dir=a", "--schedule.samples", "--optimizer.learning_rate", "--run.patience=1"]
)
def test_flags_that_would_have_no_effect_are_refused(flag: str) -> None:
    module = "frugal.common.find_learning_rate"
    said = command(module, "flip:demo", flag, "7", expect=2).stderr
    name = flag.partition("=")[0].replace("_", "-")
    assert f"{name} has no effect here; leave it out (--out says" in said


def test_a_curve_without_an_answer_says_so() -> None:
    rates, losses = curve(10.0)
    assert not analyze(rates, losses).is_bounded
    with pytest.raises(InputError, match="the loss never fell below that of the first step"):
        analyze(rates, [1.0 + rate for rate in rates])
    with pytest.raises(InputError, match="never fell"):
        analyze(rates[:1], [1.0])
    with pytest.raises(InputError, match="the rate is to rise"):
        Options(recipe="flip:demo", lowest=1.0, highest=0.1)


def test_a_signal_is_no_divergence(scenes: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    small = [word for word in TINY if not word.startswith(("--schedule", "--run"))]
    words = ["flip:demo", "--steps=60", "--highest=1", f"--out={out}", *small]
    words.append(f"--data.train={scenes / 'train'}")
    process = fork(
        "frugal.common.find_learning_rate", words, log=log, cwd=ROOT,
        environments=ALONE.environments(),
    )  # fmt: skip
    while len(metrics(out)) < 20:
        assert process.poll() is None, log.read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM, log.read_text()
    said = log.read_text()
    assert "stopped by SIGTERM after step" in said and "--optimizer.learning-rate" not in said
    assert not (out / "learning_rate.json").exists()
    said = command("frugal.common.find_learning_rate", *words).stdout
    assert "try --optimizer.learning-rate" in said and len(metrics(out)) == 60


def test_the_command_trains_and_tells(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = [word for word in TINY if not word.startswith(("--schedule", "--run"))]
    given = ("flip:demo", "--steps", 30, "--highest", 1, "--out", out)
    done = command(
        "frugal.common.find_learning_rate", *given, *small, f"--data.train={scenes / 'train'}"
    )
    told = json.loads((out / "learning_rate.json").read_text())
    assert f"try --optimizer.learning-rate {told['suggested']:g}" in done.stdout
    lines = metrics(out)
    assert told["rates"] == [line["learning_rate"] for line in lines[: len(told["rates"])]]
    assert 1e-6 < told["steepest"] <= told["lowest"] <= 1
    words = ("flip:demo", "--steps", 20, "--highest", 1, "--out", out, *small)
    said = command(
        "frugal.common.find_learning_rate", *words, f"--data.train={scenes / 'train'}", expect=2
    ).stderr
    assert f"{out} holds the steps of another recipe, or other rates; choose another --out" in said
    said = command("frugal.common.find_learning_rate", "flip:none", expect=2).stderr
    assert "there is no recipe 'none'" in said
