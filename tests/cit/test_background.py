"""Curating for the next period while this one is trained on."""

import signal
from pathlib import Path

import pytest
from cit_runs import MODULE, pairs, words

from forks import fork
from support import (
    ALONE,
    ROOT,
    Launcher,
    environment,
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


SLOW = """
import threading
import time
from frugal.cit.curation import Curator
from frugal.common.replay import main

honest = Curator.curate


def slow(*words, **more):
    found = honest(*words, **more)
    if threading.current_thread() is not threading.main_thread():
        time.sleep(1)
        print("chosen in the background", flush=True)
    return found


Curator.curate = slow
main()
"""
"""A replay on a machine that curates slowly."""


def test_who_stops_reading_leaves_nothing_behind_that_computes(pool: Path, tmp_path: Path) -> None:
    run, script, log = tmp_path / "run", tmp_path / "slow.py", tmp_path / "log"
    given = (BACKGROUND, "--run.digests", "--run.save-every=5", "--run.keep=3")
    train(ALONE, run, *given, "--schedule.samples=360", small=words(pool), module=MODULE)
    script.write_text(SLOW)
    process = fork(
        str(script), [str(run), "--step=6"], log=log, cwd=ROOT, environments=[environment()]
    )
    # Python cannot end a thread that is in torch, and is aborted instead
    assert process.wait(timeout=120) == 0
    assert "chosen in the background" in log.read_text()
    assert "steps 6 to 6 agree" in log.read_text()
