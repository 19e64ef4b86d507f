"""The page that tells people what an exported model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import to_json
from frugal.common.weights.trained import TrainedRun


def model_card(trained: TrainedRun, *, library: str, usage: str) -> str:
    """Markdown with the front matter of the Hugging Face hub."""
    recipe = trained.recipe
    samples = trained.checkpoint.step * recipe.batch_size
    average = recipe.engine.ema_decay
    training = {
        "samples": f"{samples:,} in steps of {recipe.batch_size:,}" if samples else "not known",
        "data": ", ".join(getattr(recipe.data, "train", ())) or "not stated",
        "image tokens": _words(recipe.reduction.image),
        "text tokens": _words(recipe.reduction.text),
        "objective": _words(recipe.objective),
        "optimizer": _words(recipe.optimizer),
        "schedule": _words(recipe.schedule),
        "weights": "of the last step" if average is None else f"moving average, decay {average}",
    }
    if recipe.reduction.text is None:
        del training["text tokens"]
    front, what = _kind(trained)
    parts = [
        f"---\nlibrary_name: {library}\n{front}\n- frugal\n---",
        f"# {trained.folder.resolve().name}",
        what,
        "## Use",
        usage.rstrip(),
        "## Model",
        _table(_model(trained)),
        "## Training",
        _table(training),
        "`recipe.json` holds every setting.",
        "## Evaluation",
        *(_numbers(task, numbers) for task, numbers in sorted(trained.numbers.items())),
    ]
    if not trained.numbers:
        parts.append("Not measured in this run.")
    usual = None if library == "frugal" else trained.crop_in(library)
    if usual is not None and trained.crop != usual:
        parts.append(
            f"This model is measured on images prepared by `{_words(trained.crop)}`. "
            "The preprocessing in this folder comes as near as "
            f"{library} has it, `{_words(usual)}`."
        )
    return "\n\n".join(parts) + "\n"


def _kind(trained: TrainedRun) -> tuple[str, str]:
    """Task and tags for the front matter, and a sentence."""
    if trained.reads_captions:
        return (
            "pipeline_tag: zero-shot-image-classification\ntags:\n- clip",
            "A dual encoder of images and captions, trained with Frugal.",
        )
    classes = getattr(trained.recipe.model, "num_classes", None)
    task = "image-feature-extraction" if classes is None else "image-classification"
    return (
        f"pipeline_tag: {task}\ntags:\n- vit",
        "An image encoder, trained with Frugal."
        if classes is None
        else f"An image encoder with a head for {classes:,} classes, trained with Frugal.",
    )


def _model(trained: TrainedRun) -> dict[str, str]:
    """The shape of the towers."""
    config: Any = trained.recipe.model
    if not hasattr(config, "image"):
        return {"kind": type(config).__name__}
    height, width = config.image.height_width
    own = isinstance(config.image, ImageTower)
    patches = f" in patches of {config.image.patch_size}" if own else ""
    rows = {
        "images": f"{height}x{width} pixels{patches}",
        "image tower": _shape(config.image),
    }
    if trained.reads_captions:
        rows |= {
            "captions": f"{config.text.length} tokens of {config.text.vocabulary:,}",
            "text tower": _shape(config.text),
            "shared space": f"{config.embed_dim} dimensions",
        }
    return rows


def _shape(tower: Any) -> str:
    if not isinstance(tower, (ImageTower, TextTower)):
        return f"{tower.name} ({_words(tower)})"
    return f"{tower.depth} blocks of width {tower.width}, {tower.heads} heads"


def _words(part: Any) -> str:
    """A part of a recipe with its settings."""
    settings = to_json(part)
    if not isinstance(settings, dict):
        return str(settings)
    name = settings.pop("type").rpartition(".")[2]
    settings.pop("facts", None)  # all that a model of another library is made of
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    )


def _numbers(task: str, numbers: dict[str, Any]) -> str:
    shown = {
        name: f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        for name, value in numbers.items()
        if name not in ("step", "samples") and isinstance(value, (int, float))
    }
    return _table({f"**{task}**": "", **shown})


def measured(folder: Path, *, step: int) -> dict[str, dict[str, Any]]:
    """What a run measured with the weights of a step, by task."""
    found = {}
    for file in sorted((folder / "evaluation").glob("*.json")):
        try:
            numbers = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(numbers, dict) and numbers.get("step") == step:
            found[file.stem] = numbers
    return found
