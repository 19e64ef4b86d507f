"""Run directories and their checkpoints as models: read and written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from frugal.common.checkpoint.store import (
    BEST,
    MODEL_FILE,
    Checkpoint,
    copy_weights,
    find_checkpoint,
    load_weights,
    recipe_of_run,
    run_directory,
    save_weights,
)
from frugal.common.contracts import Objective
from frugal.common.data.config import ImageData, PairData
from frugal.common.data.damage import PassedOver
from frugal.common.data.samples import IMAGE_EXTENSIONS
from frugal.common.data.stores.class_folders import kept_classes, read_class_folders
from frugal.common.data.tokenizers import ClipBpe, HuggingFace, SavedTokenizer, WordPiece
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, read_json_object, write_json
from frugal.common.models.bundle import ModelBundle, Source, TokenizerSource
from frugal.common.models.fit import misfit
from frugal.common.models.image_encoder import ImageEncoder, image_encoder
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import from_json, to_json
from frugal.common.weights.library import Library, Target, refuse_larger_than
from frugal.common.weights.written import two_towers


def knows(path: Path, name: str | None = None) -> bool:
    """A run directory or checkpoint of this library, whatever the name."""
    del name
    return (
        (path / "state.json").exists()
        or (path / "checkpoints").is_dir()
        or (path.name in ("checkpoints", BEST))
    )


def load(path: Path, name: str | None, key: str | None) -> ModelBundle:
    """The model of a run, which says all of it.

    Raises:
        InputError: see :func:`load_run`; or if a name or a key is given.
    """
    for flag, value in (("--model", name), ("--weights-key", key)):
        if value is not None:
            raise InputError(
                f"{flag} {value} is for a file of weights of another library, but {path} is none; "
                "leave it out"
            )
    return load_run(path)


def load_image_tower(path: Path) -> ImageEncoder:
    """The image tower of a run; the norm of what a classifier pools stays with its head.

    Raises:
        InputError: see :func:`load_run`; or if it has none.
    """
    bundle = load_run(path)
    if not isinstance(bundle.image, ImageTower):
        raise InputError(f"the run {path} trained no image tower; give another one")
    return image_encoder(bundle, with_pooled_norm=False)


def load_run(path: Path) -> ModelBundle:
    """The model of a run, with the moving average of its weights where the run kept one.

    Args:
        path: a run directory, or one of its checkpoints.

    Raises:
        InputError: if there is no whole checkpoint, or its weights are not of the run's model.
    """
    checkpoint = find_checkpoint(path)
    if _has_no_recipe(checkpoint):
        return _read_description(checkpoint, path)
    recipe = _recipe_in(checkpoint.run_dir)
    weights = load_weights(checkpoint)
    state = {n.removeprefix("model."): t for n, t in weights.items() if n.startswith("model.")}
    plain = replace(recipe, engine=replace(recipe.engine, compile=False))
    refuse_larger_than(weights, to_json(recipe.model), source=f"the recipe of {path}")
    model = recipe.objective.trained_model(plain, state)
    _fill(model, state, checkpoint)
    return _from_training(bundle_of(model.eval(), recipe), path, checkpoint, recipe, average=True)


def trained_objective(recipe: Recipe, checkpoint: Checkpoint) -> Objective:
    """What a recipe trains, with the weights of a checkpoint, on the CPU, to be measured.

    Raises:
        InputError: if the weights are not of that recipe's model, or what it needs besides, such as
            a teacher, is gone.
    """
    plain = replace(recipe, engine=replace(recipe.engine, compile=False))
    objective = recipe.objective.build(plain)
    # an export has none of what only helped to train
    own = objective.state_dict().items()
    kept = {name: tensor for name, tensor in own if name.startswith(objective.auxiliary)}
    _fill(objective, kept | load_weights(checkpoint), checkpoint)
    return objective.eval()


def describe_run(
    path: Path, checkpoint: Checkpoint, recipe: Recipe, *, average: bool
) -> ModelBundle:
    """The same without its weights, however large they are, and perhaps not their average."""
    bundle = bundle_of(nn.Module(), recipe)
    return _from_training(bundle, path, checkpoint, recipe, average=average)


def _from_training(
    bundle: ModelBundle, path: Path, checkpoint: Checkpoint, recipe: Recipe, *, average: bool
) -> ModelBundle:
    folder = checkpoint.run_dir
    source = Source(
        path=path,
        library="frugal",
        name=checkpoint.folder.name,
        step=checkpoint.step,
        samples=checkpoint.step * recipe.batch_size,
        training=_training(recipe, checkpoint.step, average=average),
        # what was measured is of the average
        numbers=measured(folder, step=checkpoint.step) if average else {},
    )
    return replace(bundle, source=source)


def open_checkpoint(path: Path) -> tuple[Checkpoint, Recipe]:
    """A checkpoint and the recipe of its run, with the folder where that lies now.

    Raises:
        InputError: if there is no whole checkpoint.
    """
    checkpoint = find_checkpoint(path)
    return checkpoint, _recipe_in(checkpoint.run_dir)


def _recipe_in(folder: Path) -> Recipe:
    """The recipe of a run that has a checkpoint, with the folder where it lies now."""
    recipe = recipe_of_run(folder)
    assert recipe is not None
    return _lying_in(folder, recipe)


def _lying_in(folder: Path, recipe: Recipe) -> Recipe:
    return replace(recipe, run=replace(recipe.run, dir=folder))


def recipe_if_any(path: Path) -> Recipe | None:
    """The recipe of a run or checkpoint; None of weights that were trained elsewhere.

    Raises:
        InputError: if there is no whole checkpoint, or its recipe cannot be read.
    """
    folder = run_directory(path)
    # without a checkpoint, which is read whole to be opened
    recipe = recipe_of_run(folder) if (folder / "recipe.json").exists() else None
    if recipe is not None:
        return _lying_in(folder, recipe)
    return None if _has_no_recipe(find_checkpoint(path)) else _recipe_in(folder)


def _has_no_recipe(checkpoint: Checkpoint) -> bool:
    """Whether weights were trained elsewhere, so that ``model.json`` alone describes them."""
    folder = checkpoint.run_dir
    has_recipe = (folder / "recipe.json").exists() or "recipe" in checkpoint.state
    return (folder / MODEL_FILE).is_file() and not has_recipe


def bundle_of(model: nn.Module, recipe: Recipe) -> ModelBundle:
    """The model that a recipe trains, as it is at this moment."""
    config, folder = recipe.model, recipe.run.dir or Path()
    text = config.text_tower()
    tokenizer = None if text is None else recipe.data.caption_tokenizer
    if tokenizer is not None and (folder / "tokenizer").is_dir():
        # what the recipe names may lie on another machine, or on the hub
        tokenizer = SavedTokenizer(folder=folder / "tokenizer")
    return ModelBundle(
        model=model,
        config=config,
        image=config.image,
        text=text,
        tokenizer_source=tokenizer,
        transform=crop_of(recipe),
        source=Source(path=folder, library="frugal", name=folder.name),
        text_reduction=recipe.reduction.text,
        class_names=_class_names(recipe, folder),
        precision=recipe.engine.precision,
        seed=recipe.run.seed,
    )


def crop_of(recipe: Recipe) -> CenterCrop:
    """Which part of an image the first evaluation of a recipe shows the model."""
    crops = (task.crop for task in recipe.evaluation)
    return next((crop for crop in crops if crop is not None), CenterCrop())


def _class_names(recipe: Recipe, folder: Path) -> tuple[str, ...] | None:
    """The class folders that a classifier was trained on; None where they cannot be known."""
    count = recipe.model.inputs().num_classes
    if count is None or not isinstance(recipe.data, ImageData):
        return None
    if (kept := kept_classes(folder)) is not None:
        return tuple(kept)
    trained_on = recipe.data.train
    if not trained_on or not Path(trained_on[0]).is_dir():
        return None
    if next(Path(trained_on[0]).glob("*.tar"), None):
        return None  # shards, whose classes are numbers
    # runs of earlier versions kept no names
    folders = read_class_folders(Path(trained_on[0]), IMAGE_EXTENSIONS, PassedOver())
    return (
        tuple(folders.names)
        if any(folders.images.values()) and len(folders.names) == count
        else None
    )


def _training(recipe: Recipe, step: int, *, average: bool) -> dict[str, str]:
    """How a run trained, in words."""
    samples = step * recipe.batch_size
    decay = recipe.engine.ema_decay if average else None
    training = {
        "samples": f"{samples:,} in steps of {recipe.batch_size:,}" if samples else "not known",
        "data": ", ".join(recipe.data.source_names) or "not stated",
        "image tokens": part_in_words(recipe.reduction.image),
        "text tokens": part_in_words(recipe.reduction.text),
        "objective": part_in_words(recipe.objective),
        "optimizer": part_in_words(recipe.optimizer),
        "schedule": part_in_words(recipe.schedule),
        "weights": "of the last step" if decay is None else f"moving average, decay {decay}",
    }
    if recipe.reduction.text is None:
        del training["text tokens"]
    return training


def measured(folder: Path, *, step: int) -> dict[str, dict[str, Any]]:
    """What a run measured with the weights of a step, by task."""
    tasks = {}
    for file in sorted((folder / "evaluation").glob("*.json")):
        try:
            numbers = parse_json(read_bytes(file))
        except (OSError, ValueError):
            continue
        if isinstance(numbers, dict) and numbers.get("step") == step:
            tasks[file.stem] = numbers
    return tasks


def part_in_words(part: Any) -> str:
    """A part of a recipe with its settings."""
    settings = to_json(part)
    if not isinstance(settings, dict):
        return str(settings)
    name = settings.pop("type").rpartition(".")[2]
    settings.pop("facts", None)  # all that a model of another library is made of
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


# ------------------------------------------------------------------------------------------------
# Writing


_USAGE = """\
    python -m frugal.common.evaluate --checkpoint FOLDER --data ...
    python -m frugal.common.export --checkpoint FOLDER --to open_clip --out ...

