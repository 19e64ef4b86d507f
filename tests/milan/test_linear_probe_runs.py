"""Linear probing as users start it: several processes, interruptions, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from frugal.common.cli import read_command_line
from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_timm
from frugal.common.train import train_recipe
from frugal.common.transfer.classifier import ClassifierConfig
from frugal.common.weights.load import load_model
from frugal.milan.transfer_recipes import LINEAR_PROBING
from support import (
    ALONE,
    largest_difference,
    losses,
    metrics,
    saved_tensors,
    train,
    zero,
)  # fmt: skip

TOWER = ImageTower(width=64, depth=2, heads=1, mlp_width=64, patch_size=8, image_size=32)
PROBE = {
    "module": "frugal.milan.linear_probe",
    "small": (
        "--model.image.width=64", "--model.image.depth=2", "--model.image.heads=1",
        "--model.image.mlp-width=64", "--data.workers=0", "--engine.precision=float32",
        "--run.log-every=1", "--batch-size=24", "--schedule.samples=240",
        "--schedule.warmup-samples=24", "--optimizer.learning-rate=5",
        "--run.evaluate-every=5", "--run.save-every=4", "--run.keep=20",
    ),
}  # fmt: skip
"""The demo, small enough for seconds: 10 steps of 24 samples in float32."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as a file in timm's layout."""
    model = ClassifierConfig(image=TOWER).build(torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file(to_timm(model.image.state_dict(), TOWER), file)
    return file


@pytest.fixture(scope="module")
def words(encoder: Path, scenes: Path) -> tuple[str, ...]:
    return (
        f"--run.start-from={encoder}", f"--data.train={scenes / 'zero_shot' / 'train'}",
        f"--evaluation.0.data={scenes}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def probed(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("probed") / "run"
    train(ALONE, run, *words, **PROBE)
    return run


def test_nothing_but_the_linear_layer_moves(probed: Path, encoder: Path) -> None:
    assert metrics(probed)[-1]["loss"] < metrics(probed)[0]["loss"]
    saved = saved_tensors(probed)
    head = {"model.head.1.weight", "model.head.1.bias"}
    assert {name for name in saved if not name.startswith("buffer/")} == {
        f"{kind}/{name}" for kind in ("weight", "momentum") for name in head
    }
    trained = load_model(probed).model
    assert not (trained.head[0].running_mean == 0).any()
    theirs = to_timm(trained.image.state_dict(), TOWER)
    before = ClassifierConfig(image=TOWER).build(torch.Generator().manual_seed(0)).image
    for name, tensor in to_timm(before.state_dict(), TOWER).items():
        assert torch.equal(theirs[name], tensor), name


def test_two_processes_of_zero_3_agree_with_one(
    probed: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(zero(3), run, *words, **PROBE)
    expected = losses(probed)
    assert losses(run) == {step: pytest.approx(loss, abs=1e-5) for step, loss in expected.items()}
    left, right = saved_tensors(probed), saved_tensors(run)
    assert largest_difference(left, right, ("weight", "momentum", "buffer")) < 1e-5
    # LARS scaled by the norms of whole matrices: with those of halves this would be half as far
    norms = [saved["weight/model.head.1.weight"].norm().item() for saved in (left, right)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    mine, theirs = (
        json.loads((run / "evaluation/accuracy.json").read_text()) for run in (run, probed)
    )
    assert mine == {name: pytest.approx(value, abs=1e-5) for name, value in theirs.items()}


def test_continued_from_the_middle_it_ends_bit_for_bit_the_same(
    probed: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(probed, run)
    for step in (5, 8, 10):
        shutil.rmtree(run / "checkpoints" / f"step_{step:09d}")
    (run / "checkpoints" / "latest").write_text("step_000000004\n")
    output = train(ALONE, run, *words, **PROBE)
    assert "from step 4 of 10" in output
    everything = ("weight", "momentum", "buffer")
    assert largest_difference(saved_tensors(probed), saved_tensors(run), everything) == 0.0
    assert losses(run) == losses(probed)


def probe(run: Path, *words: str) -> None:
    """The same in this process."""
    arguments = ["demo", *PROBE["small"], f"--run.dir={run}", "--engine.threads=1", *words]
    train_recipe(read_command_line(LINEAR_PROBING, program="test", arguments=arguments)[1])


def test_pooled_features_get_a_fresh_norm_that_stays(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    probe(
        tmp_path / "run", *words[:2], "--evaluation.0.data=None", "--model.image.pooling=mean",
        "--model.image.norm-after-pooling", "--schedule.samples=48",
    )  # fmt: skip
    saved = saved_tensors(tmp_path / "run")
    assert (saved["buffer/model.fc_norm.weight"] == 1).all()
    assert not saved["buffer/model.fc_norm.bias"].any()
    assert not [name for name in saved if ".image.norm." in name]


def test_statistics_of_each_process_are_those_of_all_where_there_is_one(
    probed: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    probe(tmp_path / "run", *words, "--objective.statistics=each_process")
    found = saved_tensors(tmp_path / "run")
    assert largest_difference(saved_tensors(probed), found, ("weight", "buffer")) < 1e-5


def test_a_probe_without_an_encoder_or_with_drop_path_is_refused(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"a linear probe measures an encoder.*--run\.start-from"):
        probe(tmp_path / "run", *words[1:])
    with pytest.raises(InputError, match=r"model\.image\.drop_path is 0\.1"):
        probe(tmp_path / "run", *words, "--model.image.drop-path=0.1")
