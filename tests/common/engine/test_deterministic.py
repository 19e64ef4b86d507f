"""``engine.deterministic``: what it sets, what it refuses, and that two runs are one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frugal.common.engine.deterministic import (
    deterministic_kernels,
    make_deterministic,
    naming_what_is_not_deterministic,
)
from frugal.common.errors import InputError
from frugal.common.models import attention
from frugal.common.train import train_recipe
from frugal.flip.recipes import RECIPES
from support import ALONE, DDP, losses, saved_tensors, train

LOG = logging.getLogger("frugal.test")
WORDS = ("--engine.deterministic", "--schedule.samples=96")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing set by the shell; afterwards torch as it was."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_cublas_and_nccl_are_told() -> None:
    make_deterministic(LOG)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Ring"


@pytest.mark.parametrize("algorithm", ["Tree", "ring,tree", "allreduce:tree,ring;broadcast:ring"])
def test_what_is_deterministic_too_stays(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", algorithm)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic(LOG)
    assert os.environ["NCCL_ALGO"] == algorithm
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NCCL_ALGO", "NVLS"),
        ("NCCL_ALGO", "ring,collnetdirect"),
        ("NCCL_ALGO", "^ring"),
    ],
)
def test_other_wishes_of_the_environment_are_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"{name} .* but it is '.*unset it"):
        make_deterministic(LOG)
    assert not torch.are_deterministic_algorithms_enabled()


def test_behind_a_run_torch_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES["demo"]()
    recipe = replace(
        recipe,
        engine=replace(recipe.engine, deterministic=True),
        run=replace(recipe.run, dir=tmp_path / "run", best="nothing"),
    )
    with pytest.raises(InputError, match=r"run\.best"):
        train_recipe(recipe)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not {"CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"} & os.environ.keys()
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with deterministic_kernels(LOG, wanted=True):
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["NCCL_ALGO"] == "Tree"


def test_compiling_is_refused() -> None:
    recipe = RECIPES["demo"]()
    with pytest.raises(InputError, match=r"engine\.deterministic .* engine\.compile"):
        replace(recipe, engine=replace(recipe.engine, deterministic=True, compile=True))


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    make_deterministic(LOG)
    refusal = pytest.raises(InputError, match="no deterministic kernel of put_")
    with refusal, naming_what_is_not_deterministic():
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="size of tensor"), naming_what_is_not_deterministic():
        torch.zeros(3) + torch.zeros(2)


def test_attention_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_xformers_runs", lambda *_: True)
    assert "xformers" in attention.attention_kernel("cuda")
    make_deterministic(LOG)
    assert "xformers" not in attention.attention_kernel("cuda")


def check_equal(left: Path, right: Path) -> None:
    first, second = saved_tensors(left), saved_tensors(right)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(left) == losses(right)


def test_two_runs_end_in_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    data = f"--data.train={scenes / 'train'}"
    for name in ("first", "second"):
        said = train(DDP, tmp_path / name, data, *WORDS)
        assert said.count("deterministic kernels alone") == 1
        assert "not measured" in said
    check_equal(tmp_path / "first", tmp_path / "second")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["flip", "clipa", "cluster_masking"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_runs_on_a_gpu_end_in_the_same_bits(
    method: str, precision: str, scenes: Path, tmp_path: Path
) -> None:
    words = (f"--data.train={scenes / 'train'}", f"--engine.precision={precision}", *WORDS)
    words = (*words, "--engine.device=cuda", "--model.image.drop-path=0.3")
    for name in ("first", "second"):
        train(ALONE, tmp_path / name, *words, module=f"frugal.{method}.train")
    check_equal(tmp_path / "first", tmp_path / "second")
