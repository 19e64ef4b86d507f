"""The report as users ask for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from reported import REPORT, Page, finished_run, small_recipe

from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.recipe import Reductions, RunOptions
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.text import Truncate
from frugal.common.report.collect import find_stages
from support import command


def test_the_command_reports_on_the_stages_of_a_run(scenes: Path, tmp_path: Path) -> None:
    masked = small_recipe(scenes)
    whole = replace(
        masked,
        reduction=Reductions(image=KeepAll(), text=Truncate()),
        run=RunOptions(start_from=tmp_path / "z_masked"),
    )
    finished_run(tmp_path / "z_masked", masked, seconds=3.0)
    last = finished_run(tmp_path / "a_whole", whole, seconds=1.0)
    assert list(find_stages(tmp_path)) == ["z_masked", "a_whole"]
    refused = command(REPORT, tmp_path, expect=2)
    assert "was not evaluated yet" in refused.stderr
    assert not (tmp_path / "report.html").exists()

    (last / "evaluation").mkdir()
    for name, numbers in {
        "zero_shot": {"zero_shot_top1": 0.7, "zero_shot_top1_held_out": 0.5},
        "retrieval": {
            "image_retrieval_recall_at_1": 0.3,
            "text_retrieval_recall_at_1": 0.2,
            "retrieval_candidates": 40,
        },
        "compositional": {"compositional_add_obj": 0.625, "compositional_mean": 0.75},
    }.items():
        content = {"step": 10, "samples": 640, **numbers}
        (last / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    words = ("--examples", "4", "--next", "watch: tensorboard --logdir runs")
    result = command(REPORT, tmp_path, *words)
    assert "watch:\n    tensorboard --logdir runs\n" in result.stdout
    assert "compositional_mean  0.75\n" in result.stdout
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == {
        "compositional_add_obj": 0.625,
        "compositional_mean": 0.75,
        "zero_shot_top1": 0.7,
        "zero_shot_top1_held_out": 0.5,
        "image_retrieval_recall_at_1": 0.3,
        "text_retrieval_recall_at_1": 0.2,
        "retrieval_candidates": 40,
        "samples_seen": 1280,
        "train_seconds": 4.0,
        "samples_per_second": pytest.approx(400.0),  # as logged; the seconds hold evaluations
        "world_size": 2,
        "engine": "deepspeed",
    }
    page = Page((tmp_path / "report.html").read_text())
    assert "25.0 % of the patches" in page.text.replace("\u2009", " ")  # the first stage's mask
    assert len(page.all("img")) == 2 * 2 + 4 + 2 + 2
    assert "add 62.5" in page.text
    assert "How patches are chosen" not in page.text  # its masking draws nothing
    assert len(page.all("svg")) == 4

    command(REPORT, tmp_path, *words, "--out", tmp_path / "elsewhere" / "page")
    for name in ("report.html", "report.json"):
        elsewhere = tmp_path / "elsewhere" / "page" / name
        assert elsewhere.read_bytes() == (tmp_path / name).read_bytes()


def test_a_run_that_was_given_no_data_to_measure_is_reported_on(
    scenes: Path, tmp_path: Path
) -> None:
    recipe = replace(small_recipe(scenes), evaluation=(ZeroShot(), Retrieval(name="coco")))
    run = finished_run(tmp_path / "one", recipe, seconds=2.0)
    result = command(REPORT, run)
    assert "the report has no numbers of zero_shot: it was given no data" in result.stderr
    saved = json.loads((run / "report.json").read_text())
    assert saved["not_measured"] == dict.fromkeys(("zero_shot", "coco"), "it was given no data")
    assert saved["zero_shot_top1"] is None
    assert "Not on this page: zero shot: it was given no data" in (run / "report.html").read_text()
