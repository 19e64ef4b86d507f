"""Methods compared under equal budgets: the file, the arithmetic, one that is killed."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from frugal.common.comparison.budgets import Price, relative, samples_of
from frugal.common.comparison.entries import (
    Entry,
    Stage,
    check_recipes,
    filled,
    read_entries,
    recipe_of,
)
from frugal.common.comparison.options import Options
from frugal.common.comparison.outcomes import (
    Cost,
    Point,
    cost_of,
    course_of,
    mean_and_spread,
    seconds_to,
    speed_of,
)
from frugal.common.errors import InputError
from support import QUICK, ROOT, TINY, command, environment

MODULE = "frugal.common.compare_methods"
SMALL: dict[str, Any] = {
    "groups": {"scenes": {"measured_by": "zero_shot_top1", "flags": ["--batch-size=24"]}},
    "entries": [
        {"name": "plain", "group": "scenes", "stages": [{"recipe": "flip:demo"}]},
        {
            "name": "two stages", "group": "scenes",
            "stages": [
                {"recipe": "flip:demo", "share": 0.75},
                {"recipe": "flip:demo-tuning", "share": 0.25},
            ],
        },
    ],
}  # fmt: skip


def written(folder: Path, content: Any) -> Path:
    path = folder / "compare.json"
    path.write_text(json.dumps(content))
    return path


# The file.


def test_the_file_that_is_shipped_names_recipes_and_flags_that_there_are() -> None:
    entries = read_entries(ROOT / "launch" / "compare.json")
    check_recipes(entries)
    assert len(entries) == 12 and entries[0].name == "plain CLIP"
    for entry in entries:
        for stage in entry.stages:
            recipe = recipe_of(stage)
            assert recipe.batch_size == 64 and recipe.model.image.grid in ((8, 8), (4, 4))
    # the same towers, so that only methods differ
    towers = {recipe_of(e.stages[-1]).model.image.width for e in entries}
    assert towers == {128}


def changed(path: str, value: Any) -> dict[str, Any]:
    """SMALL with another value at a path such as entries.0.name; None takes it away."""
    content = copy.deepcopy(SMALL)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inside: Any = content
    for part in way:
        inside = inside[part]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("entries", None, "has no 'entries'; add it"),
        ("entries", [], "entries of .* must be a list with something in it"),
        ("title", "x", "has 'title', which means nothing; choose from groups, entries"),
        ("groups.scenes.flags", "--a", "flags of the group 'scenes' of .* must be a list of words"),
        ("groups.scenes.equal", ["memory"], r"equal of .* is \['memory'\]; give some of time, fl"),
        ("groups.scenes.color", "red", "the group 'scenes' of .* has 'color', which means nothing"),
        ("entries.1.name", "Plain!", "'plain' and 'Plain!', whose runs would have one folder"),
        ("entries.1.name", "?", "has no letter or digit in its name"),
        ("entries.1.group", "photos", "is of the group 'photos'; choose from scenes"),
        ("entries.1.stages.0.share", 0.5, "shares of the entry 'two stages' .* add up to 0.75"),
        ("entries.1.stages.0.share", True, "share of stage 1 of .* is True; give a part of 1"),
        ("entries.1.stages.0.recipe", "flip", "recipe of stage 1 of .* is 'flip'; give PROGRAM:NA"),
        ("entries.1.stages.0.speed", 2, "stage 1 of .* has 'speed', which means nothing"),
        ("entries.1.stages.0.flags", ["{run:x}"], r"speaks of \{run:x\}; name an entry above it"),
        ("entries.1.before", [["rm"]], "before of .* has 'rm'; begin each list with one of Frugal"),
        ("entries.1.probe", {"recipe": "a:b", "samples": 0}, "samples of the probe of .* is 0; gi"),
        ("entries.0", SMALL["entries"][1] | {"name": "b"}, "the first entry of .*; give it one st"),
    ],
)  # fmt: skip
def test_each_mistake_in_a_file_is_one_sentence(
    tmp_path: Path, path: str, value: Any, said: str
) -> None:
    file = written(tmp_path, changed(path, value))
    with pytest.raises(InputError, match=said) as found:
        read_entries(file)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--no.such=1"], "stage 2 of the entry 'two stages': there is no --no.such in this recip"),
        (["--schedule.samples=7"], "has --schedule.samples, which a comparison sets itself"),
        (["--run.start_from=x"], "has --run.start-from, which a comparison sets itself"),
    ],
)
def test_flags_that_a_recipe_does_not_have_or_that_are_set_here_are_refused(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    file = written(tmp_path, changed("entries.1.stages.1.flags", flags))
    with pytest.raises(InputError, match=said):
        check_recipes(read_entries(file))


def test_a_recipe_that_there_is_not_ends_the_command_with_one_sentence(tmp_path: Path) -> None:
    file = written(tmp_path, changed("entries.1.stages.1.recipe", "flip:none"))
    done = command(MODULE, file, "--out", tmp_path / "out", expect=2)
    assert "error: stage 2 of the entry 'two stages': there is no recipe 'none'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_places_are_filled_and_other_braces_stay() -> None:
    words = ["--a={run:FLIP}", "{here}/vectors", "{run}", "laion/{00000..00009}.tar"]
    found = filled(words, runs={"FLIP": Path("f")}, run=Path("own"), here=Path("here"))
    assert found == ["--a=f", "here/vectors", "own", "laion/{00000..00009}.tar"]


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="--equal is 'memory'; give time, flops or both"):
        Options(equal=("memory",))
    with pytest.raises(InputError, match="--target has a number that is no accuracy above 0"):
        Options(target=(70.0,))
    with pytest.raises(InputError, match="--trial-steps is 5; give at least 6"):
        Options(trial_steps=5)


# Budgets.


def price(speed: float, flops: float) -> Price:
    return Price(
        speed=speed, flops_per_sample=flops, samples_per_second=100 * speed,
        evaluation_seconds=1.0, other_seconds=1.0,
    )  # fmt: skip


def test_a_trial_is_measured_by_the_first_entrys_right_before_and_behind_it() -> None:
    speeds = [100.0, 150.0, 90.0, 50.0, 40.0, 50.0]
    first = [0, 3, 5]  # the machine was half as fast in the end
    assert relative(speeds, 1, first=first) == pytest.approx(150 / 75)
    assert relative(speeds, 4, first=first) == pytest.approx(40 / 50)
    assert relative(speeds[:2], 1, first=[0]) == pytest.approx(1.5)


def test_budgets_are_shared_by_cost_and_given_in_whole_batches() -> None:
    stages = (
        Stage(recipe="a:b", flags=(), share=0.8), Stage(recipe="a:c", flags=(), share=0.2)
    )  # fmt: skip
    entry = Entry(name="e", group="g", stages=stages, measured_by="n")
    prices, first = [price(3.0, 10.0), price(0.5, 50.0)], price(1.0, 40.0)

    def given(kind: str, samples: int = 10_000) -> list[int]:
        return samples_of(
            entry, prices, first=first, samples=samples, kind=kind, batch_sizes=[64, 100]
        )

    # 0.8 x 10,000 x 3 = 24,000 = 375 x 64; 0.2 x 10,000 x 0.5 = 1,000
    assert given("time") == [24_000, 1_000]
    # 0.8 x 10,000 x 40 / 10 = 32,000 = 500 x 64; 0.2 x 10,000 x 40 / 50 = 1,600
    assert given("flops") == [32_000, 1_600]
    # what is spent is what the first entry spends
    spent = sum(count * p.flops_per_sample for count, p in zip(given("flops"), prices, strict=True))
    assert spent == 10_000 * first.flops_per_sample
    with pytest.raises(InputError, match="e would train a:c on 10 samples, less than a batch of 1"):
        given("time", samples=100)


# What runs say.


def test_between_log_lines_steps_are_alike_and_the_first_line_is_no_speed() -> None:
    cost = Cost(((0.0, 0.0, 0.0), (100.0, 10.0, 1e3), (300.0, 14.0, 3e3)), memory_bytes=1)
    assert cost.at(50) == (5.0, 500.0) and cost.at(200) == (12.0, 2e3) and cost.at(300) == (14, 3e3)
    assert speed_of(cost) == (50.0, 10.0)


def test_a_target_is_reached_at_an_evaluation_and_never_between_two() -> None:
    course = [Point(1, 10.0, 1, 0.2), Point(2, 20.0, 2, 0.8), Point(3, 30.0, 3, 0.6)]
    assert seconds_to(0.2, course) == 10.0
    assert seconds_to(0.21, course) == 20.0 and seconds_to(0.8, course) == 20.0
    assert seconds_to(0.81, course) is None


def test_one_seed_has_no_spread() -> None:
    assert mean_and_spread([3.0]) == (3.0, 0.0)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


# A small comparison, killed in between.


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def file(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    decided = ("--schedule", "--run", "--batch-size")
    tasks = [f"--evaluation.{number}.data={scenes}" for number in range(3)]
    flags = [word for word in TINY if not word.startswith(decided)]
    flags += ["--batch-size=24", f"--data.train={scenes / 'train'}", *tasks]
    content = changed("groups.scenes.flags", flags)
    return written(tmp_path_factory.mktemp("small"), content)


def words(file: Path, out: Path) -> list[str]:
    return [
        str(file), f"--out={out}", "--samples=240", "--trial-steps=6", "--evaluations=2",
        "--target", "0.01", "1.0", "--launch", f"{QUICK / 'python'} -m",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(file: Path) -> tuple[Path, dict[Path, bytes], str]:
    """A comparison that was killed and went on: its folder, what was complete, what was said."""
    out = file.parent / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *words(file, out)], cwd=ROOT, start_new_session=True,
        env=environment(quick=True), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    begun = out / "runs" / "two-stages" / "time" / "seed-0" / "1-demo" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (begun.is_file() and begun.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (begun.parent.with_name("1-demo.done.json")).exists()
    done = contents(out / "trial") | contents(out / "runs" / "plain")
    done |= {out / "trial.json": (out / "trial.json").read_bytes()}
    said = command(MODULE, *words(file, out)).stdout
    return out, done, said


def test_what_was_complete_is_not_touched_when_a_comparison_goes_on(
    compared: tuple[Path, dict[Path, bytes], str],
) -> None:
    out, done, said = compared
    assert len(done) > 40 and all(path.read_bytes() == held for path, held in done.items())
    assert contents(out / "trial") | contents(out / "runs" / "plain") == {
        path: held for path, held in done.items() if path.name != "trial.json"
    }
    assert "short trials" not in said and "[3/3] two stages (equal FLOPs, seed 0)" in said


def test_results_say_what_the_run_directories_say(
    compared: tuple[Path, dict[Path, bytes], str],
) -> None:
    out, _, said = compared
    results = json.loads((out / "results.json").read_text())
    assert [(r["entry"], r["equal"]) for r in results["results"]] == [
        ("plain", "first"), ("two stages", "time"), ("two stages", "flops")
    ]  # fmt: skip
    assert results["machine"]["cores"] and results["machine"]["packages"]["torch"]
    for result in results["results"]:
        runs = [Path(run) for run in result["runs"]]
        costs = [cost_of(run) for run in runs]
        lines = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
        assert result["samples"] == sum(json.loads(each[-1])["samples"] for each in lines)
        assert result["seconds"] == pytest.approx(sum(cost.seconds for cost in costs))
        measured = json.loads((runs[-1] / "evaluation" / "zero_shot.json").read_text())
        assert result["value"] == measured["zero_shot_top1"] == result["course"][-1]["value"]
        assert result["course"][-1]["seconds"] == pytest.approx(result["seconds"])
        assert len(result["course"]) >= 2
        assert result["minutes_to"]["1"] is None
        assert (
            result["minutes_to"]["0.01"]
            == seconds_to(0.01, course_of(runs, [*map(cost_of, runs)], "zero_shot_top1")) / 60
        )
        assert f"{result['value']:.1%}" in said
    first, _, flops = results["results"]
    # whole batches of 24 beside 240 samples, each of a stage's own
    assert flops["flops"] == pytest.approx(first["flops"], rel=0.2)
    trials = results["trials"]
    share = 0.75 * 240 * trials["two stages"][0]["speed"]
    begun = json.loads((Path(results["results"][1]["runs"][0]) / "recipe.json").read_text())
    assert begun["schedule"]["samples"] == 24 * round(share / 24)
    tuned = json.loads((Path(results["results"][1]["runs"][1]) / "recipe.json").read_text())
    assert tuned["run"]["start_from"] == results["results"][1]["runs"][0]


def test_a_table_a_page_and_a_picture_are_written(
    compared: tuple[Path, dict[Path, bytes], str],
) -> None:
    out, _, said = compared
    assert "minutes to 100%" in said and "not reached" in said and "swap obj" in said
    table = (out / "compare.md").read_text()
    assert "| two stages |" in table and "Equal FLOPs:" in table
    page = (out / "compare.html").read_text()
    assert "Equal time: accuracy against minutes of training" in page and "<figure>" in page
    picture = ElementTree.parse(out / "compare.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in (out / "compare.svg").read_text()


def test_another_comparison_is_not_mixed_with_one_that_is_there(
    compared: tuple[Path, dict[Path, bytes], str], file: Path
) -> None:
    out, _, _ = compared
    said = command(MODULE, file, f"--out={out}", "--samples=480", expect=2).stderr
    assert f"{out} holds a comparison of other entries, samples, evaluations or trial steps" in said


def test_a_run_that_fails_ends_the_comparison_with_its_own_words(file: Path) -> None:
    content = json.loads(file.read_text())
    content["groups"]["scenes"]["flags"] += ["--data.train=/nowhere"]
    folder = file.parent / "failing"
    folder.mkdir()
    given = words(written(folder, content), folder / "out")
    said = command(MODULE, *given, expect=1).stderr
    assert "error: plain (trial, seed 0): flip:demo ended with exit code 2" in said
    assert "/nowhere" in said.partition("its last lines:")[2]
