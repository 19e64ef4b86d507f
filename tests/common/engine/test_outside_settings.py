"""What launchers and files of others configure is taken, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frugal.common.engine.backend import check_accelerate_environment
from frugal.common.engine.deepspeed_backend import fill_config
from frugal.common.errors import InputError
from frugal.common.train import train_recipe
from frugal.flip.recipes import demo
from support import ALONE, train


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
