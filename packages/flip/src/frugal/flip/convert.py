"""FLIP's released weights for training, evaluation and export here.

``python -m frugal.flip.convert flip_large16_laion2b_v2.zip --out runs/flip-large`` writes a run
directory, which ``frugal.common.evaluate --checkpoint``, ``--run.start-from`` and the export take.
Optimizer state is left behind: FLIP's own unmasked tuning starts without it (arXiv:2212.00794),
and where in its data a run of the reference stood is not written down in any archive.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from frugal.common.cli import read_options, run_politely
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import WordPiece
from frugal.common.data.word_pieces import read_entries
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.weight_names import State
from frugal.common.recipe import Recipe, model_of
from frugal.common.run import make_logger
from frugal.common.weights.runs import write_converted
from frugal.flip.published_weights import (
    IMAGE_TABLE,
    LOGIT_SCALE,
    Sizes,
    check_image_table,
    check_names,
    config_of_sizes,
    empty_state,
    flax_views,
    sizes_of_config,
    sizes_of_tree,
)
from frugal.flip.recipes import RECIPES
from frugal.flip.stored_arrays import StoredArray
from frugal.flip.t5x_archive import T5xArchive, open_archive

_PUBLISHED = ("base", "large", "huge14")
_VOCABULARY = 30_523
"""Rows of the published token tables."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a checkpoint of the FLIP release (t5x) into a run directory."""

    source: tyro.conf.Positional[Path]
    """The archive: a zip, a folder of checkpoints (the newest is taken), the folder of one, or its
    index file."""
    out: Path
    """Run directory to write; new or empty."""
    recipe: str | None = None
    """The recipe whose model the archive is expected to hold; without it, the one of base, large
    and huge14 that fits."""
    vocab: Path | None = None
    """Vocabulary file of the tokenizer, one entry per line; without it BERT's is fetched from the
    Hugging Face hub when it is first needed."""
    image_heads: int | None = None
    """Attention heads of the image tower; no archive tells, only needed for other models."""
    text_heads: int | None = None
    """Attention heads of the text tower; likewise."""
    temperature: float | None = None
    """Of a model that was trained with a fixed temperature, whose archive holds none."""

    def __post_init__(self) -> None:
        if (self.image_heads is None) != (self.text_heads is None):
            raise InputError("give --image-heads and --text-heads together, or neither")
        for name in ("image_heads", "text_heads"):
            if (heads := getattr(self, name)) is not None and heads < 1:
                raise InputError(f"--{name.replace('_', '-')} is {heads}, must be at least 1")
        if self.recipe is not None and self.image_heads is not None:
            raise InputError(
                f"--recipe {self.recipe} already says how many heads there are; leave out "
                "--image-heads and --text-heads"
            )
        if self.temperature is not None and not 0 < self.temperature <= 1:
            raise InputError(f"--temperature is {self.temperature}, must lie in (0, 1]")


def convert(options: Options, log: logging.Logger) -> None:
    """Read the archive, then write the run directory.

    Raises:
        InputError: if either cannot be done; nothing is written then.
    """
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"{options.out} is there already and not empty; choose another --out")
    with open_archive(options.source) as archive:
        if archive.older:
            log.info("taking %s; older: %s", archive.name, ", ".join(archive.older))
        arrays, step = archive.parameters, archive.step
        sizes = sizes_of_tree(_Shapes(arrays), source=archive.name)
        name, recipe = _recipe(sizes, options, source=archive.name)
        recipe = _with_vocabulary(recipe, options.vocab, log)
        model = model_of(DualEncoderConfig, recipe.model)
        weights = _read(archive, model, options.temperature, log)
    write_converted(options.out, recipe, weights, step=step)
    sys.stdout.write(
        f"{options.out}: {sizes}; step {step:,}, "
        f"{sum(tensor.numel() for tensor in weights.values()):,} parameters, recipe {name}\n"
    )


