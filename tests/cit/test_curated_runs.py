"""Whole runs that choose their own pairs: on any processes, interrupted or not, all alike."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from cit_runs import MODULE, curations, pairs, words

from support import (
    ALONE,
    DDP,
    Launcher,
    kill_at_step,
    largest_difference,
    losses,
    metrics,
    saved_tensors,
    start,
    train,
    wait_for_step,
    zero,
)  # fmt: skip

SLOW = (
    "--data.keep=list", "--data.threshold=1.0", "--data.min-ratio=0.025",
    "--data.max-scanned=1000000",
)  # fmt: skip
"""One caption of every unit: a curation of 120 pairs reads 4,800, for about half a second."""


@pytest.fixture(scope="module")
def undisturbed_slow(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed_slow") / "run"
    train(ALONE, run, *SLOW, small=words(pool), module=MODULE)
    return run


def test_the_shards_of_the_pool_are_noted(undisturbed: Path, pool: Path) -> None:
    (entry,) = json.loads((undisturbed / "data.json").read_text())["train"]
    shards = sorted((pool / "train").glob("*.tar"))
    assert [name for name, _, _ in entry] == [shard.name for shard in shards]
    assert all(samples > 0 and digest for _, samples, digest in entry)


def test_every_period_has_its_pairs_and_the_scan_goes_on_where_it_ended(
    undisturbed: Path,
) -> None:
    found = pairs(undisturbed)
    assert [len(part) for part in found] == [120] * 4
    assert all(len(set(part)) == 120 for part in found), "a set holds every pair once"
    assert len({tuple(part) for part in found}) == 4
    lines = metrics(undisturbed)
    assert [line["scanned_pairs"] for line in lines[::5]] == [
        line["scanned_pairs"] for line in lines[4::5]
    ]
    # a quarter of 40 a unit: 12 units, and as many more as there were doubles
    assert all(line["scanned_pairs"] >= 480 for line in lines)
    assert all(0 < line["kept_ratio"] <= 0.25 for line in lines)
    assert lines[0]["captions_per_second"] > 0
    assert lines[-1]["read_samples"] == lines[-1]["trained_samples"] == 480


@pytest.mark.parametrize(
    "launcher",
    [DDP, zero(2), zero(3, processes=4)],
    ids=lambda launcher: launcher.name,
)
def test_what_is_chosen_and_learned_does_not_depend_on_processes(
    launcher: Launcher, undisturbed: Path, pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(launcher, run, small=words(pool), module=MODULE)
    assert pairs(run) == pairs(undisturbed)
    worst = max(abs(loss - losses(undisturbed)[step]) for step, loss in losses(run).items())
    assert worst < 1e-5
    assert largest_difference(saved_tensors(run), saved_tensors(undisturbed)) < 1e-5


def test_reading_ahead_in_other_processes_changes_nothing(
    undisturbed: Path, pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(ALONE, run, "--data.workers=2", small=words(pool), module=MODULE)
    assert curations(run) == curations(undisturbed)
    assert largest_difference(saved_tensors(run), saved_tensors(undisturbed)) == 0.0


def test_features_are_compared_in_float32_whatever_computes_them(
    pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    half = ("--engine.precision=bfloat16", "--schedule.samples=96")
    train(ALONE, run, *half, small=words(pool), module=MODULE)
    similarity = torch.tensor(curations(run)["000000.parquet"]["similarity"])
    assert (similarity != similarity.bfloat16().float()).any()


@pytest.mark.parametrize("launcher", [ALONE, zero(3)], ids=lambda launcher: launcher.name)
def test_killed_while_it_trains_and_resumed_is_the_undisturbed_run(
    launcher: Launcher, undisturbed: Path, pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(launcher, run, "--run.save-every=3", small=words(pool), module=MODULE)
    kill_at_step(process, run, random.Random().randint(4, 16), signal.SIGKILL)
    assert len(metrics(run)) < 20
    # continued on another number of processes than it began on
    train(DDP if launcher == ALONE else ALONE, run, small=words(pool), module=MODULE)
    assert pairs(run) == pairs(undisturbed)
    assert largest_difference(saved_tensors(run), saved_tensors(undisturbed)) < 1e-5
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))


@pytest.mark.parametrize("saved_at", [5, 3])
def test_killed_while_it_curates_and_resumed_is_bit_for_bit_the_undisturbed_run(
    saved_at: int, undisturbed_slow: Path, pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # with a checkpoint right before the curation, or amid the period before it
    every = f"--run.save-every={saved_at}"
    process = start(ALONE, run, *SLOW, every, small=words(pool), module=MODULE)
    wait_for_step(process, run, 10)
    time.sleep(0.1)
    kill_at_step(process, run, 10, signal.SIGKILL)
    assert not (run / "curation" / "000002.parquet").exists()
    train(ALONE, run, *SLOW, small=words(pool), module=MODULE)
    assert curations(run) == curations(undisturbed_slow)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert largest_difference(saved_tensors(run), saved_tensors(undisturbed_slow), kinds) == 0.0
    assert losses(run) == losses(undisturbed_slow)


def interrupted(pool: Path, run: Path, *more: str) -> None:
    """A run that ended after step 7, in the middle of its second period."""
    every = ("--run.save-every=7", "--run.keep=9")
    train(ALONE, run, *every, *more, small=words(pool), module=MODULE)
    forget_after_seven(run)


def forget_after_seven(run: Path) -> None:
    for step in (14, 20):
        shutil.rmtree(run / "checkpoints" / f"step_{step:09d}")
    (run / "checkpoints" / "latest").write_text("step_000000007\n")


def test_a_lost_or_altered_curation_is_noticed_when_a_run_goes_on(
    undisturbed: Path, pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted(pool, run)
    file = run / "curation" / "000001.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    output = train(ALONE, run, small=words(pool), module=MODULE, expect=2)
    assert f"{file} was altered" in output and "Traceback" not in output
    file.unlink()
    output = train(ALONE, run, small=words(pool), module=MODULE, expect=2)
    assert f"{file} is missing" in output and "Traceback" not in output
    file.write_bytes(content)
    # what a curation of a later period left behind does not matter
    (run / "curation" / "000002.parquet").write_bytes(b"half")
    train(ALONE, run, small=words(pool), module=MODULE)
    assert curations(run) == curations(undisturbed)
    assert largest_difference(saved_tensors(run), saved_tensors(undisturbed)) == 0.0


def test_noise_of_the_model_is_the_same_where_a_run_goes_on_amid_a_period(
    pool: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    noise = ("--model.text.depth=2", "--model.text.drop-path=0.5")
    interrupted(pool, run, *noise)
    shutil.copytree(run, whole)
    train(ALONE, whole, *noise, small=words(pool), module=MODULE)
    shutil.rmtree(run)
    train(ALONE, run, *noise, small=words(pool), module=MODULE)
    assert losses(whole) == losses(run)
    assert largest_difference(saved_tensors(run), saved_tensors(whole)) == 0.0


def test_a_search_that_wants_more_images_than_the_run_has_ends(pool: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = train(
        ALONE, run, "--reduction.image=frugal.cluster_masking.masking.ClusterMasking",
        "--schedule.samples=72", "--schedule.warmup-samples=0", "--data.period=2",
        small=words(pool), module=MODULE,
    )  # fmt: skip
    # the second of two periods is cut short by the end of the run
    assert "wants to look at 4,096 images, of which the run does not have the last" in output
    assert list(losses(run)) == [1, 2, 3]


ASTRAY = """
import torch
import frugal.common.engine.loop as loop
from frugal.cit.recipes import RECIPES
from frugal.common.train import main

