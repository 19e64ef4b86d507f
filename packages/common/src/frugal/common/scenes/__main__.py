"""``python -m frugal.common.scenes --out data/scenes``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from frugal.common.cli import command_words, exit_politely
from frugal.common.scenes.settings import Settings
from frugal.common.scenes.writing import write


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the data set; returns the exit code."""
    return exit_politely(lambda: _draw(arguments))


def _draw(arguments: Sequence[str] | None) -> int:
    settings = tyro.cli(
        Settings,
        prog="python -m frugal.common.scenes",
        description="Draw the embedded data set: captioned scenes as webdataset shards.",
        args=command_words(arguments),
    )
    sys.stdout.write(write(settings) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
