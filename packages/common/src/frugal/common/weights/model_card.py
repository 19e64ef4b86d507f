"""The page that tells people what an exported model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal.common.data.transforms import CenterCrop
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import ModelConfig
from frugal.common.weights.encoder_config import ImportedEncoder
from frugal.common.weights.runs import part_in_words


def model_card(
    bundle: ModelBundle, *, name: str, library: str, usage: str, transform: CenterCrop
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        bundle: the model that was written.
        name: of the folder.
        library: that it is written for, as its users call it.
        usage: how to load it, in Markdown.
        transform: how that library prepares an image for it.
    """
    source, training = bundle.source, dict(bundle.source.training)
    front, what = _kind(bundle)
    parts = [
        f"---\nlibrary_name: {library}\n{front}\n- frugal\n---",
        f"# {name}",
        what,
        "## Use",
        usage.rstrip(),
        "## Model",
        _table(_model(bundle)),
        "## Training",
        _table(training) if training else f"Trained elsewhere; read from {source.library}.",
        *(["`recipe.json` holds every setting."] if training else []),
        "## Evaluation",
        *(_numbers(task, numbers) for task, numbers in sorted(source.numbers.items())),
    ]
    if not source.numbers:
        parts.append("Not measured in this run.")
    crop = bundle.transform
    if crop != transform:
        parts.append(
            f"This model is measured on images prepared by `{part_in_words(crop)}`. "
            "The preprocessing in this folder comes as near as "
            f"{library} has it, `{part_in_words(transform)}`."
        )
    return "\n\n".join(parts) + "\n"


def _kind(bundle: ModelBundle) -> tuple[str, str]:
    """Task and tags for the front matter, and a sentence."""
    if bundle.text is not None:
        return (
            "pipeline_tag: zero-shot-image-classification\ntags:\n- clip",
            "A dual encoder of images and captions, trained with Frugal.",
        )
    classes = _num_classes(bundle)
    task = "image-feature-extraction" if classes is None else "image-classification"
    return (
        f"pipeline_tag: {task}\ntags:\n- vit",
        "An image encoder, trained with Frugal."
        if classes is None
        else f"An image encoder with a head for {classes:,} classes, trained with Frugal.",
    )


def _num_classes(bundle: ModelBundle) -> int | None:
    """Numbers that a head on the image tower puts out; None without one."""
    config = bundle.config
    if isinstance(config, ImportedEncoder):
        return config.num_classes
    return config.inputs().num_classes if isinstance(config, ModelConfig) else None


def _model(bundle: ModelBundle) -> dict[str, str]:
    """The shape of the towers."""
    config, image = bundle.config, bundle.image
    height, width = image.height_width
    patches = f" in patches of {image.patch_size}" if isinstance(image, ImageTower) else ""
    rows = {
        "images": f"{height}x{width} pixels{patches}",
        "image tower": _shape(image),
    }
    if bundle.text is not None and isinstance(config, DualEncoderConfig):
        rows |= {
            "captions": f"{config.text.length} tokens of {config.text.vocabulary:,}",
            "text tower": _shape(config.text),
            "shared space": f"{config.embed_dim} dimensions",
        }
    return rows


def _shape(tower: Any) -> str:
    if not isinstance(tower, (ImageTower, TextTower)):
        return f"{tower.name} ({part_in_words(tower)})"
    return f"{tower.depth} blocks of width {tower.width}, {tower.heads} heads"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    )


def _numbers(task: str, numbers: Mapping[str, Any]) -> str:
    shown = {
        name: f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        for name, value in numbers.items()
        if name not in ("step", "samples") and isinstance(value, (int, float))
    }
    return _table({f"**{task}**": "", **shown})
