"""CLIPA's released weights for training, evaluation and export here.

``python -m frugal.clipa.convert open_clip_pytorch_model.bin --out runs/h14`` writes a run
directory, which ``frugal.common.evaluate --checkpoint``, ``--run.start-from`` and the export take.
It reads PyTorch and safetensors files in open_clip's layout and the npz files of the JAX code;
optimizer state is left behind.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from frugal.clipa.named_models import MODELS
from frugal.clipa.published_weights import read_published
from frugal.clipa.recipes import released
from frugal.clipa.tower_of_weights import fit_towers
from frugal.common.cli import read_options, run_politely
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import WordPiece
from frugal.common.data.word_pieces import read_entries
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.vit import ImagePooling
from frugal.common.recipe import Recipe, model_of
from frugal.common.run import make_logger
from frugal.common.weights.runs import write_converted


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a CLIPA checkpoint (PyTorch, safetensors or npz) into a run directory."""

    source: tyro.conf.Positional[Path]
    """The file, or the folder that holds it."""
    out: Path
    """Run directory to write; new or empty."""
    model: str | None = None
    """Name of the towers, such as ViT-H-14-CLIPA-336 or ViT-L-16-CL16-GAP; without it, what the
    shapes of the weights tell."""
    image_size: int | tuple[int, int] | None = None
    """Side of a square image, or height and width, in pixels; without it that of the position
    table, or 224 for an npz, which has none."""
    image_pooling: ImagePooling | None = None
    """What the image tower pools, if not what its kind pools as published: mean over the patches
    (second version), mean_all (first version), class (B/16 of the first version)."""
    heads: tuple[int, int] | None = None
    """Attention heads of the image and the text tower; only for towers of unusual widths."""
    as_in_open_clip: bool = False
    """Epsilon and GELU of open_clip's configurations, not those the weights were trained with."""
    vocab: Path | None = None
    """Vocabulary file of the second version, one entry per line; without it BERT's is fetched from
    the Hugging Face hub when it is first needed."""

    def __post_init__(self) -> None:
        if self.heads is not None and min(self.heads) < 1:
            raise InputError(f"--heads is {self.heads}, must be at least 1 each")
        if self.heads is not None and self.model is not None:
            raise InputError(
                f"--model {self.model} already says how many heads there are; leave out --heads"
            )


def convert(options: Options, log: logging.Logger) -> None:
    """Read the weights, then write the run directory.

    Raises:
        InputError: if either cannot be done; nothing is written then.
    """
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"{options.out} is there already and not empty; choose another --out")
    published = read_published(options.source)
    model, state = fit_towers(
        published,
        name=options.model,
        image_size=options.image_size,
        image_pooling=options.image_pooling,
        heads=options.heads,
        as_in_open_clip=options.as_in_open_clip,
        source=str(options.source),
    )
    recipe = _with_vocabulary(released(model), options.vocab, log)
    write_converted(options.out, recipe, state, step=0)
    image, text = model.image, model.text
    sys.stdout.write(
        f"{options.out}: image tower {image.width} wide, {image.depth} blocks, patches of "
        f"{image.patch_size}, {image.height_width[0]}x{image.height_width[1]} pixels, "
        f"{image.positions} positions, pooled by {image.pooling}; text tower {text.width} wide, "
        f"{text.depth} blocks, {text.length} tokens, pooled by {text.pooling}; "
        f"{sum(tensor.numel() for tensor in state.values()):,} parameters\n"
    )


def _with_vocabulary(recipe: Recipe, vocab: Path | None, log: logging.Logger) -> Recipe:
    """The recipe with a tokenizer that reads a vocabulary file.

    Raises:
        InputError: if the towers read no such file, or it has more entries than the token table.
    """
    data = recipe.data
    assert isinstance(data, PairData)
    if not isinstance(data.tokenizer, WordPiece):
        if vocab is not None:
            raise InputError(
                "--vocab has no effect: CLIPA's first version has CLIP's own vocabulary; leave it "
                "out"
            )
        return recipe
    rows = model_of(DualEncoderConfig, recipe.model).text.vocabulary
    if vocab is None:
        log.info(
            "without --vocab, BERT's uncased vocabulary will be fetched from the Hugging Face hub "
            "when captions are first read"
        )
        return recipe
    lines = len(read_entries(vocab))
    if lines > rows:
        raise InputError(
            f"the vocabulary {vocab} has {lines:,} lines, more than the model's token table has "
            f"rows ({rows:,}); give the file it was trained with"
        )
    tokenizer = replace(data.tokenizer, vocab=vocab, entries=lines)
    tokenizer.load()
    return replace(recipe, data=replace(data, tokenizer=tokenizer))


def main() -> None:
    """The body of ``python -m frugal.clipa.convert``."""

    def command() -> None:
        options = read_options(
            Options,
            "python -m frugal.clipa.convert",
            description=f"{Options.__doc__}\n\nNames of towers: {', '.join(MODELS)}.",
        )
        convert(options, make_logger(0))

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
