"""A method that nobody here knows is a new package, and nothing else."""

import ast
import json
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from frugal.common.models.vit import IMAGENET_MEAN, IMAGENET_STD
from frugal.common.weights.load import load_model
from support import ALONE, DDP, ROOT, Launcher, command, metrics, start, train, wait_for_step, zero

EXAMPLE = ROOT / "examples" / "superclass" / "src"
METHOD = {"module": "frugal.superclass.train", "recipe": "squares"}
SHORT = (
    "--schedule.samples=1280", "--run.log-every=1", "--engine.precision=float32",
    "--run.picture-every=10",
)  # fmt: skip
"""Twenty steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the example in a temporary folder, where nothing of this repository is."""
    return Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("somewhere") / "src"))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Model, objective, data, reductions, optimizer, schedule and evaluation of the example."""
    train(ALONE, folder / "run", small=SHORT, cwd=folder, **METHOD)
    return folder / "run"


def last_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments after twenty steps."""
    files = sorted((run / "checkpoints" / "step_000000020").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_it_imports_the_common_package_alone() -> None:
    for file in EXAMPLE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("frugal."):
                assert str(node.module).split(".")[1] in ("common", "superclass"), file


def test_every_part_of_its_own_is_used(run: Path) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    parts = [
        recipe["model"], recipe["data"], recipe["objective"], recipe["optimizer"],
        recipe["schedule"], *recipe["reduction"].values(), *recipe["evaluation"],
    ]  # fmt: skip
    kinds = [part["type"] for part in parts if isinstance(part, dict)]
    assert len(kinds) == 8
    assert all(kind.startswith("frugal.superclass.") for kind in kinds)
    lines = metrics(run)
    # 48-pixel images in patches of 8: six rows of four columns, and the class token
    assert lines[-1]["image_tokens"] == 6 * 4 + 1
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[0] < max(rates) == pytest.approx(0.1) and rates[-1] < max(rates)  # a trapezoid
    assert lines[0]["loss"] > lines[-2]["loss"]


def test_its_evaluation_is_measured_again_by_the_common_command(run: Path, folder: Path) -> None:
    first = json.loads((run / "evaluation" / "word_recall.json").read_text())
    assert first["data"] is None  # it is drawn
    # seven words never stand in a caption of two colors: guessing finds fewer than half
    assert first["word_recall"] > 0.5
    command(
        "frugal.common.evaluate", "--checkpoint", run, "--tasks", "word_recall",
        "--out", folder / "again", cwd=folder,
    )  # fmt: skip
    again = json.loads((folder / "again" / "word_recall.json").read_text())
    assert again["word_recall"] == pytest.approx(first["word_recall"], abs=2 / first["words"])


@pytest.mark.parametrize("launcher", [DDP, zero(2)], ids=lambda launcher: launcher.name)
def test_it_trains_alike_on_two_processes(launcher: Launcher, run: Path, folder: Path) -> None:
    together = folder / launcher.name.replace(" ", "-")
    train(launcher, together, small=SHORT, cwd=folder, **METHOD)
    alone, here = last_tensors(run), last_tensors(together)
    assert alone.keys() == here.keys()
    assert any("momentum_buffer" in name for name in alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(here[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(run: Path, folder: Path) -> None:
    killed = folder / "killed"
    words = (*SHORT, "--run.save-every=5")
    process = start(ALONE, killed, small=words, cwd=folder, **METHOD)
    wait_for_step(process, killed, 8)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    output = train(ALONE, killed, small=words, cwd=folder, **METHOD)
    assert "step 5" in output or "step 10" in output or "step 15" in output
    alone, here = last_tensors(run), last_tensors(killed)
    assert alone.keys() == here.keys()
    assert all(here[name].equal(tensor) for name, tensor in alone.items())


def test_it_leaves_for_another_library(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "timm"
    command("frugal.common.export", "--checkpoint", run, "--to", "timm", "--out", out, cwd=folder)
    exported = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    monkeypatch.syspath_prepend(folder)
    bundle = load_model(run)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=generator)
    channels = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = channels
    with torch.inference_mode():
        scores = exported((images / 255 - mean) / std)
        torch.testing.assert_close(scores, bundle.model(images), rtol=1e-4, atol=1e-4)


def test_its_reductions_and_objective_go_with_the_data_of_others(
    scenes: Path, folder: Path
) -> None:
    run = folder / "pairs"
    words = (*SHORT, f"--data.train={scenes / 'train'}", "--data.workers=0", "--batch-size=24")
    train(DDP, run, recipe="pairs", module=METHOD["module"], small=words, cwd=folder)
    assert metrics(run)[-1]["image_tokens"] == 6 * 4 + 1
