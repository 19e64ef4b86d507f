"""Write a trained model for another library: ``python -m frugal.common.export --to open_clip``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from frugal.common.cli import run_politely
from frugal.common.errors import InputError
from frugal.common.loading import load_exportable
from frugal.common.quiet_transformers import quietly
from frugal.common.words import command_words

if TYPE_CHECKING:
    from frugal.common.weights.targets import Target
    from frugal.common.weights.trained import Misfit, TrainedRun

LARGEST_DIFFERENCE = 1e-4
"""In float32, between this library and the one that reads what was written: of unit vectors, or of
what an image tower says, over the largest number of it."""
LIBRARIES = {
    "frugal": "frugal",
    "open_clip": "open_clip",
    "huggingface": "transformers",
    "huggingface_beit": "transformers",
    "huggingface_mae": "transformers",
    "timm": "timm",
}
"""What models leave for, as its users call it, by the name on the command line."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a trained model for another library, or without what only training needs."""

    checkpoint: Path
    """A run directory, or one of its checkpoints."""
    to: Literal["frugal", "open_clip", "huggingface", "huggingface_beit", "huggingface_mae", "timm"]
    """frugal: a run directory with nothing but weights. open_clip: a folder for its local-dir
    names. huggingface: a folder for transformers' CLIPModel, with a tower that this does not have
    for its VisionTextDualEncoderModel, of an image tower alone for its ViTModel (or BeitModel, with
    a norm on the mean of the patches), of a segmenter for its UperNetForSemanticSegmentation.
    huggingface_beit: an image tower for its BeitModel and BeitBackbone. huggingface_mae: for its
    ViTMAEForPreTraining. timm: the image tower for timm's local-dir names."""
    out: Path
    """Folder that is written; it must not exist, or be empty."""
    moving_average: bool = True
    """Take the moving average of the weights, where the run kept one; without it those of the last
    step leave, as a run directory (--to frugal) that is exported like any other."""

    def __post_init__(self) -> None:
        if not self.moving_average and self.to != "frugal":
            raise InputError(
                f"--no-moving-average is for --to frugal; export so first, and what that wrote "
                f"with --to {self.to}"
            )


def open_run(path: Path, *, average: bool = True) -> TrainedRun:
    """A run directory or checkpoint of any model, of which no weight is read.

    Args:
        path: the run directory, or one of its checkpoints.
        average: whether the moving average of the weights stands for them.

    Raises:
        InputError: if there is no whole checkpoint, or no average that could be left behind.
    """
    from frugal.common.checkpoint.store import find_checkpoint
    from frugal.common.recipe import load_recipe
    from frugal.common.weights.model_card import measured
    from frugal.common.weights.trained import TrainedRun

    checkpoint = find_checkpoint(path)
    folder = checkpoint.folder.parent.parent
    recipe, numbers = load_recipe(folder / "recipe.json"), measured(folder, step=checkpoint.step)
    if not average:
        if not any(name.startswith("ema/") for name in checkpoint.names()):
            raise InputError(
                f"{path} holds no moving average of its weights; leave out --no-moving-average"
            )
        recipe = replace(recipe, engine=replace(recipe.engine, ema_decay=None))
        numbers = {}  # they are of the average
    return TrainedRun(
        recipe=recipe, checkpoint=checkpoint, folder=folder, numbers=numbers, average=average
    )


def export(options: Options) -> float:
    """Write the folder, read it back with the library it is for, and compare.

    Returns:
        The largest difference of a number of a unit vector.

    Raises:
        InputError: if the folder is taken, there is no model, it does not fit the library, or
            what was written does not give the same embeddings; nothing is left behind then.
    """
    from frugal.common.weights.run_directory import refuse_taken
    from frugal.common.weights.targets import targets

    out = options.out.resolve()
    refuse_taken(out)
    if options.to == "frugal":  # which needs no model, however large that is
        trained = open_run(options.checkpoint, average=options.moving_average)
    else:
        trained = load_exportable(options.checkpoint)
    _refuse_misfit(trained, options)
    aside = out.with_name(f".{out.name}.writing")
    target = targets(trained)[options.to]
    library = LIBRARIES[options.to]
    try:
        with quietly() if library == "transformers" else nullcontext():
            with _writing(out):
                _write(trained, target, library, aside, out.name)
            difference = _verify(target, library, aside)
        with _writing(out):
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return difference


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A full disk or a folder that is not ours is a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{out} could not be written ({reason}); choose another --out") from None


def _refuse_misfit(trained: TrainedRun, options: Options) -> None:
    from frugal.common.weights.targets import targets

    ways = targets(trained)
    misfit = _misfit(trained, options.to)
    if misfit is None:
        return
    others = [name for name, way in ways.items() if way.is_whole and way.misfit() is None]
    raise InputError(
        f"{LIBRARIES[options.to]} cannot express {misfit.option}: {misfit.reason}; export "
        f"{options.checkpoint} with --to {' or '.join(others)} instead"
    )


def _misfit(trained: TrainedRun, to: str) -> Misfit | None:
    from frugal.common.weights.targets import targets
    from frugal.common.weights.trained import Misfit, TrainedModel

    if to in (ways := targets(trained)):
        return ways[to].misfit()
    if isinstance(trained, TrainedModel) and to in ("open_clip", "timm"):
        part = "image" if to == "timm" or not trained.has_own_towers.image else "text"
        kind = type(getattr(trained.config, part)).__name__
        return Misfit(f"model.{part}={kind}", "that is a tower of another library")
    if not isinstance(trained, TrainedModel):
        has = "no text tower"
    else:
        has = "no decoder" if to == "huggingface_mae" else "a text tower"
    return Misfit("the model", f"it has {has}")


def _write(trained: TrainedRun, target: Target, library: str, folder: Path, name: str) -> None:
    """Everything into a new folder that will have this name."""
    from frugal.common.recipe import to_json
    from frugal.common.weights.model_card import model_card
    from frugal.common.weights.trained import TrainedModel

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.write(folder)
    if trained.average:
        shutil.copyfile(trained.folder / "recipe.json", folder / "recipe.json")
    else:
        (folder / "recipe.json").write_text(json.dumps(to_json(trained.recipe), indent=2))
    usage = target.usage.replace("FOLDER", name)
    card = folder / "README.md"
    if isinstance(trained, TrainedModel) and not target.is_whole:
        trained = trained.image
    card.write_text(model_card(trained, library=library, usage=usage))
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(card.stat().st_mode)  # safetensors writes for its owner alone


def _verify(target: Target, library: str, folder: Path) -> float:
    """The largest difference after reading a folder back."""
    difference = target.difference(folder)
    if difference > LARGEST_DIFFERENCE:
        raise InputError(
            f"what {library} reads out of the written folder differs by {difference:.1e} "
            f"from the model, where {LARGEST_DIFFERENCE:.0e} is rounding, so that it was removed: "
            "the weights are not finite, or this version of the library is not supported"
        )
    return difference


def _command() -> None:
    options = tyro.cli(Options, args=command_words(), prog="python -m frugal.common.export")
    difference = export(options)
    sys.stdout.write(
        f"wrote {options.out}; what {LIBRARIES[options.to]} reads out of it differs by at "
        f"most {difference:.1e}\n"
    )


def main() -> None:
    """The body of ``python -m frugal.common.export``."""
    run_politely(_command, alone=True)


if __name__ == "__main__":
    main()
