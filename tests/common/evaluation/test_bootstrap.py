"""What was found image by image: numbers again, numbers of drawn images, and models compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluated import recipe, telling
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from frugal.common.compare import Options, compare
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import (
    Measure,
    Outcomes,
    bootstrap,
    interval,
    load_outcomes,
    resampled,
)
from frugal.common.evaluation.comparison import compare as compare_models
from frugal.common.evaluation.comparison import read_measured
from frugal.common.evaluation.config import Compositional, LinearProbe, Retrieval, ZeroShot
from frugal.common.run import Run
from support import command


def made(num_images: int = 40) -> Outcomes:
    """Every kind of number, some of them of several rows per image."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(4, (num_images,), generator=generator)
    image = torch.randint(num_images, (3 * num_images,), generator=generator)
    tables = {
        "right": (torch.rand(num_images, generator=generator) < 0.6).to(torch.uint8),
        "labels": labels,
        "two": (labels < 1).to(torch.uint8),
        "margin": torch.randn(num_images, generator=generator).round(decimals=1),
        "found": (torch.rand(3 * num_images, generator=generator) < 0.4).to(torch.uint8),
        "image": image,
        "both": torch.randint(2, (num_images, 2), generator=generator).to(torch.uint8),
    }
    measures = {
        "mean": Measure("mean", "right"),
        "groups": Measure("mean_of_groups", "right", groups="labels"),
        "auc": Measure("roc_auc", "margin", groups="two"),
        "rows": Measure("mean", "found", image="image"),
        "halves": Measure("mean_of_means", "both"),
    }
    return Outcomes({"data_sha256": "x"}, num_images, tables, measures)


def slowly(outcomes: Outcomes, chosen: torch.Tensor) -> dict[str, float]:
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
    outcomes = Outcomes({}, 400, {"right": right}, {"mean": Measure("mean", "right")})
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
    again = load_outcomes(tmp_path / "a.safetensors")
    assert (again.facts, again.measures) == (outcomes.facts, outcomes.measures)
    for name in outcomes.measures:
        assert float(again.number(name)) == float(outcomes.number(name))
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="does not hold what an evaluation found") as caught:
        load_outcomes(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", [ZeroShot(), Retrieval(), Compositional(), LinearProbe()])
def test_every_number_that_is_a_share_comes_out_of_the_outcomes_again(
    task, scenes: Path, run: Run
) -> None:
    plan, kept = recipe(), []
    task = replace(task, data=scenes)
    if isinstance(task, LinearProbe):
        task = replace(task, weight_decay=0.01)
    numbers = task.evaluate(telling(plan), plan, run, keep=kept.append)
    (outcomes,) = kept
    shares = {name for name, value in numbers.items() if isinstance(value, float)}
    assert outcomes.measures.keys() == shares - {"linear_probe_weight_decay"}
    for name in outcomes.measures:
        assert float(outcomes.number(name)) == pytest.approx(numbers[name], abs=1e-9), name
    assert re.fullmatch("[0-9a-f]{64}", outcomes.facts["data_sha256"])
    json.dumps(outcomes.facts)


# Models compared.


def leave(folder: Path, outcomes: Outcomes, task: str = "zero_shot") -> Path:
    """An evaluation folder with one task."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes.save(folder / f"{task}.outcomes.safetensors")
    facts = {
        "checkpoint": f"<{folder.name}>",
        "weights_sha256": "f" * 64,
        "config_sha256": "c" * 64,
    }
    (folder / f"{task}.json").write_text(json.dumps({f"{task}_measured": facts}))
    return folder


def better(outcomes: Outcomes, count: int) -> Outcomes:
    """The same with some more images right."""
    right = outcomes.tables["right"].clone()
    right[(right == 0).nonzero()[:count, 0]] = 1
    return replace(outcomes, tables=outcomes.tables | {"right": right})


def test_differences_are_taken_on_the_same_drawn_images(tmp_path: Path) -> None:
    one, other = made(200), better(made(200), 20)
    strange = replace(one, facts={"data_sha256": "other"})
    models = [
        read_measured(name, leave(tmp_path / name, outcomes))
        for name, outcomes in (("a", one), ("b", other), ("c", one), ("d", strange))
    ]
    rows = {r.number: r for r in compare_models(models, times=300, confidence=0.9, seed=4)}
    first, second, same, elsewhere = rows["mean"].entries
    assert first.difference is None and elsewhere.difference is None
    assert second.difference[0] == pytest.approx(0.1)
    # paired: an image that is right in both adds nothing, so that the interval is narrow
    assert second.difference[2] - second.difference[1] < 0.7 * (first.high - first.low)
    assert second.differs and second.difference[1] > 0
    assert same.difference == (0, 0, 0) and not same.differs
    assert (same.low, same.high) == (first.low, first.high)
    assert first.low < first.value < first.high


def test_the_command_writes_a_page_and_numbers(tmp_path: Path, capsys) -> None:
    for name, count in (("first", 0), ("second", 9)):
        leave(tmp_path / name / "evaluation", better(made(), count))
    leave(tmp_path / "second" / "evaluation", made(), task="retrieval")
    folders = (tmp_path / "first", tmp_path / "second" / "evaluation")
    path = compare(Options(folders=folders, out=tmp_path / "out", resamples=50))
    page = path.read_text()
    assert "first and second" in page and "&lt;evaluation&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {row["task"] for row in content["numbers"]} == {"zero_shot", "retrieval"}
    means = next(row for row in content["numbers"] if row["number"] == "mean")
    assert means["models"][1]["difference"][0] == pytest.approx(9 / 40)
    assert "mean (40 images)" in capsys.readouterr().out
    again = compare(Options(folders=folders, out=tmp_path / "again", resamples=50))
    assert again.read_text() == page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}"], "there is only one folder to compare"),
        (["{a}", "{a}"], "a folder is given twice"),
        (["{a}", "{empty}"], "holds nothing to compare"),
        (["{a}", "{b}", "--names", "x"], "--names has 1 names for 2 folders"),
        (["{a}", "{b}", "--resamples", "0"], "--resamples is 0"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    words: list[str], message: str, tmp_path: Path
) -> None:
    leave(tmp_path / "a", made())
    leave(tmp_path / "b", made())
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("a", "b", "empty")}
    given = [word.format(**places) for word in words]
    if len(words) == 2 and "empty" in words[1]:  # once as users call it
        result = command("frugal.common.compare", *given, cwd=tmp_path, expect=2)
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr
        return
    flags = dict(zip(given[2::2], given[3::2], strict=True))
    options = {"names": (flags["--names"],)} if "--names" in flags else {}
    options |= {"resamples": int(flags["--resamples"])} if "--resamples" in flags else {}
    folders = tuple(Path(word) for word in given[:2])
    with pytest.raises(InputError, match=message):
        compare(Options(folders=folders, out=tmp_path / "out", **options))
