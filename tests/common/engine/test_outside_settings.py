"""What launchers and files of others configure is taken, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frugal.common.engine.deepspeed import fill_config
from frugal.common.engine.engine import check_accelerate_environment
from frugal.common.errors import InputError
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.train import train_recipe
from frugal.flip.recipes import demo
from support import ALONE, ROOT, train


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("DYNAMO_BACKEND", "INDUCTOR", "--engine.compile"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--engine.accumulate"),
        ("USE_DEEPSPEED", "true", "--engine.deepspeed-config"),
        ("USE_MEGATRON_LM", "true", "--engine.deepspeed-config"),
        ("MIXED_PRECISION", "fp16", "engine.precision"),
        ("MIXED_PRECISION", "fp8", "engine.precision"),
    ],
)
def test_what_accelerate_would_change_is_refused_by_name(
    name: str, value: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(InputError, match=f"(?i){name}={value}.*{flag}"):
        check_accelerate_environment(torch.bfloat16)


def test_what_accelerate_launch_always_sets_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    always = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1"}
    for name, value in (always | {"USE_DEEPSPEED": "false", "USE_FSDP": "true"}).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_accelerate_environment(torch.bfloat16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_accelerate_environment(torch.bfloat16)


@pytest.mark.parametrize(
    "section", ["activation_checkpointing", "compile", "elasticity", "curriculum_learning"]
)
def test_a_section_of_deepspeed_without_effect_is_refused(section: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, section: {"enabled": True}}))
    with pytest.raises(InputError, match=f"has '{section}'"):
        fill_config(file, demo(), 1)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (8, 8)])
def test_a_pair_alone_in_its_micro_batch_is_refused(
    batch_size: int, accumulate: int, tmp_path: Path
) -> None:
    recipe = demo()
    recipe = replace(
        recipe,
        batch_size=batch_size,
        engine=replace(recipe.engine, accumulate=accumulate, threads=1),
        run=replace(recipe.run, dir=tmp_path / "run"),
    )
    with pytest.raises(InputError, match="compares one pair with itself"):
        train_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_fewer_pairs_than_a_batch_are_told(scenes: Path, tmp_path: Path) -> None:
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=240", "--batch-size=240")
    output = train(ALONE, tmp_path / "run", *words)
    assert output.count("the data has 150 pairs, fewer than the 240") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"zero_optimisation": {"stage": 2}}, "'zero_optimisation'.*mean 'zero_optimization'"),
        ({"train_batchsize": 8}, "'train_batchsize'.*did you mean 'train_batch_size'"),
        ({"gradient_allreduce_op": "sum"}, "'gradient_allreduce_op'.*no setting"),
        ({"bfloat16": {"enabled": True}}, "'bfloat16', which the recipe decides"),
        ({"zero_optimization": {"stag": 2}}, "sets zero_optimization.stag to 2"),
        ({"zero_optimization": {"stage": 5}}, "sets zero_optimization.stage to 5"),
        ({"zero_optimization": 2}, "sets zero_optimization to 2; write"),
        ({"zero_optimization": None}, "sets zero_optimization to null; write"),
    ],
)
def test_a_deepspeed_file_with_a_misspelled_setting_is_refused(
    content: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=sentence):
        fill_config(file, demo(), 1)


def test_a_deepspeed_file_that_says_a_thing_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2, "stage": 0}}')
    with pytest.raises(InputError, match="has 'stage' twice"):
        fill_config(file, demo(), 1)


def test_every_deepspeed_file_of_ours_is_taken() -> None:
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(files) == 6
    for file in files:
        config = fill_config(file, demo(), 1)
        assert f"zero{config['zero_optimization']['stage']}" in file.stem


@pytest.mark.parametrize(
    ("best", "sentence"),
    [
        ("shapes_topp1", "nothing that the evaluations.*shapes_top1"),
        ("shapes_images", "of which higher is better; choose from"),
        ("image_pairs_recall_at_5", "'pairs' was given no data"),
    ],
)
def test_a_best_that_nothing_will_measure_is_refused_before_anything_is_written(
    best: str, sentence: str, scenes: Path, tmp_path: Path
) -> None:
    recipe = demo()
    recipe = replace(
        recipe,
        data=replace(recipe.data, train=(str(scenes / "train"),)),
        evaluation=(ZeroShot(name="shapes", data=scenes), Retrieval(name="pairs")),
        engine=replace(recipe.engine, threads=1, device="cpu"),
        run=replace(recipe.run, dir=tmp_path / "run", best=best, evaluate_every=1),
    )
    with pytest.raises(InputError, match=sentence):
        train_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_a_run_that_ends_before_its_damage_is_judged_is_judged_at_its_end(
    scenes: Path, tmp_path: Path
) -> None:
    rows = ["filepath\ttitle"]
    for number in range(99):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture")
        rows.append(f"{number}.jpg\ta caption")
    (tmp_path / "list.tsv").write_text("\n".join(rows))
    run, words = (
        tmp_path / "run",
        (f"--data.train={tmp_path / 'list.tsv'}", "--schedule.samples=48"),
    )
    words = (*words, f"--evaluation.0.data={scenes}")
    for _ in range(2):  # the second finds the run complete
        output = train(ALONE, run, *words, expect=2)
        assert "48 of the 48 samples read so far are damaged" in output
        assert not (run / "evaluation").exists()
