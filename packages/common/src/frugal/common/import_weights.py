"""Weights of another library as a run directory: ``python -m frugal.common.import_weights``.

What it writes is evaluated, exported and started from (``--run.start-from``) like any other run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from frugal.common.cli import command_words, run_politely
from frugal.common.models.bundle import ModelBundle
from frugal.common.run import make_logger
from frugal.common.weights.reading import describe, read, with_fixed_positions
from frugal.common.weights.runs import refuse_taken
from frugal.common.weights.save import save_model


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


def import_weights(options: Options) -> ModelBundle:
    """Read the weights, then write the run directory.

    Returns:
        What was written.

    Raises:
        InputError: if either cannot be done; nothing is written then.
    """
    refuse_taken(options.out)
    bundle = read(options.source, name=options.model, key=options.weights_key)
    bundle = with_fixed_positions(bundle)
    save_model(bundle, options.out, to="frugal")
    return bundle


def _command() -> None:
    options = tyro.cli(Options, args=command_words(), prog="python -m frugal.common.import_weights")
    make_logger(0)
    bundle = import_weights(options)
    sys.stdout.write(f"{options.out}: {describe(bundle)}\n")
    if left := bundle.source.left_behind:
        sys.stdout.write(f"left behind: {', '.join(left)}\n")


def main() -> None:
    """The body of ``python -m frugal.common.import_weights``."""
    run_politely(_command, alone=True)


if __name__ == "__main__":
    main()
