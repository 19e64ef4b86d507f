"""Curating for the next period while this one is trained on."""

import signal
from pathlib import Path

import pytest
from cit_runs import MODULE, pairs, words

from support import (
    ALONE,
    Launcher,
    kill_at_step,
    largest_difference,
    losses,
    saved_tensors,
    start,
    train,
    zero,
)  # fmt: skip

BACKGROUND = "--data.background"


@pytest.fixture(scope="module")
def ahead(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ahead") / "run"
    train(ALONE, run, BACKGROUND, small=words(pool), module=MODULE)
    return run


def test_only_the_weights_that_choose_are_older(ahead: Path, undisturbed: Path) -> None:
    found, newest = pairs(ahead), pairs(undisturbed)
    assert [len(part) for part in found] == [120] * 4
    assert found[0] == newest[0], "the first curation has no older weights"
    assert all(old != new for old, new in zip(found[1:], newest[1:], strict=True))


def test_weights_that_never_change_choose_the_same_in_the_background(
    pool: Path, tmp_path: Path
) -> None:
    found = []
    for name, more in (("now", ()), ("ahead", (BACKGROUND,))):
        run = tmp_path / name
        still = ("--optimizer.learning-rate=1e-30", "--optimizer.weight-decay=0")
        train(ALONE, run, *still, *more, small=words(pool), module=MODULE)
        found.append(pairs(run))
    assert found[0] == found[1]


@pytest.mark.parametrize("launcher", [zero(3)], ids=lambda launcher: launcher.name)
@pytest.mark.parametrize("save_every", [4, 5])
def test_a_killed_run_chooses_what_the_undisturbed_one_chose(
    launcher: Launcher, save_every: int, ahead: Path, pool: Path, tmp_path: Path
) -> None:
    # begun alone, continued from the middle or the end of a period by two processes
    run = tmp_path / "run"
    given = (BACKGROUND, f"--run.save-every={save_every}")
    process = start(ALONE, run, *given, small=words(pool), module=MODULE)
    kill_at_step(process, run, 2 * save_every + 1, signal.SIGKILL)
    train(launcher, run, BACKGROUND, small=words(pool), module=MODULE)
    assert pairs(run) == pairs(ahead)
    worst = max(abs(loss - losses(ahead)[step]) for step, loss in losses(run).items())
    assert worst < 1e-5
    assert largest_difference(saved_tensors(run), saved_tensors(ahead)) < 1e-5
