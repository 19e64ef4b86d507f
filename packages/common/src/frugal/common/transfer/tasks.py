"""Transfer tasks: how good an image tower is, told by what is trained on top of it.

``python -m frugal.common.evaluate --tasks milan-finetune --transfer.recipe vit-b16 ...`` runs one.
Which there are, installed packages say by entry points of the group ``frugal.transfer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from frugal.common.data.config import ImageData
from frugal.common.errors import InputError
from frugal.common.evaluation.task import FolderEvaluation
from frugal.common.recipe import Recipe
from frugal.common.transfer.segmentation_data import SegmentationData


@dataclass(frozen=True)
class TransferTask:
    """Named recipes that train on top of an image tower, and what tells how good that became."""

    recipes: dict[str, Callable[[], Recipe]]
    """By name."""
    evaluation: str
    """Name of the first evaluation of these recipes."""
    split: Callable[[Path], tuple[Path, Path]]
    """From a folder of data to what is trained on and what is measured on."""

    def on(self, recipe: Recipe, checkpoint: Path, data: Path, run_dir: Path) -> Recipe:
        """A recipe that starts from a model, and is trained and measured on the parts of a folder.

        Args:
            recipe: one of these, or one that a run of them saved.
            checkpoint: anything that ``--run.start-from`` takes.
            data: what ``split`` takes.
            run_dir: of the training.

        Raises:
            InputError: if a part of the data is missing, or the recipe is one of another kind.
        """
        train_on, measure_on = self.split(data)
        stream, measured = recipe.data, recipe.evaluation[0] if recipe.evaluation else None
        if not isinstance(stream, ImageData | SegmentationData) or not isinstance(
            measured, FolderEvaluation
        ):
            raise InputError(
                "the recipe trains nothing on top of an image tower; choose from "
                f"{', '.join(self.recipes)}"
            )
        return replace(
            recipe,
            data=replace(stream, train=(str(train_on),)),
            evaluation=(replace(measured, data=measure_on), *recipe.evaluation[1:]),
            run=replace(recipe.run, start_from=checkpoint, dir=run_dir),
        )


def class_folder_split(data: Path) -> tuple[Path, Path]:
    """Of images with classes: train/ and test/ or val/, or those of a scenes folder.

    Raises:
        InputError: if a part is missing.
    """
    inside = data / "zero_shot" if (data / "zero_shot").is_dir() else data
    tests = [inside / name for name in ("test", "val") if (inside / name).is_dir()]
    if not (inside / "train").is_dir() or not tests:
        raise InputError(
            f"{inside} has no {'test/ or val/' if (inside / 'train').is_dir() else 'train/'}; give "
            "a folder with images to train on in train/ and images to measure on in test/ or val/"
        )
    return inside / "train", data if inside is not data else tests[0]


def masked_split(data: Path) -> tuple[Path, Path]:
    """Of pictures with masks: the folder itself, which holds both parts."""
    return data, data
