"""Results belong together, replace nothing else, and hold no number that JSON has not."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluated import recipe

from frugal.common import files
from frugal.common.engine.evaluator import last_evaluated
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Measure, SampleResults
from frugal.common.evaluation.results import COLUMNS, Subject, append, check_free, write
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.recipe_json import to_json
from frugal.common.report.compare import read_measured

SUBJECT = Subject(
    "runs/a", "step", {"weights_sha256": "w", "config_digest": "c", "checkpoint": "runs/a"}
)


def found(seed: int = 0) -> SampleResults:
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(2, (9,), generator=generator, dtype=torch.uint8)
    return SampleResults(
        {"data_sha256": "d"}, 9, {"right": right}, {"top1": Measure("mean", "right")}
    )


def written(out: Path, numbers: dict, *, seed: int = 0, **options) -> Path:
    write(ZeroShot(data=Path("/data/a"), **options), numbers, found(seed), SUBJECT, out, {})
    return out


def strictly(path: Path) -> dict:
    """As other languages read JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_number_that_is_none_is_null_wherever_it_stands(tmp_path: Path) -> None:
    write(
        ZeroShot(data=Path("/data/a")),
        {"zero_shot_roc_auc": float("nan"), "zero_shot_top1": 0.5},
        replace(found(), facts={"average_precision": [float("inf"), 0.25]}),
        SUBJECT,
        tmp_path,
        {},
    )
    content = strictly(tmp_path / "zero_shot.json")
    assert content["zero_shot_roc_auc"] is None
    assert content["zero_shot_measured"]["average_precision"] == [None, 0.25]
    assert read_measured("a", tmp_path).tasks["zero_shot"].facts["average_precision"][0] is None


def test_files_of_two_measurements_are_not_taken_for_one(tmp_path: Path) -> None:
    one = written(tmp_path / "one", {"zero_shot_top1": 0.1}, seed=1)
    two = written(tmp_path / "two", {"zero_shot_top1": 0.2}, seed=2)
    assert read_measured("one", one).facts["zero_shot"]["weights_sha256"] == "w"
    shutil.copy(two / "zero_shot.outcomes.safetensors", one / "zero_shot.outcomes.safetensors")
    with pytest.raises(InputError, match=r"are not of one measurement .* measure again"):
        read_measured("one", one)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = written(tmp_path, {"zero_shot_top1": 0.1}, seed=1)
    append(out / "results.csv", [{"model": "a", "acc1": 0.1}])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        InputError, match=r"cannot be written \(No space left on device, [\d,.]+ MiB"
    ):
        written(tmp_path, {"zero_shot_top1": 0.2}, seed=2)
    with pytest.raises(InputError, match=r"cannot be added to .*\(No space left on device"):
        append(out / "results.csv", [{"model": "b", "acc1": 0.2}])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_rows_are_whole_beside_what_others_wrote(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text("\ufeff" + ",".join(COLUMNS) + "\nmine,without an end of line", "utf-8")
    append(table, [{"model": "new", "acc1": float("nan"), "acc5": 0.5}])
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["mine", "new"]
    assert (rows[1]["acc1"], rows[1]["acc5"]) == ("", "0.5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Path("/data/b")}, "was measured on /data/a, and would be replaced"),
        ({"weights_sha256": "other"}, "with the other weights of runs/a"),
        ({"config_digest": "other"}, "with the other weights of runs/a"),
    ],
)
def test_other_data_and_other_weights_need_a_name_of_their_own(
    change: dict, message: str, tmp_path: Path
) -> None:
    out = written(tmp_path, {"zero_shot_top1": 0.1})
    options = {"step": None, "trained_on": {}}
    same = ZeroShot(data=Path("/data/../data/a"), templates="name")
    check_free(same, SUBJECT, out, **options)
    task = replace(same, **{name: v for name, v in change.items() if name == "data"})
    facts = SUBJECT.facts | {n: v for n, v in change.items() if n != "data"}
    with pytest.raises(InputError, match=message) as caught:
        check_free(task, replace(SUBJECT, facts=facts), out, **options)
    assert "--name" in str(caught.value)
    check_free(replace(task, name="mine"), replace(SUBJECT, facts=facts), out, **options)


def test_what_training_measured_is_known_by_its_step_and_the_data_of_the_recipe(
    tmp_path: Path,
) -> None:
    (tmp_path / "zero_shot.json").write_text('{"step": 10, "zero_shot_top1": 0.5}')
    task = ZeroShot(data=Path("/data/a"))
    check_free(task, SUBJECT, tmp_path, step=10, trained_on={"zero_shot": "/data/a"})
    with pytest.raises(InputError, match="after step 10"):
        check_free(task, SUBJECT, tmp_path, step=20, trained_on={"zero_shot": "/data/a"})
    with pytest.raises(InputError, match="on /data/b"):
        check_free(task, SUBJECT, tmp_path, step=10, trained_on={"zero_shot": "/data/b"})


def test_a_run_is_measured_on_data_that_it_is_given_later(tmp_path: Path, scenes: Path) -> None:
    run = SimpleNamespace(dir=tmp_path)
    plan = recipe()

    def last(*tasks) -> float:
        return last_evaluated(SimpleNamespace(evaluation=tasks, steps=20), run)

    assert last(ZeroShot(), Retrieval()) == float("inf")  # there is nothing to measure
    assert last(ZeroShot(data=scenes), Retrieval()) == -1
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "zero_shot.json").write_text(json.dumps({"step": 20, "data": str(scenes)}))
    assert last(ZeroShot(data=scenes), Retrieval()) == 20
    assert last(ZeroShot(data=scenes), Retrieval(data=scenes)) == -1
    with pytest.raises(InputError, match=r"would replace; give .* with --evaluation\.1\.name"):
        last(Retrieval(), ZeroShot(data=scenes / "zero_shot"))
    assert last(ZeroShot(data=scenes / "zero_shot", name="more")) == -1
    # files of earlier versions do not say their data; the run's recipe does
    (folder / "zero_shot.json").write_text(json.dumps({"step": 20}))
    assert last(ZeroShot(data=scenes)) == 20
    (folder / "zero_shot.json").write_text('{"step": 2')
    assert last(ZeroShot(data=scenes)) == -1
    assert to_json(ZeroShot()) and plan.evaluation == ()
