"""Every library that models come from and are written for."""

from __future__ import annotations

from pathlib import Path

from frugal.common.weights import image_states, open_clip, openai, runs, timm
from frugal.common.weights.library import Library
from frugal.common.weights.transformers import library as transformers

LIBRARIES: tuple[Library, ...] = (
    runs.LIBRARY,
    openai.LIBRARY,
    open_clip.LIBRARY,
    transformers.LIBRARY,
    timm.LIBRARY,
    image_states.LIBRARY,
)
"""In the order in which they are asked whether they know a path, and targets are named."""


def library_of(path: Path, name: str | None = None) -> Library | None:
    """The library that a path is of.

    Args:
        path: a folder or file.
        name: of the model in a file that does not say what it holds.

    Returns:
        None where none knows it.

    Raises:
        InputError: if a file that says so is damaged.
    """
    return next((library for library in LIBRARIES if library.knows(path, name)), None)


def is_run(path: Path, name: str | None = None) -> bool:
    """Whether a path is a run of this library, or of none, so that its reader says what is missing.

    Args:
        path: a folder or file.
        name: see :func:`library_of`.
    """
    return library_of(path, name) in (None, runs.LIBRARY)


def writers() -> dict[str, Library]:
    """The library of every target, by the name on the command line."""
    return {to: library for library in LIBRARIES for to in library.targets}
