"""Fetch what syntax masking needs of NLTK's data, once: ``python -m frugal.clipa.nltk_data``."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import tyro

from frugal.clipa.part_of_speech import SENTENCE_SPLITTER, TAGGER, load_language_data
from frugal.common.cli import command_words, exit_politely
from frugal.common.errors import InputError


def fetch(*, out: Path | None = None) -> int:
    """Download NLTK's English part-of-speech tagger and sentence splitter where they are missing.

    Args:
        out: folder to write to; by default the first one of NLTK_DATA, or ~/nltk_data.
    """
    import nltk

    folder = (out or _default_folder()).absolute()
    is_searched = str(folder) in nltk.data.path
    nltk.data.path.insert(0, str(folder))  # the first folder that has something is the one used
    missing = [package for package in (TAGGER, SENTENCE_SPLITTER) if not _has(folder, package)]
    for package in missing:
        _download(package, folder)
    load_language_data()
    done = "fetched" if missing else "found"
    sys.stdout.write(f"{done} NLTK's English tagger and sentence splitter in {folder}\n")
    if not is_searched:
        sys.stdout.write(f"set NLTK_DATA={folder} so that training finds them\n")
    return 0


def _default_folder() -> Path:
    named = os.environ.get("NLTK_DATA", "").split(os.pathsep)[0]
    return Path(named).expanduser() if named else Path.home() / "nltk_data"


def _has(folder: Path, package: str) -> bool:
    import nltk

    try:
        nltk.data.find(f"{package}/", paths=[str(folder)])
    except LookupError:
        return False
    return True


def _download(package: str, folder: Path) -> None:
    import nltk

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong comes as an error too
            nltk.download(
                package.rpartition("/")[2],
                download_dir=str(folder),
                quiet=True,
                raise_on_error=True,
                print_error_to=io.StringIO(),
            )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"NLTK's {package} could not be downloaded to {folder} ({reason}); connect this "
            "machine to the internet, or copy the folder from one where this command was run"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    program = "python -m frugal.clipa.nltk_data"
    return exit_politely(lambda: tyro.cli(fetch, prog=program, args=command_words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
