"""What was found image by image: numbers again, numbers of drawn images, and models compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluated import made, recipe, telling
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import (
    Measure,
    SampleResults,
    bootstrap,
    interval,
    load_sample_results,
    resampled,
)
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of


def slowly(outcomes: SampleResults, chosen: torch.Tensor) -> dict[str, float]:
    """The numbers of drawn images, from copies of their rows."""
    tables = outcomes.tables
    right, labels = tables["right"][chosen], tables["labels"][chosen]
    rows = torch.cat([(tables["image"] == one).nonzero()[:, 0] for one in chosen])
    return {
        "mean": float(right.double().mean()),
        "groups": balanced_accuracy_score(labels, torch.where(right.bool(), labels, -1)),
        "auc": roc_auc_score(tables["two"][chosen], tables["margin"][chosen]),
        "rows": float(tables["found"][rows].double().mean()),
        "halves": float(tables["both"][chosen].double().mean()),
    }


@pytest.mark.filterwarnings("ignore:y_pred contains")
def test_a_number_of_drawn_images_is_that_of_copies_of_their_rows() -> None:
    outcomes = made()
    everything = torch.arange(40)
    for name, value in slowly(outcomes, everything).items():
        assert float(outcomes.number(name)) == pytest.approx(value, abs=1e-12), name
    drawn = torch.randint(40, (40,), generator=torch.Generator().manual_seed(0))
    without_a_class = drawn[outcomes.tables["labels"][drawn] != 2]
    for chosen in (drawn, without_a_class):
        weights = torch.bincount(chosen, minlength=40)[None].double()
        for name, value in slowly(outcomes, chosen).items():
            assert float(outcomes.number(name, weights)) == pytest.approx(value, abs=1e-12), name


def test_draws_have_as_many_images_as_there_are_and_come_from_the_generator_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(list(resampled(30, times=7, generator=generator)))

    first = draw(1)
    assert first.shape == (7, 30) and (first.sum(1) == 30).all()
    monkeypatch.setattr("frugal.common.evaluation.bootstrap._AT_ONCE", 64)
    assert torch.equal(draw(1), first)  # however many are held at a time
    assert not torch.equal(draw(2), first)


def test_the_interval_of_a_mean_is_as_wide_as_statistics_say() -> None:
    right = torch.zeros(400, dtype=torch.uint8)
    right[:100] = 1
    outcomes = SampleResults({}, 400, {"right": right}, {"mean": Measure("mean", "right")})
    generator = torch.Generator().manual_seed(0)
    drawn = bootstrap([outcomes], "mean", times=4_000, generator=generator)[0]
    deviation = math.sqrt(0.25 * 0.75 / 400)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.05)
    low, high = interval(drawn)
    assert low == pytest.approx(0.25 - 1.96 * deviation, abs=0.004)
    assert high == pytest.approx(0.25 + 1.96 * deviation, abs=0.004)
    narrow = interval(drawn, 0.5)
    assert low < narrow[0] < narrow[1] < high


def test_outcomes_survive_their_file_and_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    outcomes = made()
    outcomes.save(tmp_path / "a.safetensors")
    again = load_sample_results(tmp_path / "a.safetensors")
    assert (again.facts, again.measures) == (outcomes.facts, outcomes.measures)
    for name in outcomes.measures:
        assert float(again.number(name)) == float(outcomes.number(name))
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="does not hold what an evaluation found") as caught:
        load_sample_results(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", [ZeroShot(), Retrieval(), Compositional(), LinearProbe()])
def test_every_number_that_is_a_share_comes_out_of_the_outcomes_again(
    task, scenes: Path, run: Run
) -> None:
    plan, kept = recipe(), []
    task = replace(task, data=scenes)
    if isinstance(task, LinearProbe):
        task = replace(task, weight_decay=0.01)
    numbers = task.evaluate(bundle_of(telling(plan), plan), run, keep=kept.append)
    (outcomes,) = kept
    shares = {name for name, value in numbers.items() if isinstance(value, float)}
    assert outcomes.measures.keys() == shares - {"linear_probe_weight_decay"}
    for name in outcomes.measures:
        assert float(outcomes.number(name)) == pytest.approx(numbers[name], abs=1e-9), name
    assert re.fullmatch("[0-9a-f]{64}", outcomes.facts["data_sha256"])
    json.dumps(outcomes.facts)
