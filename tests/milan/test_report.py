"""What the common commands do with a run of MILAN: the report shows it, evaluate refuses it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support import ALONE, command, losses, train


def pictures(page: str) -> list[np.ndarray]:
    """(H, W, 3) of every picture of a page."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_the_report_shows_curves_and_what_the_objective_draws(
    pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    command("frugal.common.report", run)
    page = (run / "report.html").read_text()
    for name in ("Loss", "Learning rate", "hidden patches", "attention on seen patches"):
        assert re.search(rf"<figcaption>[^<]*{name}", page), name
    assert "What it makes of a batch" in page and "Drawn by Reconstruction itself" in page
    (drawn,) = pictures(page)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    logged = np.asarray(Image.open(io.BytesIO(board.Images("batch")[0].encoded_image_string)))
    rows, across = logged.shape[0], (drawn.shape[1] + 3) // 6
    assert drawn.shape[0] == rows  # images, seen, importance, cosine
    # tensorboard shows the first images of a batch with first weights; the report the same images
    height = rows // 4
    assert np.array_equal(drawn[18:height], logged[18:height, : drawn.shape[1]])
    assert not np.array_equal(drawn[3 * height :, :across], logged[3 * height :, :across])
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["samples_seen"] == 120 == 24 * max(losses(run))
    assert numbers["zero_shot_top1"] is None
    assert "Zero-shot" not in page and "Text finds image" not in page


def test_without_its_teacher_the_report_has_its_curves(pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    recipe = (run / "recipe.json").read_text()
    (run / "recipe.json").write_text(recipe.replace(str(pretrained.parent), "/nowhere"))
    result = command("frugal.common.report", run)
    assert "the page shows no pictures: " in result.stderr and "/nowhere" in result.stderr
    page = (run / "report.html").read_text()
    assert "Learning rate" in page and pictures(page) == []


def test_evaluate_says_what_measures_an_encoder_instead(pretrained: Path) -> None:
    words = ("--checkpoint", pretrained, "--tasks", "zero-shot")
    result = command("frugal.common.evaluate", *words, expect=2)
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert "a model without a text tower" in result.stderr
    ways = "linear-probe --data DATA (or milan-finetune, milan-linear-probe, milan-segment"
    assert f"it is measured by --tasks {ways}, which train)" in result.stderr


def test_a_fine_tuned_run_shows_its_accuracy(
    pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tuned"
    words = (
        f"--run.start-from={pretrained}", f"--data.train={scenes / 'zero_shot' / 'train'}",
        f"--evaluation.0.data={scenes}",
    )  # fmt: skip
    small = (
        "--model.image.width=32", "--model.image.depth=2", "--model.image.heads=2",
        "--model.image.mlp-width=64", "--model.image.drop-path=0", "--data.workers=0",
        "--batch-size=24", "--schedule.samples=72", "--schedule.warmup-samples=24",
        "--run.log-every=1",
    )  # fmt: skip
    train(ALONE, run, *words, module="frugal.milan.finetune", small=small)
    result = command("frugal.common.report", run)
    page = (run / "report.html").read_text()
    found = json.loads((run / "evaluation" / "accuracy.json").read_text())["accuracy_top1"]
    card = re.search(r'<div class="name">Accuracy, top 1</div><div class="value">([^<]*)<', page)
    assert card is not None and card[1] == f"{100 * found:.1f}&thinsp;%"
    assert "Zero-shot" not in page
    (drawn,) = pictures(page)
    assert drawn.shape == (32, 6 * 32, 3)  # six images beside each other
    assert f"accuracy_top1  {found:.4g}\n" in result.stdout
    command("frugal.common.evaluate", "--checkpoint", run, "--out", tmp_path / "again")
    numbers = json.loads((tmp_path / "again" / "accuracy.json").read_text())
    assert numbers["accuracy_top1"] == found
