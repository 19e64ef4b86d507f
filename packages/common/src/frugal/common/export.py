"""Write a trained model for another library: ``python -m frugal.common.export --to open_clip``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import literal_type_from_choices

from frugal.common.cli import read_options, run_politely
from frugal.common.errors import InputError
from frugal.common.run import make_logger
from frugal.common.weights import runs
from frugal.common.weights.libraries import writers
from frugal.common.weights.load import load_model
from frugal.common.weights.save import save_model, save_run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a trained model for another library, or without what only training needs."""

    checkpoint: Path
    """A run directory, or one of its checkpoints; or a folder or file of another library, as
    evaluate takes them."""
    to: Annotated[str, tyro.conf.arg(constructor=literal_type_from_choices([*writers()]))]
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


def export(options: Options) -> float:
    """Write the folder, read it back with the library it is for, and compare.

    Returns:
        See :func:`frugal.common.save_model`.

    Raises:
        InputError: if the folder is taken, there is no model, it does not fit the library, or
            what was written does not give the same numbers; nothing is left behind then.
    """
    make_logger(0)
    runs.refuse_taken(options.out)  # before weights are read
    path = options.checkpoint
    if options.to == "frugal" and runs.knows(path) and runs.recipe_if_any(path) is not None:
        # which makes no model, however large that is
        save_run(path, options.out, average=options.moving_average)
        return 0.0
    return save_model(load_model(path), options.out, to=options.to)


def _command() -> None:
    options = read_options(Options, "python -m frugal.common.export")
    difference = export(options)
    sys.stdout.write(
        f"wrote {options.out}; what {writers()[options.to].name} reads out of it differs by at "
        f"most {difference:.1e}\n"
    )


def main() -> None:
    """The body of ``python -m frugal.common.export``."""
    run_politely(_command, alone=True)


if __name__ == "__main__":
    main()