honest = loop.train_step


def spoiled(engine, recipe, step, micro_batches, average=None):
    found = honest(engine, recipe, step, micro_batches, average)
    if step + 1 == 9:
        with torch.no_grad():
            engine.objective.get_parameter("model.text.blocks.0.mlp.fc2.weight").fill_(torch.nan)
    return found


loop.train_step = spoiled
main(RECIPES, method="cit")
"""
"""CiT whose text tower is led astray by step 9, just before pairs are chosen."""


@pytest.mark.parametrize("background", ["--data.no-background", "--data.background"])
def test_a_run_whose_text_tower_was_led_astray_goes_back_where_it_can_choose_nothing(
    background: str, pool: Path, tmp_path: Path
) -> None:
    run, script = tmp_path / "run", tmp_path / "astray.py"
    script.write_text(ASTRAY)
    given = (
        "--data.min-ratio=None", "--data.threshold=-1.0", "--data.period=3",
        "--run.save-every=4", "--run.keep=3", "--run.max-skipped=5", background,
    )  # fmt: skip
    if background == "--data.no-background":
        refused = tmp_path / "refused"  # its writer may still write when it has ended
        said = train(ALONE, refused, *given, small=words(pool), module=str(script), expect=2)
        assert "curation 3 finds features of captions that are not finite" in said
    rewind = "--run.on-divergence=rewind"
    said = train(ALONE, run, *given, rewind, small=words(pool), module=str(script))
    assert "finds features of captions that are not finite" in said
    assert "going back to the checkpoint of step" in said
    assert metrics(run)[-1]["step"] == 20 and metrics(run)[-1]["skipped_steps"] == 0
