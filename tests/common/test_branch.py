"""One run at a constant learning rate, and branches of it that end where they like."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from frugal.cluster_masking.masking import ClusterMasking
from frugal.common.branch import Ending, Options, branch
from frugal.common.errors import InputError
from frugal.common.history import read_history
from frugal.common.recipe_json import load_recipe, to_json
from frugal.common.report.goodput import time_spent
from support import (
    ALONE,
    DDP,
    TINY,
    Launcher,
    command,
    largest_difference,
    losses,
    metrics,
    saved_tensors,
    train,
    zero,
)

CONSTANT = (
    "--schedule=frugal.common.optim.schedules.WarmupConstantCooldown",
    "--schedule.cooldown-samples=96", "--schedule.samples=288", "--schedule.warmup-samples=24",
    "--run.save-every=3", "--run.keep=9",
)  # fmt: skip
"""12 steps of 24 samples, the last 4 of them cooldown."""
ALL = ("weight", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(scope="module")
def long(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 150 samples: the second epoch begins inside of the seventh step
    run = tmp_path_factory.mktemp("long") / "run"
    train(ALONE, run, f"--data.train={scenes / 'train'}", *CONSTANT, "--engine.ema-decay=0.9")
    return run


@pytest.fixture(scope="module")
def early(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that cools down from step 7 by itself."""
    run = tmp_path_factory.mktemp("early") / "run"
    cooled = ("--schedule.cooldown-from=7", "--engine.ema-decay=0.9")
    words = (f"--data.train={scenes / 'train'}", *CONSTANT, *cooled)
    train(ALONE, run, small=without_samples(words))
    return run


def without_samples(words: tuple[str, ...]) -> list[str]:
    """Of a tiny run that ends where its cooldown does."""
    return [word for word in (*TINY, *words) if not word.startswith("--schedule.samples=")]


def go_on(branch: Path, launcher: Launcher = ALONE, *words: str, **options: object) -> str:
    recipe = str(branch / "recipe.json")
    return train(launcher, branch, *words, recipe=recipe, small=(), **options)  # type: ignore[arg-type]


