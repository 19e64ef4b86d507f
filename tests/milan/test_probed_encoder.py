"""``frugal.common.evaluate --tasks linear-probe`` on image towers that have no text tower."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frugal.common.data.labeled import LabeledImages
from frugal.common.data.transforms import CenterCrop
from frugal.common.evaluate import evaluate
from frugal.common.evaluation.cli import LinearProbeOptions, Options
from frugal.common.export import Options as ExportOptions
from frugal.common.export import export
from support import ALONE, DDP, ROOT, command, fork, train


@pytest.fixture
def encoder(pretrained: Path, tmp_path: Path) -> Path:
    """A pretraining run whose teacher is on another machine."""
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    recipe = (run / "recipe.json").read_text()
    (run / "recipe.json").write_text(recipe.replace(str(pretrained.parent), "/nowhere"))
    return run


def probed(run: Path, scenes: Path, **words) -> tuple[dict, dict[str, torch.Tensor]]:
    """What the command writes, and the embeddings of the test images that it kept."""
    out = run.with_name(f"{run.name}-measured")
    tasks = ("linear-probe",)
    options = Options(checkpoint=run, data=scenes, tasks=tasks, out=out, workers=0, **words)
    evaluate(options)
    numbers = json.loads((out / "linear_probe.json").read_text())
    files = [load_file(file) for file in (out / "features").glob("*.safetensors")]
    test = LabeledImages(scenes / "zero_shot" / "test", size=(32, 32), crop=CenterCrop())
    return numbers, next(file for file in files if len(file["labels"]) == len(test))


def test_a_probe_looks_at_what_the_exported_encoder_pools(
    encoder: Path, scenes: Path, tmp_path: Path
) -> None:
    numbers, kept = probed(
        encoder, scenes, device="cpu", linear_probe=LinearProbeOptions(weight_decay=1e-4)
    )
    assert numbers["linear_probe_images"] == 128 - 16
    assert 0 <= numbers["linear_probe_top1"] <= 1
    export(ExportOptions(checkpoint=encoder, to="timm", out=tmp_path / "timm"))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    mean, std = (
        torch.tensor(theirs.pretrained_cfg[name])[:, None, None] for name in ("mean", "std")
    )
    test = LabeledImages(scenes / "zero_shot" / "test", size=(32, 32), crop=CenterCrop())
    rows = 0
    for images, labels, places in test.batches(0, 1, 50, 0):
        with torch.inference_mode():
            expected = F.normalize(theirs((images.float() / 255 - mean) / std), dim=-1)
        torch.testing.assert_close(kept["embeddings"][places], expected, rtol=0, atol=1e-5)
        assert torch.equal(kept["labels"][places], labels)
        rows += len(images)
    assert rows == len(kept["labels"]) == 128
    table = list(csv.DictReader((encoder.with_name("run-measured") / "results.csv").open()))
    assert [row["task"] for row in table] == ["linear_probe"]


def test_two_processes_find_the_same(encoder: Path, scenes: Path, tmp_path: Path) -> None:
    found = []
    for launcher, batch_size in ((ALONE, 64), (DDP, 7)):
        out, log = tmp_path / str(launcher.processes), tmp_path / "log"
        words = [
            "--checkpoint", str(encoder), "--data", str(scenes), "--tasks", "linear-probe",
            "--out", str(out), "--device", "cpu", "--workers", "0",
            "--linear-probe.weight-decay", "1e-4", "--batch-size", str(batch_size),
        ]  # fmt: skip
        # the last bits of a sum depend on the threads that share it
        environments = [each | {"OMP_NUM_THREADS": "1"} for each in launcher.environments()]
        process = fork(
            "frugal.common.evaluate", words, log=log, cwd=ROOT, environments=environments
        )
        assert process.wait(timeout=300) == 0, log.read_text()
        files = sorted((out / "features").glob("*.safetensors"))
        numbers = json.loads((out / "linear_probe.json").read_text())
        assert numbers["linear_probe_measured"]["processes"] == launcher.processes
        found.append(({file.name: load_file(file) for file in files}, numbers))
    (one, alone), (two, together) = found
    names = [name for name in alone if isinstance(alone[name], (int, float))]
    assert len(names) > 4 and all(together[name] == alone[name] for name in names)
    assert len(one) == 2 and one.keys() == two.keys()
    for name, features in one.items():
        assert all(torch.equal(two[name][key], tensor) for key, tensor in features.items())


def test_a_classifier_is_probed_and_measured_in_one_call(
    pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tuned"
    small = (
        "--model.image.width=32", "--model.image.depth=2", "--model.image.heads=2",
        "--model.image.mlp-width=64", "--data.workers=0", "--batch-size=24",
        "--schedule.samples=24", "--schedule.warmup-samples=0",
        f"--run.start-from={pretrained}", f"--data.train={scenes / 'zero_shot' / 'train'}",
        f"--evaluation.0.data={scenes}",
    )  # fmt: skip
    train(ALONE, run, module="frugal.milan.finetune", small=small)
    done = command(
        "frugal.common.evaluate", "--checkpoint", run, "--data", scenes, "--device", "cpu",
        "--tasks", "accuracy", "linear-probe", "--linear-probe.weight-decay", "1", "--workers", "0",
    )  # fmt: skip
    assert "accuracy_top1" in done.stdout and "linear_probe_top1" in done.stdout
    written = {path.name for path in (run / "evaluation").glob("*.json")}
    assert written >= {"accuracy.json", "linear_probe.json"}


def test_words_for_models_with_captions_are_still_refused(encoder: Path, scenes: Path) -> None:
    words = ("--checkpoint", encoder, "--data", scenes, "--tasks", "linear-probe", "retrieval")
    refusal = command("frugal.common.evaluate", *words, expect=2).stderr
    assert refusal.startswith("error: ") and len(refusal.splitlines()) == 1
    assert "which retrieval needs" in refusal and "--tasks linear-probe --data" in refusal
