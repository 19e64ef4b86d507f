"""A run directory with nothing but weights: evaluated, started from and exported like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

from frugal.common.checkpoint.store import save_weights
from frugal.common.checkpoint.warm_start import load_weights
from frugal.common.interop.trained import Misfit, TrainedModel

USAGE = """\
    python -m frugal.common.evaluate --checkpoint FOLDER --data ...
    python -m frugal.common.export --checkpoint FOLDER --to open_clip --out ...

A recipe starts from these weights with `--run.start-from FOLDER`.
"""


def misfit(trained: TrainedModel) -> Misfit | None:
    """Nothing: what this library trains it can express."""
    del trained
    return None


def write(trained: TrainedModel, folder: Path) -> None:
    """One checkpoint with the weights (or their moving average), tokenizer and numbers."""
    weights = load_weights(trained.checkpoint)
    save_weights(folder / "checkpoints", weights, step=trained.checkpoint.step)
    if (trained.folder / "tokenizer").is_dir():
        shutil.copytree(trained.folder / "tokenizer", folder / "tokenizer")
    if trained.numbers:
        (folder / "evaluation").mkdir()
    for task in trained.numbers:
        shutil.copyfile(
            trained.folder / "evaluation" / f"{task}.json", folder / "evaluation" / f"{task}.json"
        )
