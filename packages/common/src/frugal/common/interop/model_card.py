"""The page that tells people what an exported model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frugal.common.data.transforms import CenterCrop
from frugal.common.interop.trained import TrainedModel
from frugal.common.models.config import ImageTower, TextTower
from frugal.common.recipe import to_json


def model_card(trained: TrainedModel, *, library: str, usage: str) -> str:
    """Markdown with the front matter of the Hugging Face hub."""
    recipe, config = trained.recipe, trained.config
    height, width = config.image.height_width
    samples = trained.checkpoint.step * recipe.batch_size
    average = recipe.engine.ema_decay
    training = {
        "samples": f"{samples:,} in steps of {recipe.batch_size:,}" if samples else "not known",
        "data": ", ".join(getattr(recipe.data, "train", ())) or "not stated",
        "image tokens": _words(recipe.reduction.image),
        "text tokens": _words(recipe.reduction.text),
        "objective": _words(recipe.objective),
        "optimiser": _words(recipe.optimiser),
        "schedule": _words(recipe.schedule),
        "weights": "of the last step" if average is None else f"moving average, decay {average}",
    }
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: zero-shot-image-classification\n"
        "tags:\n- clip\n- frugal\n---",
        f"# {trained.folder.resolve().name}",
        "A dual encoder of images and captions, trained with Frugal.",
        "## Use",
        usage.rstrip(),
        "## Model",
        _table(
            {
                "images": f"{height}x{width} pixels in patches of {config.image.patch_size}",
                "image tower": _shape(config.image),
                "captions": f"{config.text.length} tokens of {config.text.vocabulary:,}",
                "text tower": _shape(config.text),
                "shared space": f"{config.embed_dim} dimensions",
            }
        ),
        "## Training",
        _table(training),
        "`recipe.json` holds every setting.",
        "## Evaluation",
        *(_numbers(task, numbers) for task, numbers in sorted(trained.numbers.items())),
    ]
    if not trained.numbers:
        parts.append("Not measured in this run.")
    usual = CenterCrop(interpolation=trained.interpolation)
    if trained.crop != usual and library != "frugal":
        parts.append(
            f"These numbers are of images prepared by `{_words(trained.crop)}`. The preprocessing "
            f"in this folder comes as near as {library} has it, `{_words(usual)}`."
        )
    return "\n\n".join(parts) + "\n"


def _shape(tower: ImageTower | TextTower) -> str:
    return f"{tower.depth} blocks of width {tower.width}, {tower.heads} heads"


def _words(part: Any) -> str:
    """A part of a recipe with its settings."""
    settings = to_json(part)
    if not isinstance(settings, dict):
        return str(settings)
    name = settings.pop("type").rpartition(".")[2]
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