def branch_of(run: Path, out: Path, *words: str, expect: int = 0) -> str:
    done = command("frugal.common.branch", run, "--out", out, *words, expect=expect)
    assert "Traceback" not in done.stderr
    return done.stderr


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("launcher", [ALONE, DDP, zero(1)], ids=lambda launcher: launcher.name)
def test_a_branch_ends_as_a_run_that_cooled_down_there(
    launcher: Launcher, long: Path, early: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "branch", content(long)
    said = branch_of(long, out, "--schedule.cooldown-from=7")
    assert f"{out} goes on behind step 6 of {long} and ends with step 11" in said
    assert "from step 6 of 11" in go_on(out, launcher, "--run.keep=1")
    assert [f.name for f in (out / "checkpoints").glob("step_*")] == ["step_000000011"]
    assert content(long) == before

    assert list(losses(out)) == list(range(1, 12))
    rates = [line["learning_rate"] for line in metrics(early)]
    assert [line["learning_rate"] for line in metrics(out)] == rates
    limit = 0.0 if launcher == ALONE else 1e-5
    assert largest_difference(saved_tensors(out), saved_tensors(early), ALL) <= limit
    (begun,) = [event for event in read_history(out) if event["event"] == "branched"]
    assert begun["step"] == 6 and begun["source"] == str(long / "checkpoints" / "step_000000006")
    spent = time_spent(out)
    assert spent is not None and spent["again"] == 0.0


def test_a_branch_that_is_longer_goes_on_from_the_last_checkpoint_at_the_peak(
    long: Path, tmp_path: Path
) -> None:
    out = tmp_path / "branch"
    out.mkdir()
    assert "behind step 6" in branch_of(long, out, "--schedule.cooldown-samples=120")
    shutil.rmtree(out)
    assert "behind step 9" in branch_of(long, out, "--schedule.samples=480")
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["schedule"]["samples"] == 480
    assert "from step 9 of 20" in go_on(out, ALONE, "--run.save-every=30")


def test_a_branch_of_cit_begins_before_pairs_that_its_end_would_cut_short(
    scenes: Path, tmp_path: Path
) -> None:
    long, out, direct = tmp_path / "long", tmp_path / "out", tmp_path / "direct"
    words = (
        f"--data.train={scenes / 'train'}", *CONSTANT, "--run.save-every=1", "--run.keep=30",
        "--batch-size=12",
        f"--data.metadata.sources={scenes}/zero_shot/classnames.txt", "--data.scan=10",
        "--data.threshold=0.1", "--data.period=3",
    )  # fmt: skip
    cit = "frugal.cit.train"
    train(ALONE, long, *words, module=cit)  # 24 steps, 8 of them cooldown
    # ends after 13 steps, which cut the fifth period short
    ending = ("--schedule.cooldown-from=11", "--schedule.cooldown-samples=24")
    train(ALONE, direct, module=cit, small=without_samples((*words, *ending)))
    assert "behind step 9 of" in branch_of(long, out, *ending)
    go_on(out, module=cit)
    assert largest_difference(saved_tensors(out), saved_tensors(direct), ALL[:3]) == 0.0
    named = long / "checkpoints" / "step_000000011"
    said = branch_of(named, tmp_path / "new", *ending, expect=2)
    assert "its data may be others, as they depend on where a run ends" in said


def test_a_branch_of_a_branch_and_a_damaged_checkpoint(long: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    branch_of(long, first, "--schedule.cooldown-from=7")
    (damaged,) = (first / "checkpoints" / "step_000000006").glob("tensors*")
    copy = damaged.read_bytes()
    damaged.unlink()  # its bytes are those of the run, too
    damaged.write_bytes(copy[:-1])
    assert "is damaged" in branch_of(first, second, "--schedule.cooldown-from=8", expect=2)
    shutil.copytree(
        long / "checkpoints" / "step_000000003", damaged.parent.with_name("step_000000003")
    )
    assert "behind step 3" in branch_of(first, second, "--schedule.cooldown-from=8")
    events = [event["event"] for event in read_history(second)]
    assert events[-2:] == ["branched", "branched"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--schedule.cooldown-from=1",),
            "run is too late to branch from: step 3 had a learning rate",
        ),
        ((), "a branch ends otherwise than its run"),
        (("--schedule.cooldown-from=7", "--schedule.samples=48"), "both say when a branch ends"),
        (("--schedule.samples=0",), "schedule.samples"),
        (("--schedule.samples=100",), "together more than schedule.samples (100)"),
        (("--schedule.cooldown-form=7",), "--schedule.cooldown-from"),
    ],
)
def test_what_is_no_branch_is_refused_and_nothing_is_written(
    words: Sequence[str], sentence: str, long: Path, tmp_path: Path
) -> None:
    assert sentence in branch_of(long, tmp_path / "run", *words, expect=2)
    assert not list(tmp_path.iterdir())


def test_what_nothing_can_branch_from_is_refused(alone: Path, long: Path, tmp_path: Path) -> None:
    def said(run: Path, out: Path = tmp_path / "new", **changes: int) -> str:
        with pytest.raises(InputError) as refused:
            branch(Options(run=run, out=out, schedule=Ending(**changes)))
        assert not (tmp_path / "new").exists()
        return str(refused.value)

    late = long / "checkpoints" / "step_000000009"
    assert "step_000000009 is too late to branch from: step 9 had" in said(late, cooldown_from=7)
    assert "ends after step 5" in said(late, samples=120, cooldown_samples=1)
    assert "by WarmupCosine, which has no cooldown_from" in said(alone, cooldown_from=7)
    assert f"every checkpoint of {alone} is too late" in said(alone, samples=960)
    assert "does not exist" in said(tmp_path / "none", samples=960)
    assert "is not empty" in said(alone, samples=960, out=long)
    assert "which is copied" in said(long, cooldown_from=7, out=long / "short")
    moved = tmp_path / "moved"
    shutil.copytree(late, moved)
    assert "is in no run directory" in said(moved, cooldown_from=10)
    recipe = load_recipe(long / "recipe.json")
    masking = ClusterMasking(threshold=0.5, use_embeddings=True)
    mixed = replace(recipe, reduction=replace(recipe.reduction, image=masking))
    other = tmp_path / "other"
    shutil.copytree(long, other)
    (other / "recipe.json").write_text(json.dumps(to_json(mixed)))
    assert "another one from its first step on" in said(other, cooldown_from=7)
