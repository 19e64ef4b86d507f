"""One way to write a model for any library."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.weights import runs
from frugal.common.weights.libraries import writers
from frugal.common.weights.library import Target, UnsupportedOption
from frugal.common.weights.model_card import model_card

_LOG = logging.getLogger("frugal")
LARGEST_DIFFERENCE = 1e-4
"""In float32, between this library and the one that reads what was written: of unit vectors, or of
what an image tower puts out, over the largest number of it."""


def save_model(bundle: ModelBundle, folder: Path | str, *, to: str = "open_clip") -> float:
    """Write a folder that another library loads, read it back with that library, and compare.

    Args:
        bundle: of :func:`frugal.common.load_model`.
        folder: must not exist, or be empty.
        to: open_clip, huggingface, huggingface_beit, huggingface_mae or timm; or frugal, a run
            directory with nothing but weights.

    Returns:
        The largest difference of a number of a unit vector, or of what an image tower puts out over
        the largest number of it.

    Raises:
        InputError: if the folder is taken, the model does not fit the library, or what was written
            does not give the same numbers; nothing is left behind then.
    """
    libraries = writers()
    if to not in libraries:
        raise InputError(f"there is no library {to!r} to write for; choose {', '.join(libraries)}")
    out = Path(folder).expanduser().resolve()
    library, target = libraries[to].name, _target(bundle, to)
    with _anew(out) as aside:
        with _writing(out):
            target.write(aside)
            runs.copy_recipe(bundle.source.path, aside)
            _write_card(bundle, target, library, aside, out.name)
        return _verified(target, library, aside)


def _target(bundle: ModelBundle, to: str) -> Target:
    """How a model is written for a target.

    Raises:
        InputError: if it cannot be, with the targets that it can be written for.
    """
    libraries = writers()
    target = _way(bundle, to)
    if isinstance(target, Target):
        return target
    ways = {other: _way(bundle, other) for other in libraries}
    others = [n for n, way in ways.items() if isinstance(way, Target) and way.is_whole]
    raise InputError(
        f"{libraries[to].name} cannot express {target.option}: {target.reason}; export "
        f"{bundle.source.path} with --to {' or '.join(others)} instead"
    )


def _way(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    """How a model is written for a target, or why it cannot be."""
    config = bundle.config
    if to != "frugal" and isinstance(config, DualEncoderConfig) and config.head_width is not None:
        reason = "a projection is one linear layer there"
        return UnsupportedOption(f"model.head_width {config.head_width}", reason)
    return writers()[to].target(bundle, to)


def save_run(path: Path, folder: Path, *, average: bool = True) -> None:
    """A run or checkpoint as a run directory with nothing but weights, in a few MiB of memory.

    Args:
        path: the run directory, or one of its checkpoints.
        folder: must not exist, or be empty.
        average: take the moving average of the weights, where the run kept one.

    Raises:
        InputError: if the folder is taken, there is no whole checkpoint, or no average that could
            be left out.
    """
    out = folder.resolve()
    checkpoint, recipe = runs.open_checkpoint(path)
    if not average and not any(name.startswith("ema/") for name in checkpoint.names()):
        raise InputError(
            f"{path} holds no moving average of its weights; leave out --no-moving-average"
        )
    bundle = runs.describe_run(path, checkpoint, recipe, average=average)
    with _anew(out) as aside, _writing(out):
        runs.copy_run(checkpoint, recipe, aside, average=average)
        _write_card(bundle, runs.as_run(bundle), "frugal", aside, out.name)


@contextmanager
def _anew(out: Path) -> Iterator[Path]:
    """A folder beside the one to write, which takes its name at the end; nothing is overwritten."""
    runs.refuse_taken(out)
    aside = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        with _writing(out):
            aside.mkdir(parents=True)
        yield aside
        with _writing(out):
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A full disk or a folder of somebody else's is a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{out} could not be written ({reason}); choose another --out") from None


def _write_card(bundle: ModelBundle, target: Target, library: str, folder: Path, name: str) -> None:
    """The page that tells people what the model is."""
    if not target.is_whole:
        bundle = replace(bundle, text=None)
    card = folder / "README.md"
    usage = target.usage.replace("FOLDER", name)
    title = runs.folder_of(bundle.source.path).resolve().name
    words = {"name": title, "library": library, "usage": usage}
    card.write_text(model_card(bundle, transform=target.transform, **words))
    if bundle.transform != target.transform:
        _LOG.warning(
            "%s prepares images by %s, as near as it comes to %s, by which this model is measured: "
            "the same file gives other pixels there", library, runs.part_in_words(target.transform),
            runs.part_in_words(bundle.transform),
        )  # fmt: skip
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(card.stat().st_mode)  # safetensors writes for its owner alone


def _verified(target: Target, library: str, folder: Path) -> float:
    """The largest difference after reading a folder back."""
    difference = target.difference(folder)
    if not difference <= LARGEST_DIFFERENCE:
        raise InputError(
            f"what {library} reads out of the written folder differs by {difference:.1e} "
            f"from the model, where {LARGEST_DIFFERENCE:.0e} is rounding, so that it was removed: "
            "the weights are not finite, or this version of the library is not supported"
        )
    return difference
