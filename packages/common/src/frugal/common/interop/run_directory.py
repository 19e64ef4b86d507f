"""A run directory with nothing but weights: evaluated, started from and exported like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from frugal.common.checkpoint.store import save_weights
from frugal.common.checkpoint.warm_start import load_weights
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import WordPiece
from frugal.common.errors import InputError
from frugal.common.interop.trained import TrainedRun
from frugal.common.recipe import Recipe, to_json

USAGE = """\
    python -m frugal.common.evaluate --checkpoint FOLDER --data ...
    python -m frugal.common.export --checkpoint FOLDER --to open_clip --out ...

A recipe starts from these weights with `--run.start-from FOLDER`.
"""
USAGE_OF_A_TOWER = """\
    python -m frugal.common.export --checkpoint FOLDER --to timm --out ...

A recipe starts from these weights with `--run.start-from FOLDER`.
"""


def write(trained: TrainedRun, folder: Path) -> None:
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


def write_converted(out: Path, recipe: Recipe, weights: Mapping[str, Tensor], *, step: int) -> None:
    """Weights of another library as a run of a recipe, with a copy of its vocabulary file.

    Args:
        out: new or empty; what was written of it is removed again if that fails.
        recipe: of image-text pairs; its run directory becomes ``out``.
        weights: of the model, under our names.
        step: how long they were trained.

    Raises:
        InputError: if the folder cannot be written.
    """
    folder = out.resolve()
    existed = folder.exists()
    data = recipe.data
    assert isinstance(data, PairData)
    tokenizer = data.tokenizer
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(tokenizer, WordPiece) and tokenizer.vocab is not None:
            data.save_tokenizer(folder / "tokenizer")
            own = replace(tokenizer, vocab=folder / "tokenizer" / "vocab.txt")
            data = replace(data, tokenizer=own)
        # the objective's names: it holds the model as a part
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        save_weights(folder / "checkpoints", named, step=step)
        run = replace(recipe.run, dir=folder, interpolate=False)
        recipe = replace(recipe, data=data, run=run)
        (folder / "recipe.json").write_text(json.dumps(to_json(recipe), indent=2))
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{out} cannot be written ({error.strerror})") from None
        raise
