"""Published pretraining checkpoints for training here, and runs of ours as such files.

``python -m frugal.milan.convert checkpoint-399.pth --out runs/b16`` writes a run directory, which
fine-tuning, probing and ``--run.start-from`` take. With the optimizer's state in the file and
``--data`` the run can be continued: the command at the end of the output does it. The other way,
``python -m frugal.milan.convert runs/b16 --out checkpoint-399.pth`` writes the file, and the model
alone as safetensors beside it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import save_file

from frugal.common.checkpoint.store import CheckpointStore, find_checkpoint, save_weights
from frugal.common.cli import read_options, run_politely
from frugal.common.errors import InputError
from frugal.common.models.finite import refuse_not_finite
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, model_of
from frugal.common.recipe_json import from_json, load_recipe, to_json
from frugal.common.run import Run, make_logger
from frugal.common.weights.files import read_content, state_in
from frugal.milan.model import MaskedModel
from frugal.milan.objective import ReconstructPixels
from frugal.milan.published_weights import (
    Published,
    from_published,
    from_published_moments,
    to_published,
    to_published_moments,
)
from frugal.milan.recipes import RECIPES, WARMUP_EPOCHS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert between published files and run directories."""

    source: Annotated[Path, tyro.conf.Positional]
    """A published file, or a run directory or checkpoint of ours."""
    out: Path
    """The run directory, or the file, to write; nothing may be there."""
    recipe: str | None = None
    """The recipe that a file was trained by; by default the one that has such a model."""
    data: tuple[str, ...] = ()
    """What the run is to go on with, as --data.train takes it."""
    heads: int | None = None
    """Attention heads of an encoder of an unusual width."""
    decoder_heads: int | None = None
    """Attention heads of a decoder of an unusual width."""


def convert(options: Options) -> None:
    """Read one kind, write the other.

    Raises:
        InputError: if either cannot be done; nothing is left behind then.
    """
    if options.out.exists():
        raise InputError(f"{options.out} is there already; choose another --out")
    if not options.source.exists():
        raise InputError(f"there is no file or folder {options.source}; check the path")
    if options.source.is_dir():
        if (options.recipe, options.data, options.heads, options.decoder_heads) != (
            None, (), None, None,
        ):  # fmt: skip
            raise InputError(
                "a run directory says itself what it is; leave out --recipe, --data, --heads and "
                "--decoder-heads"
            )
        _write_file(options.source, options.out)
    else:
        _write_run(options)


# ------------------------------------------------------------------------------------------------
# From a published file


def _write_run(options: Options) -> None:
    source = str(options.source)
    content = read_content(options.source)
    state = state_in(content, source=source)
    details = content if isinstance(content, Mapping) else {}
    ours = _what_we_wrote(details, source=source)
    heads, decoder_heads = options.heads, options.decoder_heads
    if ours is not None:
        model = model_of(MaskedModel, ours.recipe.model)
        heads, decoder_heads = heads or model.image.heads, decoder_heads or model.decoder.heads
    published = from_published(state, source=source, heads=heads, decoder_heads=decoder_heads)
    if ours is not None and options.recipe is None and ours.recipe.model == published.model:
        recipe, step = replace(ours.recipe, data=_data(ours.recipe, options)), ours.step
    else:
        recipe = _recipe_of(published, options)
        step = _steps(recipe, int(details["epoch"]) + 1 if "epoch" in details else 0)
    tensors = {f"weight/model.{name}": tensor for name, tensor in published.state.items()}
    optimizer = details.get("optimizer")
    updates = None
    if optimizer:
        moments, updates = from_published_moments(optimizer, state, source=source)
        for kind, part in moments.items():
            tensors |= {f"{kind}/model.{name}": tensor for name, tensor in part.items()}
    try:
        _save(
            options.out, recipe, tensors, step=step, updates=updates, scaler=details.get("scaler")
        )
    except BaseException:
        shutil.rmtree(options.out, ignore_errors=True)
        raise
    _tell(options.out, published.model, published.outputs, step)
    if heads is None or decoder_heads is None:
        sys.stdout.write(
            "the file does not say how many heads: these are the usual ones of its widths; give "
            "others as --heads and --decoder-heads\n"
        )
    if updates is not None and options.data:
        sys.stdout.write(
            f"go on with: python -m frugal.milan.pretrain {options.out}/recipe.json --run.dir "
            f"{options.out}\n"
        )