A recipe starts from these weights with `--run.start-from FOLDER`.
"""
_USAGE_OF_A_TOWER = """\
    python -m frugal.common.export --checkpoint FOLDER --to timm --out ...

A recipe starts from these weights with `--run.start-from FOLDER`.
"""


def refuse_taken(out: Path) -> None:
    """Nothing is ever overwritten.

    Raises:
        InputError: if there is a file, or a folder that holds something.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "is not empty" if out.is_dir() else "is a file"
        raise InputError(f"{out} {what}, and nothing is overwritten; choose another --out")


def target(bundle: ModelBundle, to: str = "frugal") -> Target:
    """How a model is written as a run directory with nothing but weights."""
    del to  # there is one
    if bundle.text is not None:
        two_towers(bundle)
    return as_run(bundle)


def as_run(bundle: ModelBundle) -> Target:
    """The same, if only to describe it, as of a bundle without weights."""
    return Target(
        usage=_USAGE if bundle.text is not None else _USAGE_OF_A_TOWER,
        write=lambda folder: write_run(bundle, folder),
        difference=lambda folder: difference(bundle, folder),
        transform=bundle.transform,
    )


def write_run(bundle: ModelBundle, folder: Path) -> None:
    """One checkpoint with the weights of a model, its tokenizer, numbers and description."""
    named = {f"model.{name}": tensor for name, tensor in bundle.model.state_dict().items()}
    save_weights(folder / "checkpoints", named, step=bundle.source.step or 0)
    tokenizer = _kept_tokenizer(bundle.tokenizer_source, folder / "tokenizer")
    write_description(replace(bundle, tokenizer_source=tokenizer), folder)
    for task, numbers in bundle.source.numbers.items():
        write_json(folder / "evaluation" / f"{task}.json", dict(numbers))


