"""Weights of another library as a run directory: ``python -m frugal.common.import_weights``.

What it writes is evaluated, exported and started from (``--run.start-from``) like any other run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from frugal.common.cli import run_politely
from frugal.common.words import command_words

if TYPE_CHECKING:
    from frugal.common.weights.imported import Imported


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a run directory of a model that another library trained."""

    source: tyro.conf.Positional[Path]
    """A folder of open_clip, transformers (CLIP, ViT, ViTMAE) or timm; a file of OpenAI's CLIP; a
    file of a vision transformer; or with --model any file of weights that open_clip or timm
    loads."""
    out: Path
    """Run directory to write; new or empty."""
    model: str | None = None
    """Of a file of weights: open_clip's name of the model, such as ViT-B-16; openai for a state
    dict of OpenAI's; or timm's name of an image tower, such as vit_base_patch16_224."""
    weights_key: str | None = None
    """Of a file that holds several sets of weights: the keys that lead to the one to take, such as
    model_ema, or what stands in front of its names, such as momentum_encoder."""


def import_weights(options: Options) -> Imported:
    """Read the weights, then write the run directory.

    Returns:
        What was read.

    Raises:
        InputError: if either cannot be done; nothing is written then.
    """
    from frugal.common.weights.imported import read
    from frugal.common.weights.run_directory import refuse_taken, write_converted

    refuse_taken(options.out)
    found = read(options.source, name=options.model, key=options.weights_key)
    write_converted(options.out, found.recipe, found.state, step=0)
    return found


def _command() -> None:
    options = tyro.cli(Options, args=command_words(), prog="python -m frugal.common.import_weights")
    found = import_weights(options)
    sys.stdout.write(f"{options.out}: {found.described}\n")
    if found.left:
        sys.stdout.write(f"left behind: {', '.join(found.left)}\n")


def main() -> None:
    """The body of ``python -m frugal.common.import_weights``."""
    run_politely(_command, alone=True)


if __name__ == "__main__":
    main()
