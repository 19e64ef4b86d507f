"""What measures an image tower by training on top of it: programs that installed packages bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal.common.errors import InputError

if TYPE_CHECKING:
    from frugal.common.recipe import Recipe

GROUP = "frugal.measuring"
"""Of the entry points that name a :class:`Program` for the word that asks for it."""


@dataclass(frozen=True)
class Program:
    """Training on a trained image tower, whose result says how good the tower is."""

    recipes: Mapping[str, Callable[[], Recipe]]
    """By name."""
    parts: Callable[[Path], tuple[Path, Path]]
    """From a folder of data to what is trained on and what is measured on."""
    task: str
    """Name of the evaluation in its recipes."""


def installed() -> dict[str, EntryPoint]:
    """The programs there are, none of them imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}


def train_and_test(data: Path) -> tuple[Path, Path]:
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


def check(word: str, options: Any) -> None:
    """Refuse what a program cannot start with, before anything else is measured.

    Raises:
        InputError: if a recipe or data is not named, or not there.
    """
    program: Program = installed()[word].load()
    if options.recipe is None:
        raise InputError(
            f"{word} trains on top of {options.checkpoint}: say how with --recipe, one of "
            f"{', '.join(program.recipes)}"
        )
    if options.data is None:
        raise InputError(f"{word} needs --data: a folder to train and to measure on")
    program.parts(options.data)
