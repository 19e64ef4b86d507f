"""Captions that lie beside images, where images are read by their folders: refused, not ignored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePath

from frugal.common.data.samples import IMAGE_EXTENSIONS
from frugal.common.errors import InputError

TEXT_EXTENSIONS = frozenset(("csv", "tsv", "jsonl", "ndjson", "txt", "caption"))
"""Of files that may hold captions."""
_IMAGE = re.compile(rf"[^\s/:,;|\"]\.(?:{'|'.join(IMAGE_EXTENSIONS)})\b", re.IGNORECASE)
_LOOKED_AT = 200
_LINES = 20


def refuse_lists(folder: Path, texts: Sequence[str]) -> None:
    """Refuse a folder of images with a list of them, which is data of another kind.

    Args:
        folder: of images.
        texts: files below it that may hold captions; those in the folder itself are looked for.

    Raises:
        InputError: if one is a list of images.
    """
    beside = [path for path in sorted(folder.iterdir()) if is_text(path.name) and path.is_file()]
    for path in [*beside, *(folder / name for name in islice(texts, _LOOKED_AT))]:
        if lists_images(path):
            raise InputError(
                f"{folder} holds images and, in {path.name}, a list of images, and either may be "
                f"meant; {_choice(path)}, or move the list out of the folder to have the images "
                "read by their folders"
            )


def _choice(path: Path) -> str:
    if path.suffix.lower() in (".csv", ".tsv"):
        return f"give {path} itself to have the list read"
    return f"write {path} as a .csv or .tsv file with a header and give that to have it read"


def refuse_texts_of_images(folder: Path, texts: Sequence[str], images: Sequence[str]) -> None:
    """Refuse images that have a text file of their name each, where captions are wanted.

    Raises:
        InputError: if most of them have.
    """
    stems = {PurePath(name).with_suffix("") for name in texts}
    own = [name for name in images if PurePath(name).with_suffix("") in stems] if stems else []
    if 2 * len(own) > len(images):
        raise InputError(
            f"{len(own)} of the {len(images)} images below {folder} have a text file of their "
            f"name (such as {own[0]}), which class folders do not read; write a .csv or .tsv list "
            "of images and captions, or tars, and give those"
        )


def is_text(name: str) -> bool:
    """Whether a file may hold captions, by its name."""
    return name.rpartition(".")[2].lower() in TEXT_EXTENSIONS


def lists_images(path: Path) -> bool:
    """Whether most of the first lines of a text file name an image file, URLs left out."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [file.readline(2000) for _ in range(_LINES)]
    except OSError:
        return False
    lines = [line for line in lines if line.strip()]
    naming = [line for line in lines if "://" not in line and _IMAGE.search(line)]
    return bool(lines) and 2 * len(naming) >= len(lines)