def _recipe_of(published: Published, options: Options) -> Recipe:
    """The recipe of a model, with that model in it.

    Raises:
        InputError: if the recipe that was asked for has another model.
    """
    name = options.recipe or _fitting(published)
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}; choose from {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    if options.recipe is not None and recipe.model != published.model:
        raise InputError(
            f"{options.source} is not of the model of the recipe {name}; leave out --recipe"
        )
    return replace(recipe, model=published.model, data=_data(recipe, options))


def _data(recipe: Recipe, options: Options) -> Any:
    return replace(recipe.data, train=options.data)  # type: ignore[type-var]


_OURS = "frugal"
"""Under this name a file that is written here says what published files leave to their readers."""


@dataclass(frozen=True)
class _Ours:
    recipe: Recipe
    step: int


def _what_we_wrote(content: Mapping[str, Any], *, source: str) -> _Ours | None:
    """The recipe and the step of a file that was written here; None of any other."""
    told = content.get(_OURS)
    if not isinstance(told, Mapping):
        return None
    step = told.get("step")
    if not isinstance(step, int) or step < 0 or not isinstance(told.get("recipe"), Mapping):
        raise InputError(f"what {source} says of its own recipe and step is damaged; write it anew")
    recipe = from_json(dict(told["recipe"]), source=source)
    if not isinstance(recipe, Recipe) or not isinstance(recipe.model, MaskedModel):
        raise InputError(f"the recipe that {source} says it is of pretrains nothing; write it anew")
    return _Ours(recipe, step)


def _fitting(published: Published) -> str:
    """The first recipe that has this model and reconstructs numbers as many, or B/16's.

    A patch of 16 has as many pixels as a teacher of ViT-B without projection has features; the
    plain decoder is MAE's then, and the prompting one MILAN's.
    """
    model = published.model
    pixels = published.outputs == 3 * model.image.patch_size**2 and model.decoder.kind == "plain"
    for name, make in RECIPES.items():
        recipe = make()
        wants_pixels = isinstance(recipe.objective, ReconstructPixels)
        if recipe.model == published.model and wants_pixels == pixels:
            return name
    return "mae-b16-1600ep" if pixels else "vit-b16"


def _steps(recipe: Recipe, epochs: int) -> int:
    """Steps of ours that have seen as many samples as so many published epochs."""
    return min(epochs * _epoch(recipe) // recipe.batch_size, recipe.steps)


def _epoch(recipe: Recipe) -> int:
    """Samples of a published epoch."""
    assert isinstance(recipe.schedule, WarmupCosine)  # every published recipe's is
    return max(recipe.schedule.warmup_samples // WARMUP_EPOCHS, 1)


def _save(
    folder: Path,
    recipe: Recipe,
    tensors: dict[str, Any],
    *,
    step: int,
    updates: int | None,
    scaler: Mapping[str, Any] | None,
) -> None:
    """A run directory: with AdamW's moments one that can go on, without them weights alone."""
    recipe = replace(recipe, run=replace(recipe.run, dir=folder))
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe), indent=2))
    if updates is None:
        weights = {name.removeprefix("weight/"): tensor for name, tensor in tensors.items()}
        save_weights(folder / "checkpoints", weights, step=step)
        return
    loss_scale = {}
    if scaler:
        loss_scale = {"scale": scaler["scale"], "quiet_steps": scaler["_growth_tracker"]}
    state = {
        "step": step,
        "samples": step * recipe.batch_size,
        "updates": updates,
        "loss_scale": loss_scale,
        "engine": "the published code",
        "world_size": 1,
        "recipe": to_json(recipe),
    }
    run = Run(folder, 0, 1, 0, torch.device("cpu"), make_logger(0))
    CheckpointStore(run, keep=1).save(tensors, state)


def _tell(out: Path, model: MaskedModel, outputs: int, step: int) -> None:
    image, decoder = model.image, model.decoder
    sys.stdout.write(
        f"{out}: encoder {image.width} wide, {image.depth} blocks of {image.heads} heads, patches "
        f"of {image.patch_size}, {image.height_width[0]}x{image.height_width[1]} pixels; "
        f"{decoder.kind} decoder {decoder.width} wide, {decoder.depth} blocks of {decoder.heads} "
        f"heads, predicts {outputs} numbers; step {step:,}\n"
    )


# ------------------------------------------------------------------------------------------------
# To a published file


def _write_file(source: Path, out: Path) -> None:
    checkpoint = find_checkpoint(source)
    recipe = load_recipe(checkpoint.run_dir / "recipe.json")
    if not isinstance(recipe.model, MaskedModel):
        raise InputError(f"{source} is no pretraining run; only such a run has a file of this kind")
    read, names = checkpoint.reader(), sorted(checkpoint.names())
    parts: dict[str, dict[str, Any]] = {}
    for name in names:
        kind, _, rest = name.partition("/")
        parts.setdefault(kind, {})[rest.removeprefix("model.")] = read(name)
    refuse_not_finite(parts["weight"], source=str(source))
    model = to_published(parts["weight"], recipe.model)
    samples = checkpoint.step * recipe.batch_size
    content: dict[str, Any] = {"model": model, "epoch": max(samples // _epoch(recipe) - 1, 0)}
    content[_OURS] = {"recipe": to_json(recipe), "step": checkpoint.step}
    # a subclass, as Muon, keeps them of some parameters alone
    if {"exp_avg", "exp_avg_sq"} <= parts.keys() and type(recipe.optimizer) is AdamW:
        optimizer = recipe.optimizer
        settings = {
            "lr": recipe.schedule.learning_rate(samples, peak=optimizer.peak(recipe.batch_size)),
            "betas": optimizer.betas,
            "eps": optimizer.epsilon,
            "weight_decay": optimizer.weight_decay,
            "amsgrad": False,
        }
        moments = {kind: parts[kind] for kind in ("exp_avg", "exp_avg_sq")}
        content["optimizer"] = to_published_moments(
            moments, recipe.model, updates=checkpoint.state["updates"], settings=settings
        )
    else:
        sys.stdout.write(
            f"{out} holds weights alone: such a file has moments of AdamW for every parameter, "
            f"which {source} does not hold\n"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, out)
    save_file(model, out.with_suffix(".safetensors"))
    _tell(out, recipe.model, len(model["decoder_pred.weight"]), checkpoint.step)


def main() -> None:
    """The body of ``python -m frugal.milan.convert``."""
    run_politely(
        lambda: convert(read_options(Options, "python -m frugal.milan.convert")),
        alone=True,
    )


if __name__ == "__main__":
    main()
