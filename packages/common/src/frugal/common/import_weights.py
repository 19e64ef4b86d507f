"""Weights of another library as a run directory: ``python -m frugal.common.import_weights``.

What it writes is evaluated, exported and started from (``--run.start-from``) like any other run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from frugal.common.cli import read_options, run_politely
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.run import make_logger
from frugal.common.weights import open_clip, runs
from frugal.common.weights.encoder_config import ImportedEncoder, with_computed_positions
from frugal.common.weights.libraries import library_of
from frugal.common.weights.library import elsewhere
from frugal.common.weights.load import describe
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
    runs.refuse_taken(options.out)
    bundle = _with_computed_positions(_read(options))
    save_model(bundle, options.out, to="frugal")
    return bundle


def _read(options: Options) -> ModelBundle:
    source = options.source
    if not source.exists():
        raise InputError(f"there is no file or folder {source}; check the path")
    library = library_of(source, options.model)
    if library is not None and library is not runs.LIBRARY:
        return library.load(source, options.model, options.weights_key)
    if source.is_file():
        raise InputError(f"{source} is no file of weights that is known here{elsewhere()}")
    if library is runs.LIBRARY:
        raise InputError(
            f"{source} is a run directory or checkpoint of this library already; give it as it is "
            "to evaluate, export and --run.start-from"
        )
    raise InputError(
        f"the folder {source} holds no model that is known here: it has neither "
        f"{open_clip.CONFIG} nor config.json{elsewhere()}"
    )


def _with_computed_positions(bundle: ModelBundle) -> ModelBundle:
    """The same, where a table of positions is bit for bit one that its tower can compute.

    Raises:
        InputError: if it has parts that towers of this library do not have.
    """
    config = bundle.config
    if isinstance(config, ImportedEncoder):
        return bundle  # which knows its own
    if not isinstance(config, DualEncoderConfig):
        kind = type(getattr(bundle.model, "model", bundle.model)).__name__
        path = bundle.source.path
        raise InputError(
            f"{path} is a {kind} of {bundle.source.library} with parts that towers of this library "
            f"do not have; python -m frugal.common.evaluate --checkpoint {path} measures it as "
            f"it is{elsewhere()}"
        )
    state = dict(bundle.model.state_dict())
    image, state = with_computed_positions(config.image, state, "image.pos_embed")
    config = replace(config, image=image)
    model = config.build()
    model.load_state_dict(state)
    return replace(bundle, model=model.eval(), config=config, image=image)


def _command() -> None:
    options = read_options(Options, "python -m frugal.common.import_weights")
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