class _Shapes(Mapping[str, tuple[int, ...]]):
    """Shapes by name, read when asked for: what else an archive holds is not looked at."""

    def __init__(self, arrays: Mapping[str, StoredArray]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _recipe(sizes: Sizes, options: Options, *, source: str) -> tuple[str, Recipe]:
    """The recipe that was stated, or the published one that fits, with the archive's model.

    Raises:
        InputError: if the archive is not of the stated recipe's size, or of no published one and
            the heads are not given.
    """

    def sizes_of_recipe(name: str) -> Sizes:
        return sizes_of_config(model_of(DualEncoderConfig, RECIPES[name]().model))

    published = {name: sizes_of_recipe(name) for name in _PUBLISHED}
    fits = next((name for name in _PUBLISHED if published[name].blocks == sizes.blocks), None)
    name = fits or "base"
    if options.recipe is not None:
        name = options.recipe.replace("_", "-")
        if name not in RECIPES:
            raise InputError(
                f"there is no recipe {options.recipe!r}; choose from {', '.join(RECIPES)}"
            )
        _check_size(sizes, sizes_of_recipe(name), name, fits, source=source)
    elif fits is None and options.image_heads is None:
        raise InputError(
            f"{source} holds none of {', '.join(_PUBLISHED)} ({sizes}), and nothing in it tells "
            "its attention heads; give --image-heads and --text-heads"
        )
    recipe = RECIPES[name]()
    published_model = model_of(DualEncoderConfig, recipe.model)
    model = config_of_sizes(
        sizes,
        published_model,
        image_heads=options.image_heads or published_model.image.heads,
        text_heads=options.text_heads or published_model.text.heads,
    )
    return name, replace(recipe, model=model)


def _check_size(sizes: Sizes, expected: Sizes, name: str, fits: str | None, *, source: str) -> None:
    """Refuse another size than the recipe's; grid and text length may differ after tuning."""
    alike = replace(sizes, image_size=expected.image_size, text_length=expected.text_length)
    if alike == expected:
        return
    field = next(key for key, value in vars(alike).items() if value != getattr(expected, key))
    found = f"FLIP's {fits}" if fits else "another model"
    raise InputError(
        f"{source} holds {found} ({sizes}) and not the model of --recipe {name} ({expected}): "
        f"{field} is {getattr(sizes, field)} instead of {getattr(expected, field)}; "
        + (f"give --recipe {fits}" if fits else "leave --recipe out")
    )


def _with_vocabulary(recipe: Recipe, vocab: Path | None, log: logging.Logger) -> Recipe:
    """The recipe with a tokenizer that reads a vocabulary file.

    Raises:
        InputError: if the file has another length than the model's token table asks for.
    """
    rows = model_of(DualEncoderConfig, recipe.model).text.vocabulary
    if vocab is None:
        own = "" if rows == _VOCABULARY else f", but this model has {rows:,} tokens: give its own"
        log.info(
            "without --vocab, BERT's uncased vocabulary (%s lines) will be fetched from the "
            "Hugging Face hub when captions are first read%s",
            f"{_VOCABULARY - 1:,}",
            own,
        )
        return recipe
    lines = len(read_entries(vocab))
    # TensorFlow Text counts one more entry than the file has, which no text ever reaches
    if lines != rows - 1 and (rows == _VOCABULARY or lines != rows):
        raise InputError(
            f"the vocabulary {vocab} has {lines:,} lines, but the model was trained with "
            f"{rows - 1:,} (its token table has {rows:,} rows); give the file it was trained with"
        )
    tokenizer = WordPiece(vocab=vocab, entries=lines)
    tokenizer.load()
    assert isinstance(recipe.data, PairData)
    return replace(recipe, data=replace(recipe.data, tokenizer=tokenizer))


def _read(
    archive: T5xArchive,
    model: DualEncoderConfig,
    temperature: float | None,
    log: logging.Logger,
) -> State:
    """The model's weights by our names, each array copied to its place in them.

    Raises:
        InputError: if a parameter is missing, of another shape or damaged.
    """
    from tqdm import tqdm

    arrays = archive.parameters
    wanted = flax_views(empty_state(model, device="meta"), model)
    log_scale = _fixed_log_scale(arrays, temperature, source=archive.name)
    if log_scale is not None:
        del wanted[LOGIT_SCALE]
    check_names(_Shapes(arrays), wanted, source=archive.name)
    table = np.empty(arrays[IMAGE_TABLE].shape, dtype=np.float32)
    arrays[IMAGE_TABLE].read_into(table)
    check_image_table(torch.from_numpy(table), model, source=archive.name)
    state = empty_state(model)
    views = flax_views(state, model)
    if log_scale is not None:
        views.pop(LOGIT_SCALE).fill_(log_scale)
    if others := [name for name in arrays if name not in views and name != IMAGE_TABLE]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        log.info("left aside what FLIP's towers do not have: %s%s", others[0], more)
    # in the order of the archive: an index is then read from its beginning to its end
    for name in tqdm([name for name in arrays if name in views], unit="array", disable=None):
        arrays[name].read_into(views[name].numpy().reshape(arrays[name].shape))
    refuse_not_finite(state, source=archive.name)
    return state


def _fixed_log_scale(
    arrays: Mapping[str, StoredArray], temperature: float | None, *, source: str
) -> float | None:
    """The logit scale of a model that has none in its archive; None where it has.

    Raises:
        InputError: if a temperature is wanted and not given, or given and not wanted.
    """
    if LOGIT_SCALE not in arrays and temperature is None:
        raise InputError(
            f"{source} has no {LOGIT_SCALE}: the model was trained with a fixed temperature, "
            "which no archive tells; give --temperature"
        )
    if LOGIT_SCALE in arrays and temperature is not None:
        raise InputError(
            f"{source} holds the temperature that the model has learned; leave out --temperature"
        )
    return None if temperature is None else -math.log(temperature)


def main() -> None:
    """The body of ``python -m frugal.flip.convert``."""

    def command() -> None:
        options = read_options(Options, "python -m frugal.flip.convert")
        convert(options, make_logger(0))

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
