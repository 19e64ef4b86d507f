"""SugarCrepe's files: images with a caption that is true of them and one that was made false.

After Hsieh et al., "SugarCrepe" (arXiv:2306.14610, section 4): a caption is made false by
replacing, swapping or adding an object, an attribute or a relation. Every category is a JSON file
of items by key, and the images lie in a folder (COCO's val2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal.common.data.samples import caption_text
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes

PARTS = {"obj": "object", "att": "attribute", "rel": "relation"}
"""What of a caption is changed."""
KINDS: dict[str, tuple[str, ...]] = {
    "replace": ("obj", "att", "rel"),
    "swap": ("obj", "att"),
    "add": ("obj", "att"),
}
"""How it is changed, and which parts can be changed in this way."""
CATEGORIES = tuple(f"{kind}_{part}" for kind, parts in KINDS.items() for part in parts)
"""The names of SugarCrepe's seven files."""

_FIELDS = ("filename", "caption", "negative_caption")
_IMAGE_FOLDERS = ("images", "val2017")


@dataclass(frozen=True)
class Item:
    """An image with a caption that is true of it and one that is not."""

    category: str
    file: str
    """Of the image, in the folder of images."""
    caption: str
    negative_caption: str


def has_contrasts(folder: Path) -> bool:
    """Whether a folder, or the part of a scenes folder meant for this, has any of the files."""
    places = (folder, folder / "compositional")
    return any((place / f"{name}.json").is_file() for place in places for name in CATEGORIES)


def read_contrasts(folder: Path, images: Path | None) -> tuple[Path, list[Item]]:
    """The folder of images, and the items of all categories that a folder has files of.

    Args:
        folder: holds ``replace_obj.json`` and so on.
        images: the folder of images; by default ``images`` or ``val2017`` beside the files, or
            their own folder.

    Raises:
        InputError: if there is no such file, one cannot be used, or an image is missing.
    """
    items: list[Item] = []
    for category in CATEGORIES:
        path = folder / f"{category}.json"
        if path.is_file():
            items += _read_items(path)
    if not items:
        raise InputError(
            f"{folder} has none of the files {', '.join(f'{name}.json' for name in CATEGORIES)}; "
            "give the folder that holds them"
        )
    if images is None:
        beside = (folder / name for name in _IMAGE_FOLDERS)
        images = next((path for path in beside if path.is_dir()), folder)
    _check_images(images, items)
    return images, items


def _read_items(path: Path) -> list[Item]:
    """The items of one category, in their order."""
    try:
        content = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} does not hold items by key, as SugarCrepe's files do; copy it again"
        )
    items: dict[Item, str] = {}
    for key, value in content.items():
        item = Item(path.stem, *_texts(path, key, value))
        if item in items:
            raise InputError(
                f"the items {items[item]!r} and {key!r} of {path} are the same and would count "
                "twice; remove one"
            )
        items[item] = key
    return list(items)


def _texts(path: Path, key: str, value: Any) -> list[str]:
    """File, true and false caption of an item."""
    texts: list[Any] = [value.get(name) if isinstance(value, dict) else None for name in _FIELDS]
    for name, text in zip(_FIELDS, texts, strict=True):
        if not isinstance(text, str) or not caption_text(text):
            raise InputError(
                f"the item {key!r} of {path} has no {name}; every item needs {', '.join(_FIELDS)}"
            )
    if caption_text(texts[1]) == caption_text(texts[2]):
        raise InputError(
            f"the item {key!r} of {path} has the same caption as true and as false; correct or "
            "remove it"
        )
    return texts


def _check_images(images: Path, items: Sequence[Item]) -> None:
    """Refuse to measure on a part of the images."""
    files = list(dict.fromkeys(item.file for item in items))
    missing = {file for file in files if not (images / file).is_file()}
    if not missing:
        return
    counts = []
    for category in dict.fromkeys(item.category for item in items):
        own = {item.file for item in items if item.category == category}
        if lost := own & missing:
            counts.append(f"{len(lost):,} of the {len(own):,} that {category}.json names")
    first = next(file for file in files if file in missing)
    raise InputError(
        f"{images} lacks images: {', '.join(counts)}; the first is {first}; copy them there, or "
        "give the folder that has them as images"
    )
