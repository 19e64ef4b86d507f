"""One way to write a model for any library."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.image_encoder import image_encoder, with_projection_as_head
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.quiet_transformers import quietly
from frugal.common.weights import (
    beit_folder,
    dual_encoder_folder,
    open_clip_folder,
    runs,
    timm_folder,
    transformers_folder,
    upernet_folder,
    vit_folder,
    vit_mae_folder,
)
from frugal.common.weights.model_card import model_card
from frugal.common.weights.transformers_tokenizer import differences
from frugal.common.weights.written import (
    UnsupportedOption,
    embedding_difference,
    tower_difference,
    two_towers,
)

LARGEST_DIFFERENCE = 1e-4
"""In float32, between this library and the one that reads what was written: of unit vectors, or of
what an image tower puts out, over the largest number of it."""
LIBRARIES = {
    "frugal": "frugal",
    "open_clip": "open_clip",
    "huggingface": "transformers",
    "huggingface_beit": "transformers",
    "huggingface_mae": "transformers",
    "timm": "timm",
}
"""What models are written for, as its users call it, by the name on the command line."""


@dataclass(frozen=True)
class Target:
    """One way to write a model."""

    usage: str
    """How to load FOLDER, in Markdown."""
    unsupported: Callable[[], UnsupportedOption | None]
    """The first option of the model that the library has no place for."""
    write: Callable[[Path], None]
    """Fills an empty folder."""
    difference: Callable[[Path], float]
    """The largest one between what the library reads out of the folder and the model."""
    is_whole: bool = True
    """A text tower is not left behind."""


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
    if to not in LIBRARIES:
        raise InputError(f"there is no library {to!r} to write for; choose {', '.join(LIBRARIES)}")
    out = Path(folder).resolve()
    _refuse_unsupported(bundle, to)
    target, library = targets(bundle)[to], LIBRARIES[to]
    with quietly() if library == "transformers" else nullcontext(), _anew(out) as aside:
        with _writing(out):
            target.write(aside)
            runs.copy_recipe(bundle.source.path, aside)
            _write_card(bundle, target, library, aside, out.name)
        return _verified(target, library, aside)


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
        _write_card(bundle, _as_run(bundle), "frugal", aside, out.name)


@contextmanager
def _anew(out: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its name at the end; nothing is overwritten."""
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


def targets(bundle: ModelBundle) -> dict[str, Target]:
    """Every way to write this kind of model, by the name on the command line."""
    own = _as_run(bundle)
    if bundle.text is not None:
        return {"frugal": own} | _targets_of_two_towers(bundle)
    if isinstance(bundle.image, ImageTower):
        return {"frugal": own} | _targets_of_a_tower(bundle)
    return {"frugal": own}


def _as_run(bundle: ModelBundle) -> Target:
    return Target(
        usage=runs.USAGE if bundle.text is not None else runs.USAGE_OF_A_TOWER,
        unsupported=lambda: None,
        write=lambda folder: runs.write_run(bundle, folder),
        difference=lambda folder: runs.difference(bundle, folder),
    )


def has_own_towers(bundle: ModelBundle) -> tuple[bool, bool]:
    """Whether the image tower and the text tower are of this library."""
    return isinstance(bundle.image, ImageTower), isinstance(bundle.text, TextTower)


def _targets_of_two_towers(bundle: ModelBundle) -> dict[str, Target]:
    towers, is_own = two_towers(bundle), has_own_towers(bundle)
    timm = {"timm": replace(_timm(bundle), is_whole=False)} if is_own[0] else {}
    mixed = Target(
        usage=_with_differences(dual_encoder_folder.USAGE, towers.tokenizer),
        unsupported=lambda: dual_encoder_folder.unsupported(towers),
        write=lambda folder: dual_encoder_folder.write(towers, folder),
        difference=lambda folder: embedding_difference(bundle, dual_encoder_folder.embed, folder),
    )
    if not all(is_own):
        return {"huggingface": mixed, **timm}
    clip = Target(
        usage=_with_differences(transformers_folder.USAGE, towers.tokenizer),
        unsupported=lambda: transformers_folder.unsupported(towers),
        write=lambda folder: transformers_folder.write(towers, folder),
        difference=lambda folder: embedding_difference(bundle, transformers_folder.embed, folder),
    )
    return {
        "open_clip": Target(
            usage=open_clip_folder.usage(towers),
            unsupported=lambda: open_clip_folder.unsupported(towers),
            write=lambda folder: open_clip_folder.write(towers, folder),
            difference=lambda folder: embedding_difference(bundle, open_clip_folder.embed, folder),
        ),
        # not every image tower is CLIP's, and transformers joins others to CLIP's text tower
        "huggingface": mixed if clip.unsupported() and not mixed.unsupported() else clip,
        **timm,
    }


