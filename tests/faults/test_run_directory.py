"""What is in a run directory decides what may be continued there, and it is told."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forks import fork
from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.errors import InputError
from frugal.common.history import read_history
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import load_recipe, to_json
from frugal.common.run import Run, lock_run_dir
from frugal.common.train import continued_recipe, train_recipe
from frugal.flip.recipes import RECIPES
from support import ALONE, DDP, ROOT, newest, train


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    plain = RECIPES["demo"]()
    return replace(plain, run=replace(plain.run, dir=tmp_path / "run"))


def write_run(recipe: Recipe, *, step: int | None) -> Path:
    """What a run leaves behind, with a checkpoint or without."""
    folder = recipe.run.dir
    assert folder is not None
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    if step is not None:
        run = Run(folder, 0, 1, 0, torch.device("cpu"), logging.getLogger("test"))
        state = {"step": step, "recipe": to_json(recipe)}
        CheckpointStore(run, keep=2).save({"weight/a": torch.ones(2)}, state)
    return folder


def test_a_run_that_never_wrote_a_checkpoint_does_not_block_the_corrected_command(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(recipe, step=None)
    corrected = replace(recipe, batch_size=2 * recipe.batch_size)
    assert continued_recipe(corrected) == corrected
    (folder / "recipe.json").write_text("{cut")
    assert continued_recipe(corrected) == corrected


def test_more_samples_point_to_start_from(recipe: Recipe) -> None:
    folder = write_run(recipe, step=5)
    longer = replace(recipe, schedule=replace(recipe.schedule, samples=10**9))
    with pytest.raises(InputError, match=rf"schedule\.samples.*--run\.start-from {folder}"):
        continued_recipe(longer)


def test_the_limit_of_damage_and_of_waiting_may_be_raised(recipe: Recipe) -> None:
    write_run(recipe, step=5)
    patient = replace(recipe, data=replace(recipe.data, max_damaged=0.9, timeout_minutes=99.0))
    assert continued_recipe(patient) == patient


@pytest.mark.parametrize("content", [None, b"", b"{cut", bytes(range(256)), b"[1]"])
def test_without_its_recipe_a_run_is_known_by_its_checkpoint(
    recipe: Recipe, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(recipe, step=5)
    (folder / "recipe.json").unlink()
    if content is not None:
        (folder / "recipe.json").write_bytes(content)
    assert continued_recipe(recipe) == recipe
    with pytest.raises(InputError, match="batch_size was"):
        continued_recipe(replace(recipe, batch_size=2 * recipe.batch_size))


SEES = """
import sys
import torch.distributed as dist
from frugal.common.cli import run_politely
from frugal.common.data.contents import check_same_data
from frugal.common.data.contents import Part, streamed_contents
rank = int(sys.argv[1])
dist.init_process_group("gloo")
check_same_data(streamed_contents([["/disk%d/0.tar" % rank]]))
other = [[Part("0.tar", 5 + rank, "")]]
run_politely(lambda: check_same_data(other))
"""


def test_a_process_that_sees_other_data_is_named(tmp_path: Path) -> None:
    script, log = tmp_path / "sees.py", tmp_path / "log"
    script.write_text(SEES)
    process = fork(str(script), ["{rank}"], log=log, cwd=ROOT, environments=DDP.environments())
    assert process.wait(timeout=60) == 2
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert "process 1 of 2 sees another copy than process 0 (6 samples in 1 shards" in line
    assert "where there are 5 samples in 1 shards" in line and "process 1 is on" in line


@pytest.mark.parametrize(
    ("moment", "goes_on", "refusal"),
    [
        ("_require_same_run", False, r"another recipe \(run.seed was 1 and is now 2\)"),
        ("rehearse", False, "has trained a run in .* while this one was starting"),
        ("rehearse", True, "is being trained by another process"),
    ],
)
def test_of_two_that_start_at_once_one_trains_and_the_other_changes_nothing(
    moment: str,
    goes_on: bool,
    refusal: str,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one does all that it does while this one is at a moment of its start."""
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=72")
    locks = []

    def other(*_: object) -> None:
        train(ALONE, run, *words, "--run.seed=1")
        if goes_on:
            locks.append(lock_run_dir(run, patience=0.0, log=logging.getLogger("test")))

    said = train(ALONE, tmp_path / "alike", *words, "--run.seed=2")
    assert "step 3 of 3" in said
    recipe = load_recipe(tmp_path / "alike" / "recipe.json")
    recipe = replace(recipe, run=replace(recipe.run, dir=run))
    monkeypatch.setattr(f"frugal.common.train.{moment}", other)
    with pytest.raises(InputError, match=refusal):
        train_recipe(recipe)
    assert load_recipe(run / "recipe.json").run.seed == 1
    assert [line["event"] for line in read_history(run)] == ["began", "saved", "ended"]
    assert newest(run).name == "step_000000003"
    assert all(lock is not None for lock in locks)
