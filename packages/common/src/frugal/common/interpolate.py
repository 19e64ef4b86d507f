"""Between the weights that a model was tuned from and those it was tuned to.

``python -m frugal.common.interpolate START TUNED --share 0.5 --out FOLDER``: what was tuned on
narrow data has forgotten some of what it could; half-way back it often has both (WiSE-FT, Wortsman
et al., arXiv:2109.01903, equation 2).
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from frugal.common.checkpoint.commit import read_best
from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.cli import read_options, run_politely
from frugal.common.data.tokenizers import token_difference
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.same_function import differences
from frugal.common.ranges import Share, check_ranges
from frugal.common.run import make_logger
from frugal.common.weights.load import load_model
from frugal.common.weights.runs import refuse_taken
from frugal.common.weights.save import save_model

Model = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the weighted mean of the weights of two models of one architecture."""

    start: Model
    """What was tuned: whatever frugal.common.evaluate takes."""
    tuned: Model
    """What became of it."""
    share: Share = 0.5
    """Of the tuned weights: 0 gives the start back, 1 the tuned model."""
    out: Path
    """Run directory to write, with nothing but weights; new or empty."""


def interpolate(options: Options) -> ModelBundle:
    """Write the model between two; its buffers are mixed like its weights.

    Returns:
        What was written.

    Raises:
        InputError: if the two cannot be mixed, or the folder cannot be written.
    """
    check_ranges(options)
    refuse_taken(options.out)
    start, tuned = load_model(options.start), load_model(options.tuned)
    _tell_which(options.tuned, tuned)
    before, after = start.model.state_dict(), tuned.model.state_dict()
    _check_alike(before, after, options)
    _check_function(start, tuned, options)
    mixed = {name: _between(before[name], after[name], options.share) for name in after}
    tuned.model.load_state_dict(mixed)
    # what was measured was measured with other weights
    source = replace(tuned.source, numbers={}, name=f"{options.share:g} of the way from its start")
    bundle = replace(tuned, source=source)
    save_model(bundle, options.out, to="frugal")
    return bundle


def _tell_which(path: Path, tuned: ModelBundle) -> None:
    """Say which step of a run is taken, where there is one that its evaluations found better."""
    folder = path / "checkpoints"
    if not (best := read_best(folder)):
        return
    step = find_checkpoint(folder / best["checkpoint"]).step
    if step == tuned.source.step:
        return
    logging.getLogger("frugal").warning(
        "%s is taken as it was at its last step, %s; its best checkpoint is of step %d: give %s in "
        "its place for that", path, tuned.source.step, step, folder / "best.json",
    )  # fmt: skip


def _between(start: Tensor, tuned: Tensor, share: float) -> Tensor:
    return torch.lerp(start, tuned, share) if tuned.is_floating_point() else tuned


def _check_alike(start: dict[str, Tensor], tuned: dict[str, Tensor], options: Options) -> None:
    """Refuse two models whose weights have no mean."""
    names = f"{options.start} and {options.tuned}"
    if odd := sorted(start.keys() ^ tuned.keys()):
        raise InputError(f"{names} are of two architectures: only one of them has {odd[0]}")
    for name, value in tuned.items():
        before = start[name]
        if before.shape != value.shape:
            raise InputError(
                f"{names} are of two sizes: {name} is {tuple(before.shape)} and "
                f"{tuple(value.shape)}"
            )
        if not value.is_floating_point() and not torch.equal(before, value):
            raise InputError(f"{names} differ in {name}, which holds whole numbers")


def _check_function(start: ModelBundle, tuned: ModelBundle, options: Options) -> None:
    """Refuse two models that compute otherwise of equal weights, or read captions otherwise."""
    names = f"{options.start} and {options.tuned}"
    for found in differences(start.config, tuned.config, part="model"):
        if found.reason is None:
            raise InputError(
                f"{names} compute differently: model.{found.field} is {found.there} and "
                f"{found.here}; only models of one function have weights between them"
            )
    sources = (start.tokenizer_source, tuned.tokenizer_source)
    if sources[0] is None or sources[1] is None or sources[0] == sources[1]:
        return
    odd = token_difference(sources[0].load(), sources[1].load())
    if odd is None:
        return
    if not odd.of_odd_texts:
        raise InputError(f"{names} read captions differently: the tokenizer {odd.words}")
    logging.getLogger("frugal").warning(
        "the tokenizers of %s differ in rare texts; the second is taken: it %s", names, odd.words
    )


def main() -> None:
    """The body of ``python -m frugal.common.interpolate``."""

    def command() -> None:
        options = read_options(Options, "python -m frugal.common.interpolate")
        make_logger(0)
        interpolate(options)
        sys.stdout.write(
            f"{options.out}: {options.share:g} of the way from {options.start} to {options.tuned}\n"
        )

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