def difference(bundle: ModelBundle, folder: Path) -> float:
    """0 where a written folder has every weight bit for bit, else infinite."""
    written = load_weights(find_checkpoint(folder))
    state = bundle.model.state_dict()
    same = len(written) == len(state) and all(
        written[f"model.{name}"].equal(tensor) for name, tensor in state.items()
    )
    return 0.0 if same else float("inf")


def copy_run(checkpoint: Checkpoint, recipe: Recipe, folder: Path, *, average: bool) -> None:
    """The same of a checkpoint, however large: a few MiB of it are in memory at a time.

    Args:
        checkpoint: of the run.
        recipe: of the run; ``run.dir`` is where it lies.
        folder: is filled.
        average: take the moving average of a weight where there is one.

    Raises:
        InputError: if a number is not finite.
    """
    source = checkpoint.run_dir
    # parts beside the model helped to train it
    weights = checkpoint.weights(average=average)
    names = {name: stored for name, stored in weights.items() if name.startswith("model.")}
    copy_weights(checkpoint, folder / "checkpoints", names)
    if (source / "tokenizer").is_dir():
        shutil.copytree(source / "tokenizer", folder / "tokenizer")
    if average:
        shutil.copyfile(source / "recipe.json", folder / "recipe.json")
        for task in measured(source, step=checkpoint.step):
            (folder / "evaluation").mkdir(exist_ok=True)
            shutil.copyfile(
                source / "evaluation" / f"{task}.json", folder / "evaluation" / f"{task}.json"
            )
    else:  # what was measured is of the average
        recipe = replace(recipe, engine=replace(recipe.engine, ema_decay=None))
        write_json(folder / "recipe.json", to_json(recipe))
    written, stored = find_checkpoint(folder).tensor_bytes(), checkpoint.tensor_bytes()
    assert all(written[f"weight/{n}"].equals(stored[source]) for n, source in names.items())


