"""A run that ends because nothing gets better any more."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.errors import InputError
from frugal.flip.recipes import demo
from support import ALONE, DDP, Launcher, losses, newest, train

STILL = (
    "--optimizer.learning-rate=1e-12", "--run.best=image_retrieval_recall_at_5",
    "--run.evaluate-every=3", "--run.save-every=20", "--run.keep=1",
)  # fmt: skip
"""At this rate no number of an evaluation changes."""


@pytest.mark.parametrize("launcher", [ALONE, DDP], ids=lambda launcher: launcher.name)
def test_a_run_ends_when_so_many_evaluations_brought_nothing_better(
    launcher: Launcher, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", f"--evaluation.1.data={scenes}", *STILL)
    said = train(launcher, run, *words, "--run.patience=2")
    assert "2 evaluations behind step 3 brought no higher image_retrieval_recall_at_5" in said
    assert "the run ends after step 9 of 20" in said and "Traceback" not in said
    assert list(losses(run)) == list(range(1, 10)) and newest(run).name == "step_000000009"
    assert find_checkpoint(run / "checkpoints" / "best.json").step == 3
    # the same command takes no step more, and more patience does
    again = train(launcher, run, *words, "--run.patience=2")
    assert "the run ends after step 9 of 20" in again and list(losses(run))[-1] == 9
    assert "after step 12 of 20" in train(launcher, run, *words, "--run.patience=3")


def test_a_run_that_gets_better_goes_on_to_its_end(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", f"--evaluation.1.data={scenes}", *STILL)
    train(ALONE, run, *words, "--run.patience=7")
    assert newest(run).name == "step_000000020"
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] == "step_000000003"
    lines = [json.loads(line) for line in (run / "evaluation" / "history.jsonl").open()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    last = json.loads((run / "evaluation" / "retrieval.json").read_text())
    assert lines[-1] == {"task": "retrieval", **last}


def test_patience_needs_something_that_may_get_better() -> None:
    recipe = demo()
    for changes in ({}, {"best": "zero_shot_top1"}, {"evaluate_every": 5}):
        with pytest.raises(InputError, match="nothing says what is to get better"):
            replace(recipe, run=replace(recipe.run, patience=2, **changes))
