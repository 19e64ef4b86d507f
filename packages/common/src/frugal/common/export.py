"""Write a trained model for another library: ``python -m frugal.common.export --to open_clip``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from frugal.common.commands import run_politely
from frugal.common.errors import InputError

if TYPE_CHECKING:
    from frugal.common.interop.trained import Misfit, TrainedModel

LARGEST_DIFFERENCE = 1e-4
"""Of unit vectors in float32, between this library and the one that reads what was written."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a trained model for another library, or without what only training needs."""

    checkpoint: Path
    """A run directory, or one of its checkpoints."""
    to: Literal["frugal", "open_clip", "huggingface"]
    """frugal: a run directory with nothing but weights. open_clip: a folder for its local-dir
    names. huggingface: a folder for transformers' CLIPModel."""
    out: Path
    """Folder that is written; it must not exist, or be empty."""


@dataclass(frozen=True)
class Target:
    """One library that models leave for."""

    library: str
    """As its users call it."""
    usage: str
    """How to load FOLDER, in Markdown."""
    misfit: Callable[[TrainedModel], Misfit | None]
    """The first option of a model that the library has no place for."""
    write: Callable[[TrainedModel, Path], None]
    """Fills an empty folder."""
    difference: Callable[[TrainedModel, Path], float]
    """The largest one between what the library reads out of the folder and the model."""


def targets() -> dict[str, Target]:
    """Every library that models leave for, by the name on the command line."""
    from frugal.common.interop import open_clip_folder, run_directory, transformers_folder

    return {
        "frugal": Target(
            library="frugal",
            usage=run_directory.USAGE,
            misfit=run_directory.misfit,
            write=run_directory.write,
            difference=_difference_of_weights,
        ),
        "open_clip": Target(
            library="open_clip",
            usage=open_clip_folder.USAGE,
            misfit=open_clip_folder.misfit,
            write=open_clip_folder.write,
            difference=lambda trained, out: trained.difference(open_clip_folder.embed, out),
        ),
        "huggingface": Target(
            library="transformers",
            usage=transformers_folder.USAGE,
            misfit=transformers_folder.misfit,
            write=transformers_folder.write,
            difference=lambda trained, out: trained.difference(transformers_folder.embed, out),
        ),
    }


def _difference_of_weights(trained: TrainedModel, folder: Path) -> float:
    """Equal weights give equal embeddings."""
    written = load(folder).model.state_dict()
    same = all(tensor.equal(written[name]) for name, tensor in trained.model.state_dict().items())
    return 0.0 if same else float("inf")


def load(path: Path) -> TrainedModel:
    """The model of a run directory or checkpoint with everything that is needed to use it.

    Raises:
        InputError: if there is no whole checkpoint, or it is not of two towers.
    """
    from frugal.common.checkpoint.store import find_checkpoint
    from frugal.common.evaluate import load_trained
    from frugal.common.interop.model_card import measured
    from frugal.common.interop.trained import TrainedModel
    from frugal.common.models.dual_encoder import DualEncoder

    trained = load_trained(path, device="cpu")
    folder = trained.run.dir
    if not isinstance(trained.model, DualEncoder):
        raise InputError(
            f"{path} holds a {type(trained.model).__name__}; only models of an image and a text "
            "tower can be exported"
        )
    return TrainedModel(
        model=trained.model,
        recipe=trained.recipe,
        checkpoint=find_checkpoint(path),
        folder=folder,
        numbers=measured(folder, step=trained.step),
    )


def export(options: Options) -> float:
    """Write the folder, read it back with the library it is for, and compare.

    Returns:
        The largest difference of a number of a unit vector.

    Raises:
        InputError: if the folder is taken, there is no model, it does not fit the library, or
            what was written does not give the same embeddings; nothing is left behind then.
    """
    out = options.out.resolve()
    _refuse_taken(out)
    trained = load(options.checkpoint)
    _refuse_misfit(trained, options)
    aside = out.with_name(f".{out.name}.writing")
    target = targets()[options.to]
    try:
        with _writing(out):
            _write(trained, target, aside, out.name)
        difference = _verify(trained, target, aside)
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


def _refuse_taken(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "is not empty" if out.is_dir() else "is a file"
        raise InputError(f"{out} {what}, and nothing is overwritten; choose another --out")


def _refuse_misfit(trained: TrainedModel, options: Options) -> None:
    misfit = targets()[options.to].misfit(trained)
    if misfit is None:
        return
    others = [name for name, target in targets().items() if target.misfit(trained) is None]
    raise InputError(
        f"{targets()[options.to].library} cannot express {misfit.option}: {misfit.reason}; export "
        f"{options.checkpoint} with --to {' or '.join(others)} instead"
    )


def _write(trained: TrainedModel, target: Target, folder: Path, name: str) -> None:
    """Everything into a new folder that will have this name."""
    from frugal.common.interop.model_card import model_card

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.write(trained, folder)
    shutil.copyfile(trained.folder / "recipe.json", folder / "recipe.json")
    usage = target.usage.replace("FOLDER", name)
    card = folder / "README.md"
    card.write_text(model_card(trained, library=target.library, usage=usage))
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(card.stat().st_mode)  # safetensors writes for its owner alone


def _verify(trained: TrainedModel, target: Target, folder: Path) -> float:
    """The largest difference after reading a folder back."""
    difference = target.difference(trained, folder)
    if difference > LARGEST_DIFFERENCE:
        raise InputError(
            f"what {target.library} reads out of the written folder differs by {difference:.1e} "
            f"from the model, where {LARGEST_DIFFERENCE:.0e} is rounding, so that it was removed: "
            "the weights are not finite, or this version of the library is not supported"
        )
    return difference


def _command() -> None:
    options = tyro.cli(Options, prog="python -m frugal.common.export")
    difference = export(options)
    sys.stdout.write(
        f"wrote {options.out}; what {targets()[options.to].library} reads out of it differs by at "
        f"most {difference:.1e}\n"
    )


def main() -> None:
    """The body of ``python -m frugal.common.export``."""
    run_politely(_command)


if __name__ == "__main__":
    main()