def write_description(bundle: ModelBundle, folder: Path) -> None:
    """``model.json``: what of a model is no weight."""
    content = {
        "model": to_json(bundle.config),
        "tokenizer": to_json(bundle.tokenizer_source),
        "transform": to_json(bundle.transform),
        "library": bundle.source.library,
        "told_by": bundle.told_by,
        "class_names": bundle.class_names,
    }
    write_json(folder / MODEL_FILE, content)


def _read_description(checkpoint: Checkpoint, path: Path) -> ModelBundle:
    """The model of a folder that ``model.json`` describes and no recipe."""
    folder = checkpoint.run_dir
    about = read_json_object(folder / MODEL_FILE)
    source = str(folder / MODEL_FILE)
    try:
        config, transform = (
            from_json(about[name], source=source) for name in ("model", "transform")
        )
        tokenizer = from_json(about["tokenizer"], source=source)
        library = str(about["library"])
    except KeyError as error:
        raise InputError(f"{source} lacks {error.args[0]!r}; copy it again") from None
    if tokenizer is not None and (folder / "tokenizer").is_dir():
        tokenizer = SavedTokenizer(folder=folder / "tokenizer")
    state = {n.removeprefix("model."): t for n, t in load_weights(checkpoint).items()}
    refuse_larger_than(state, about["model"], source=source)
    model = config.build()
    _fill(model, state, checkpoint)
    names = about.get("class_names")
    return ModelBundle(
        model=model.eval(),
        config=config,
        image=config.image,
        text=config.text_tower(),
        tokenizer_source=tokenizer,
        transform=transform,
        source=Source(path=path, library=library, name=checkpoint.folder.name),
        class_names=None if names is None else tuple(names),
        precision="auto",
        told_by=str(about.get("told_by", "")),
    )


def _fill(model: nn.Module, state: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    if what := misfit(state, model.state_dict()):
        raise InputError(
            f"the weights of {checkpoint.folder} do not fit this recipe's model: "
            f"{what}; copy both again"
        )
    model.load_state_dict(state)


def copy_recipe(source: Path, folder: Path) -> None:
    """The settings of a run beside its weights in another library's layout, where there are any."""
    recipe = folder_of(source) / "recipe.json"
    if knows(source) and recipe.is_file():
        shutil.copyfile(recipe, folder / "recipe.json")


def folder_of(path: Path) -> Path:
    """The run directory of a checkpoint; any other path as it is."""
    return run_directory(path) if knows(path) else path


def _kept_tokenizer(source: TokenizerSource | None, folder: Path) -> TokenizerSource | None:
    """The same with a copy of its vocabulary, unless that is still to be fetched from the hub."""
    if isinstance(source, WordPiece) and source.vocab is not None:
        source.load().save(folder)
        return replace(source, vocab=folder / "vocab.txt")
    is_here = isinstance(source, HuggingFace) and Path(source.name).is_dir()
    if source is not None and (isinstance(source, (ClipBpe, SavedTokenizer)) or is_here):
        source.load().save(folder)
    return source


def write_converted(out: Path, recipe: Recipe, weights: Mapping[str, Tensor], *, step: int) -> None:
    """Weights of another library as a run of a recipe, with a copy of its vocabulary file.

    Args:
        out: new or empty; what was written of it is removed again if that fails.
        recipe: its run directory becomes ``out``.
        weights: of the model, under our names.
        step: how long they were trained.

    Raises:
        InputError: if the folder cannot be written.
    """
    folder = out.resolve()
    existed = folder.exists()
    data = recipe.data
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(data, PairData):
            kept: Any = _kept_tokenizer(data.tokenizer, folder / "tokenizer")
            data = replace(data, tokenizer=kept)
        # the objective's names: it holds the model as a part
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        save_weights(folder / "checkpoints", named, step=step)
        run = replace(recipe.run, dir=folder, interpolate=False)
        recipe = replace(recipe, data=data, run=run)
        write_json(folder / "recipe.json", to_json(recipe))
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{out} cannot be written ({error.strerror})") from None
        raise


LIBRARY = Library(
    name="frugal",
    knows=knows,
    load=load,
    image_tower=load_image_tower,
    targets=("frugal",),
    target=target,
)
