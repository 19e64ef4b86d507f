"""What a path holds: a run of ours or a model of another library, ready to be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from frugal.common.data.tokenizers import SavedTokenizer
from frugal.common.errors import InputError
from frugal.common.evaluation.cli import has_text
from frugal.common.evaluation.config import LinearProbe
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import Recipe
from frugal.common.run import Run

if TYPE_CHECKING:
    from torch import nn

    from frugal.common.checkpoint.store import Checkpoint
    from frugal.common.contracts import EvaluationTask
    from frugal.common.weights.trained import TrainedModel, TrainedRun, TrainedTower


@dataclass(frozen=True)
class Trained:
    """A trained model and what is known of it."""

    recipe: Recipe
    run: Run
    model: nn.Module
    step: int | None
    """None for a model of another library."""
    objective: Any = None
    """What trained the model, and holds it; None for a model of another library."""
    library: str = "frugal"
    """Which wrote it."""


def load_trained(path: Path, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> Trained:
    """The model of a run, with the moving average of its weights where the run kept one.

    Args:
        path: a run directory, or one of its checkpoints.
        device: where the model goes.

    Raises:
        InputError: if there is no whole checkpoint.
    """
    checkpoint, recipe = _find(path)
    return _load(checkpoint, replace(recipe, engine=replace(recipe.engine, device=device)))


def _find(path: Path) -> tuple[Checkpoint, Recipe]:
    """A checkpoint and the recipe of its run, with the folder where that lies now."""
    from frugal.common.checkpoint.store import find_checkpoint, recipe_of_run

    checkpoint = find_checkpoint(path)
    folder = checkpoint.folder.parent.parent
    recipe = recipe_of_run(folder)
    assert recipe is not None  # it has a checkpoint
    return checkpoint, replace(recipe, run=replace(recipe.run, dir=folder))


def _load(checkpoint: Checkpoint, recipe: Recipe) -> Trained:
    from frugal.common.checkpoint.warm_start import trained_objective
    from frugal.common.train import open_run

    run = open_run(recipe)
    objective = trained_objective(recipe, checkpoint.folder, log=run.log)
    data: Any = recipe.data
    if getattr(data, "tokenizer", None) is not None and (run.dir / "tokenizer").is_dir():
        # what the recipe names may lie on another machine, or on the hub
        saved = SavedTokenizer(folder=run.dir / "tokenizer")
        recipe = replace(recipe, data=replace(data, tokenizer=saved))
    objective = objective.to(run.device)
    return Trained(recipe, run, objective.model, checkpoint.step, objective)


def load_exportable(path: Path) -> TrainedRun:
    """The model of a run directory or checkpoint with everything that is needed to use it.

    Raises:
        InputError: if there is no whole checkpoint, or its model has no image tower.
    """
    checkpoint, recipe = _find(path)
    if isinstance(recipe.model, DualEncoderConfig):
        return _load_two_towers(path, checkpoint)
    if not isinstance(getattr(recipe.model, "image", None), ImageTower):
        raise InputError(
            f"{path} holds a model without an image tower of this library; only models with one "
            "can be exported"
        )
    return _load_tower(path, checkpoint, recipe)


def _load_two_towers(path: Path, checkpoint: Checkpoint) -> TrainedModel:
    from frugal.common.models.clip import DualEncoder
    from frugal.common.weights.model_card import measured
    from frugal.common.weights.trained import TrainedModel

    trained = load_trained(path, device="cpu")
    folder = trained.run.dir
    assert isinstance(trained.model, DualEncoder)
    return TrainedModel(
        model=trained.model,
        recipe=trained.recipe,
        checkpoint=checkpoint,
        folder=folder,
        numbers=measured(folder, step=checkpoint.step),
    )


def _load_tower(path: Path, checkpoint: Checkpoint, recipe: Recipe) -> TrainedTower:
    """An image tower; its teacher or decoder, if it has any, need not be there."""
    from frugal.common.checkpoint.warm_start import load_weights
    from frugal.common.weights.model_card import measured
    from frugal.common.weights.trained import TrainedTower, affine

    folder = checkpoint.folder.parent.parent
    weights = {n.removeprefix("model."): t for n, t in load_weights(checkpoint).items()}
    state = {n.removeprefix("image."): t for n, t in weights.items() if n.startswith("image.")}
    for leaf in ("weight", "bias"):  # a classifier has the norm of what it pools beside the tower
        if (name := f"fc_norm.{leaf}") in weights:
            state[f"norm.{leaf}"] = weights[name]
    head = scores = None
    if any(name.startswith("head.") for name in weights):
        model: Any = load_trained(path, device="cpu").model
        head, scores = affine(model.head, recipe.model.image.width), model
    return TrainedTower(
        recipe=recipe,
        checkpoint=checkpoint,
        folder=folder,
        numbers=measured(folder, step=checkpoint.step),
        tower=replace(recipe.model.image, drop_path=0.0),
        state=state,
        head=head,
        scores=scores,
    )


def _load_encoder(checkpoint: Checkpoint, recipe: Recipe) -> Trained:
    """The image tower alone: its teacher, if it has one, need not be there."""
    from frugal.common.evaluation.embed import EncoderAlone
    from frugal.common.train import open_run

    run, trained = open_run(recipe), _load_tower(checkpoint.folder, checkpoint, recipe)
    model = EncoderAlone(trained.build()).to(run.device)
    return Trained(recipe, run, model, checkpoint.step)


@dataclass(frozen=True)
class Found:
    """What a path holds, before the tasks are known to fit it."""

    recipe: Recipe
    load: Callable[[Recipe], Trained]
    pretrained: str
    """Which checkpoint of the path, or which name its weights go by."""
    load_encoder: Callable[[Recipe], Trained] | None = None
    """Of a run without a text tower: its image tower alone."""

    def loads(
        self, tasks: list[EvaluationTask]
    ) -> dict[Callable[[Recipe], Trained], list[EvaluationTask]]:
        """What is measured on what."""
        found: dict[Callable[[Recipe], Trained], list[EvaluationTask]] = {}
        for task in tasks:
            alone = self.load_encoder if isinstance(task, LinearProbe) else None
            found.setdefault(alone or self.load, []).append(task)
        return found


def look(path: Path, name: str | None, key: str | None = None) -> Found:
    """The model of a path, of which no weight of ours is read yet.

    Args:
        path: a run, a checkpoint, or a file or folder of another library.
        name: of a file of weights: its model, as ``--model`` gives it.
        key: which of several sets of weights in a file, as ``--weights-key`` gives it.

    Raises:
        InputError: if there is none, or the name does not belong to it.
    """
    from frugal.common.weights.foreign_models import is_foreign, load_foreign
    from frugal.common.weights.imported import tower_library

    if is_foreign(path) and (library := tower_library(path, name)):
        return _look_at_tower(path, name, key, library)
    if is_foreign(path):
        foreign = load_foreign(path, name=name, key=key)

        def load(recipe: Recipe) -> Trained:
            from frugal.common.train import open_run

            run = open_run(recipe)
            run.log.info("%s: %s", path, foreign.described)
            model = foreign.model.to(run.device)
            return Trained(recipe, run, model, None, library=foreign.library)

        return Found(foreign.recipe(_beside(path)), load, name or foreign.library)
    for flag, value in (("--model", name), ("--weights-key", key)):
        if value is not None:
            raise InputError(
                f"{flag} {value} is for a file of weights of another library, but {path} is none; "
                "leave it out"
            )
    checkpoint, recipe = _find(path)
    return Found(
        recipe,
        lambda asked: _load(checkpoint, asked),
        checkpoint.folder.name,
        None if has_text(recipe) else lambda asked: _load_encoder(checkpoint, asked),
    )


def _look_at_tower(path: Path, name: str | None, key: str | None, library: str) -> Found:
    """An image tower of timm or transformers."""
    from frugal.common.weights.imported import read

    imported = read(path, name=name, key=key)
    recipe = replace(imported.recipe, run=replace(imported.recipe.run, dir=_beside(path)))

    def load(recipe: Recipe) -> Trained:
        from frugal.common.evaluation.embed import EncoderAlone
        from frugal.common.models.vit import ImageTransformer
        from frugal.common.train import open_run
        from frugal.common.weights.stored_files import without_prefix

        run = open_run(recipe)
        run.log.info("%s: %s", path, imported.described)
        tower = ImageTransformer(recipe.model.image)
        tower.load_state_dict(without_prefix(imported.state, "image."))
        model = EncoderAlone(tower).to(run.device).eval()
        return Trained(recipe, run, model, None, library=library)

    return Found(recipe, load, name or library)


def _beside(path: Path) -> Path:
    """Where evaluations of a path go; a file has no folder of its own: one of its name."""
    return path if path.is_dir() else path.with_suffix("")
