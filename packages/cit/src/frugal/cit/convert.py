"""CiT's released models for training, evaluation and export here, and runs of ours as such folders.

``python -m frugal.cit.convert FOLDER --out runs/cit`` writes a run directory, which
``frugal.common.evaluate --checkpoint``, ``--run.start-from`` and the export take. It reads released
folders, checkpoints of the released code's training and any VisionTextDualEncoder folder of
transformers. The other way, ``python -m frugal.cit.convert runs/cit --out FOLDER`` writes a folder
in the released layout.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from frugal.cit.objective import LockedContrastive
from frugal.cit.published_dual import (
    Heads,
    Released,
    kind_of,
    read_released,
    released_settings,
    to_released,
)
from frugal.cit.recipes import published_optimizer, published_schedule
from frugal.common.checkpoint.store import find_checkpoint, load_weights
from frugal.common.cli import read_options, run_politely
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import HuggingFace
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.pretrained import PretrainedDualEncoderConfig
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import Recipe, Reductions, model_of
from frugal.common.recipe_json import load_recipe
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.text import Truncate
from frugal.common.weights.runs import write_converted

_UPDATES, _BATCH = 5_000, 16_384


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert between released models and run directories."""

    source: tyro.conf.Positional[Path]
    """A released folder or file, or a run directory or checkpoint of ours."""
    out: Path
    """The run directory, or the folder, to write; new or empty."""
    tokenizer: str | None = None
    """Folder of BERT's uncased tokenizer, or its name on the Hugging Face hub, which released
    models do not hold (google-bert/bert-base-uncased by default)."""
    length: int | None = None
    """Most tokens of a caption, special tokens included; 32 by default."""
    image_heads: int | None = None
    """Attention heads of an image tower of an unusual width."""
    text_heads: int | None = None
    """Attention heads of a text tower of an unusual width, where no config.json says it."""
    kind: Literal["moco", "augreg", "swag"] | None = None
    """How a run's image tower is written; by default what it looks like."""

    def __post_init__(self) -> None:
        for name in ("length", "image_heads", "text_heads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}, must be at least 1")


def convert(options: Options) -> None:
    """Read one kind, write the other.

    Raises:
        InputError: if either cannot be done; nothing is left behind then.
    """
    out, source = options.out, options.source
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and not empty; choose another --out")
    if not source.exists():
        raise InputError(f"there is no file or folder {source}; check the path")
    own = source.is_dir() and (
        any((source / name).exists() for name in ("checkpoints", "state.json"))
        or source.name == "checkpoints"
    )
    if own:
        _write_released(options)
    else:
        _write_run(options)


def _write_run(options: Options) -> None:
    if options.kind is not None:
        raise InputError(
            f"--kind {options.kind} is for runs of ours; a released model says itself what it is"
        )
    heads = Heads(options.image_heads, options.text_heads)
    released = read_released(options.source, heads=heads, length=options.length or 32)
    recipe = _recipe(released, options)
    write_converted(options.out, recipe, released.state, step=released.step)
    count = sum(tensor.numel() for tensor in released.state.values())
    sys.stdout.write(
        f"{options.out}: {type(released.model.image).__name__} for images of "
        f"{'x'.join(map(str, released.model.image.height_width))} pixels and "
        f"{type(released.model.text).__name__} for captions of {released.model.text.length} "
        f"tokens, meeting in {released.model.embed_dim} dimensions; {count:,} parameters\n"
    )


def _recipe(released: Released, options: Options) -> Recipe:
    """What a released model was trained by, and how its images and captions are read."""
    image = released.model.image
    projector = isinstance(image, ImageTower) and image.projector_width is not None
    if options.tokenizer is not None:
        name = options.tokenizer
    elif (options.source / "tokenizer_config.json").is_file():
        name = str(options.source)
    else:
        name = "google-bert/bert-base-uncased"
    crop = CenterCrop(share=224 / 256, interpolation="bilinear")
    return Recipe(
        model=released.model,
        data=PairData(
            train=(),
            tokenizer=HuggingFace(name=name),
            augmentation=RandomResizedCrop(scale=(0.5, 1.0), flip=0.0, interpolation="bilinear"),
        ),
        reduction=Reductions(image=KeepAll(), text=Truncate()),
        objective=LockedContrastive(train_image="head" if projector else "none"),
        optimizer=published_optimizer(),
        schedule=published_schedule(_UPDATES, _BATCH),
        batch_size=_BATCH,
        evaluation=(ZeroShot(templates="imagenet_7", crop=crop), Retrieval(crop=crop)),
    )


def _write_released(options: Options) -> None:
    given = (options.tokenizer, options.length, options.image_heads, options.text_heads)
    if any(value is not None for value in given):
        raise InputError(
            "a run directory says itself what it is; leave out --tokenizer, --length, "
            "--image-heads and --text-heads"
        )
    checkpoint = find_checkpoint(options.source)
    recipe = load_recipe(checkpoint.run_dir / "recipe.json")
    if recipe.model.inputs().captions is None:
        raise InputError(f"{options.source} trained no text tower; give a run of two towers")
    kind = kind_of(recipe.model, options.kind)
    model = model_of(PretrainedDualEncoderConfig, recipe.model)
    weights = {n.removeprefix("model."): t for n, t in load_weights(checkpoint).items()}
    state = to_released(weights, model, kind=kind)
    aside = options.out.with_name(f".{options.out.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        settings = json.dumps(released_settings(model, kind=kind), indent=2)
        (aside / "config.json").write_text(settings + "\n")
        torch.save(state, aside / "pytorch_model.bin")
        if options.out.exists():
            options.out.rmdir()
        aside.rename(options.out)
    except OSError as error:
        raise InputError(f"{options.out} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sys.stdout.write(f"{options.out}: a {kind} tower beside BERT, {len(state)} tensors\n")


def main() -> None:
    """The body of ``python -m frugal.cit.convert``."""
    run_politely(
        lambda: convert(read_options(Options, "python -m frugal.cit.convert")),
        alone=True,
    )


if __name__ == "__main__":
    main()