def _with_differences(usage: str, tokenizer: Tokenizer) -> str:
    return f"{usage.rstrip()}\n\n{differences(tokenizer)}".rstrip()


def _targets_of_a_tower(bundle: ModelBundle) -> dict[str, Target]:
    encoder = image_encoder(bundle)
    has_head = encoder.head is not None
    plain = Target(
        usage=vit_folder.CLASSIFIER_USAGE if has_head else vit_folder.USAGE,
        unsupported=lambda: vit_folder.unsupported(encoder),
        write=lambda folder: vit_folder.write(encoder, folder),
        difference=lambda folder: tower_difference(encoder, vit_folder.see, folder),
    )
    beit = Target(
        usage=vit_folder.CLASSIFIER_USAGE if has_head else beit_folder.usage(encoder.tower),
        unsupported=lambda: beit_folder.unsupported(encoder),
        write=lambda folder: beit_folder.write(encoder, folder),
        difference=lambda folder: tower_difference(encoder, vit_folder.see, folder),
    )
    segmenter = Target(
        usage=upernet_folder.USAGE,
        unsupported=lambda: upernet_folder.unsupported(bundle),
        write=lambda folder: upernet_folder.write(bundle, folder),
        difference=lambda folder: upernet_folder.difference(bundle, folder),
    )
    if upernet_folder.is_segmenter(bundle):
        best = segmenter
    else:
        best = beit if plain.unsupported() and not beit.unsupported() else plain
    return {
        "huggingface": best,
        "huggingface_beit": beit,
        "huggingface_mae": Target(
            usage=vit_mae_folder.USAGE,
            unsupported=lambda: vit_mae_folder.unsupported(bundle),
            write=lambda folder: vit_mae_folder.write(bundle, folder),
            difference=lambda folder: vit_mae_folder.difference(bundle, folder),
        ),
        "timm": _timm(bundle),
    }


def _timm(bundle: ModelBundle) -> Target:
    encoder = with_projection_as_head(image_encoder(bundle))
    return Target(
        usage=timm_folder.USAGE,
        unsupported=lambda: timm_folder.unsupported(encoder),
        write=lambda folder: timm_folder.write(encoder, folder),
        difference=lambda folder: tower_difference(encoder, timm_folder.see, folder),
    )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A full disk or a folder that is not ours is a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{out} could not be written ({reason}); choose another --out") from None


def _refuse_unsupported(bundle: ModelBundle, to: str) -> None:
    ways = targets(bundle)
    unsupported = ways[to].unsupported() if to in ways else _unsupported_kind(bundle, to)
    if unsupported is None:
        return
    others = [n for n, way in ways.items() if way.is_whole and way.unsupported() is None]
    raise InputError(
        f"{LIBRARIES[to]} cannot express {unsupported.option}: {unsupported.reason}; export "
        f"{bundle.source.path} with --to {' or '.join(others)} instead"
    )


def _unsupported_kind(bundle: ModelBundle, to: str) -> UnsupportedOption:
    """Why there is no such way to write a model at all."""
    has_text = bundle.text is not None
    if has_text and to in ("open_clip", "timm"):
        is_own = has_own_towers(bundle)
        part = "image" if to == "timm" or not is_own[0] else "text"
        kind = type(bundle.image if part == "image" else bundle.text).__name__
        return UnsupportedOption(f"model.{part}={kind}", "that is a tower of another library")
    if not has_text:
        has = "no text tower"
    else:
        has = "no decoder" if to == "huggingface_mae" else "a text tower"
    return UnsupportedOption("the model", f"it has {has}")


def _write_card(bundle: ModelBundle, target: Target, library: str, folder: Path, name: str) -> None:
    """The page that tells people what the model is."""
    if not target.is_whole:
        bundle = replace(bundle, text=None)
    card = folder / "README.md"
    usage = target.usage.replace("FOLDER", name)
    title = runs.folder_of(bundle.source.path).resolve().name
    card.write_text(model_card(bundle, name=title, library=library, usage=usage))
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
