"""What run directories say of themselves."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from reported import REPORT, Page, finished_run, log, small_recipe, steps

from frugal.common.errors import InputError
from frugal.common.report import write_report
from frugal.common.report.collect import collect_numbers, find_stages, read_metrics
from support import command


def test_broken_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"samples": 1}\n[3]\n{"step": 2}\n\xff\xfe\n{"samples": 2, "loss": NaN}\n{"sam'
    )
    assert [line["samples"] for line in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_single_run_is_a_stage_of_its_own(scenes: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one", small_recipe(scenes), seconds=2.0)
    assert find_stages(run) == {"one": run}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "zero_shot.json").write_text('{"step": 10, "zero_shot_top1": 0.5}')
    numbers = collect_numbers({"one": run})
    assert numbers["zero_shot_top1"] == 0.5
    assert numbers["text_retrieval_recall_at_1"] is None
    assert "step" not in numbers


def test_weights_that_were_exported_beside_runs_are_passed_over(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished_run(tmp_path / "one", small_recipe(scenes), seconds=2.0)
    export = tmp_path / "one-timm"
    export.mkdir()
    (export / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    (export / "model.safetensors").touch()
    logging.getLogger("frugal").propagate = True  # which the run has turned off
    assert find_stages(tmp_path) == {"one": run}
    assert f"{export} holds no checkpoint and no log of a run" in caplog.text


def test_a_run_whose_recipe_cannot_be_read_is_passed_over_beside_others(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished_run(tmp_path / "one", small_recipe(scenes), seconds=2.0)
    broken = finished_run(tmp_path / "two", small_recipe(scenes), seconds=2.0)
    (broken / "recipe.json").write_text('{"type": ')
    logging.getLogger("frugal").propagate = True
    assert find_stages(tmp_path) == {"one": run}
    assert f"{broken} is passed over: {broken / 'recipe.json'} is not a recipe" in caplog.text
    (run / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match=r"(does not hold|is not) a recipe"):
        find_stages(tmp_path)


def test_samples_per_second_are_those_of_the_log_and_not_of_the_whole_time(
    scenes: Path, tmp_path: Path
) -> None:
    recipe = replace(small_recipe(scenes), evaluation=())
    runs = {
        name: finished_run(tmp_path / name, recipe, seconds=500.0) for name in ("first", "second")
    }
    log(runs["first"], [{"step": 4, "samples": 256, "samples_per_second": 128.0}])  # 2 s
    lines = [
        {"step": 2, "samples": 128, "samples_per_second": 32.0},  # 4 s
        {"step": 10, "samples": 640, "samples_per_second": 256.0},  # 2 s
        {"step": 11, "samples": 704, "samples_per_second": None},
    ]
    log(runs["second"], lines)
    numbers = collect_numbers(runs)
    assert numbers["samples_per_second"] == pytest.approx((256 + 640) / (2 + 4 + 2))
    assert numbers["train_seconds"] == 1000.0
    (runs["first"] / "metrics.jsonl").unlink()
    (runs["second"] / "metrics.jsonl").unlink()
    assert collect_numbers(runs)["samples_per_second"] is None


def test_numbers_of_another_step_are_left_out_and_named(scenes: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one", small_recipe(scenes), seconds=2.0)
    (run / "evaluation").mkdir()
    for name, step in (("zero_shot", 5), ("retrieval", 10)):
        content = {"step": step, f"{name}_top1": 0.5}
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    numbers = collect_numbers({"one": run})
    assert numbers["retrieval_top1"] == 0.5
    assert numbers["zero_shot_top1"] is None
    assert numbers["not_measured"] == {
        "zero_shot": "measured after step 5, not 10",
        "compositional": "it was not measured",
    }


def test_what_was_damaged_or_passed_over_is_on_the_page(scenes: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one", replace(small_recipe(scenes), evaluation=()), seconds=2.0)
    read = {"read_samples": 700, "damaged": {"image": 41, "<checksum>": 19}}
    log(run, [*steps(9), {"step": 10, "samples": 640, "passed_over": {"no format": 7}, **read}])
    numbers = collect_numbers({"one": run})
    assert numbers["read_samples"] == 700
    assert numbers["damaged"] == {"image": 41, "<checksum>": 19}
    assert numbers["passed_over"] == {"no format": 7}
    path = write_report(tmp_path / "page", numbers=numbers, stages={"one": run})
    page = Page(path.read_text())
    assert "damaged image 41 of 700 read" in page.text
    assert "damaged <checksum> 19 of 700 read" in page.text
    assert "passed over no format 7" in page.text


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        find_stages(tmp_path)
    result = command(REPORT, tmp_path / "nowhere", expect=2)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
