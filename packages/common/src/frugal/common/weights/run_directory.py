"""A run directory with nothing but weights: evaluated, started from and exported like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from frugal.common.checkpoint.store import copy_weights, find_checkpoint, save_weights
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe, HuggingFace, WordPiece
from frugal.common.errors import InputError
from frugal.common.recipe import Recipe, to_json
from frugal.common.weights.trained import TrainedRun

USAGE = """\
    python -m frugal.common.evaluate --checkpoint FOLDER --data ...
    python -m frugal.common.export --checkpoint FOLDER --to open_clip --out ...

A recipe starts from these weights with `--run.start-from FOLDER`.
"""
USAGE_OF_A_TOWER = """\
    python -m frugal.common.export --checkpoint FOLDER --to timm --out ...

A recipe starts from these weights with `--run.start-from FOLDER`.
"""


def refuse_taken(out: Path) -> None:
    """Nothing is ever overwritten.

    Raises:
        InputError: if there is a file, or a folder that holds something.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "is not empty" if out.is_dir() else "is a file"
        raise InputError(f"{out} {what}, and nothing is overwritten; choose another --out")


def write(trained: TrainedRun, folder: Path) -> None:
    """One checkpoint with the weights (or their moving average), tokenizer and numbers.

    However large the model is, a few MiB of it are in memory at a time.
    """
    copy_weights(trained.checkpoint, folder / "checkpoints", average=trained.average)
    if (trained.folder / "tokenizer").is_dir():
        shutil.copytree(trained.folder / "tokenizer", folder / "tokenizer")
    if trained.numbers:
        (folder / "evaluation").mkdir()
    for task in trained.numbers:
        shutil.copyfile(
            trained.folder / "evaluation" / f"{task}.json", folder / "evaluation" / f"{task}.json"
        )


def difference(trained: TrainedRun, folder: Path) -> float:
    """0 where a written folder has every weight bit for bit, else infinite."""
    written, stored = find_checkpoint(folder).tensor_bytes(), trained.checkpoint.tensor_bytes()
    names = trained.checkpoint.weights(average=trained.average)
    same = len(written) == len(names) and all(
        written[f"weight/{name}"].equals(stored[source]) for name, source in names.items()
    )
    return 0.0 if same else float("inf")


def write_converted(out: Path, recipe: Recipe, weights: Mapping[str, Tensor], *, step: int) -> None:
    """Weights of another library as a run of a recipe, with a copy of its vocabulary file.

    Args:
        out: new or empty; what was written of it is removed again if that fails.
        recipe: its run directory becomes ``out``.
        weights: of the model, under our names.
        step: how long they were trained.

    Raises:
        InputError: if the folder cannot be written.
    """
    folder = out.resolve()
    existed = folder.exists()
    data = recipe.data
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(data, PairData):
            data = _with_own_tokenizer(data, folder / "tokenizer")
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


def _with_own_tokenizer(data: PairData, folder: Path) -> PairData:
    """The same with a copy of its vocabulary, unless that is still to be fetched from the hub."""
    tokenizer = data.tokenizer
    if isinstance(tokenizer, WordPiece) and tokenizer.vocab is not None:
        data.save_tokenizer(folder)
        return replace(data, tokenizer=replace(tokenizer, vocab=folder / "vocab.txt"))
    if isinstance(tokenizer, ClipBpe) or (
        isinstance(tokenizer, HuggingFace) and Path(tokenizer.name).is_dir()
    ):
        data.save_tokenizer(folder)
    return data
