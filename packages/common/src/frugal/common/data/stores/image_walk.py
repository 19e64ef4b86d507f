"""Which images lie below a folder, without what systems put there and links that lead back.

Captions that lie beside images, where images are read by their folders, are refused, not ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import attrgetter
from pathlib import Path, PurePath

from frugal.common.data.damage import PassedOver
from frugal.common.data.samples import IMAGE_EXTENSIONS
from frugal.common.errors import InputError
from frugal.common.files import is_system_name, reason_of

_LINK = "links that lead back to a folder that is read anyway"
_SYSTEM = "hidden files and folders, or those of a system"


def subfolders(folder: Path, passed_over: PassedOver | None = None) -> list[str]:
    """The names of the folders in a folder, sorted; those of systems are counted and left out."""
    names = []
    for entry in _entries(str(folder)):
        if not _is_folder(entry):
            continue
        if is_system_name(entry.name):
            _add(passed_over, _SYSTEM, entry.path)
        else:
            names.append(entry.name)
    return names


def images_below(
    folder: Path,
    parts: Iterable[str],
    extensions: Iterable[str],
    passed_over: PassedOver | None = None,
    texts: list[str] | None = None,
) -> dict[str, list[str]]:
    """The images below some sub-folders, each in the order of torchvision's ImageFolder.

    Links to folders are followed, except back to a folder that is read anyway or to one that holds
    it: the images of a folder come once.

    Args:
        folder: what the paths that are returned are relative to.
        parts: sub-folders; "" is the folder itself.
        extensions: of images, in lower case and without a dot.
        passed_over: counts what is no image.
        texts: takes the paths of files that may hold captions, by their names.

    Returns:
        Paths by part, in the order of the parts. A part that is a link which leads back is left
        out.

    Raises:
        InputError: if a folder cannot be read.
    """
    walk = _Walk(str(folder), frozenset(extensions), passed_over, texts)
    for part in parts:
        walk.add(part)
    return walk.finished()


def image_files(
    folder: Path, extensions: Iterable[str], passed_over: PassedOver | None = None
) -> list[Path]:
    """The images below a folder and its sub-folders, in the order of torchvision's ImageFolder."""
    found = images_below(folder, [""], extensions, passed_over)[""]
    return [folder / name for name in found]


def has_image(folder: Path, extensions: Iterable[str]) -> bool:
    """Whether there is an image below a folder; looks no further than the first."""
    walk = _Walk(str(folder), frozenset(extensions))
    waiting = [""]
    while waiting:
        names, folders, links = walk.list_folder(waiting.pop())
        if names:
            return True
        waiting += [*folders, *(link for link in links if walk.is_new(link))]
    return False


KNOWN_FILES = frozenset(
    {
        "classnames.json", "classnames.txt", "zeroshot_classification_templates.txt",
        "dataset_type.txt", "nshards.txt", "held_out.txt",
    }
)  # fmt: skip
"""What describes a data set and is read elsewhere."""


def pass_over_files(folder: Path, extensions: Iterable[str], passed_over: PassedOver) -> None:
    """Count the files beside class folders, which are of no class."""
    image_extensions = frozenset(extensions)
    for entry in _entries(str(folder)):
        if _is_folder(entry) or entry.name in KNOWN_FILES:
            continue
        stem, _, extension = entry.name.rpartition(".")
        if is_system_name(entry.name):
            passed_over.add(_SYSTEM, entry.path)
        elif stem and extension.lower() in image_extensions:
            passed_over.add("images beside class folders, which have no class", entry.path)
        else:
            passed_over.add(_no_image(stem, extension), entry.path)


class _Walk:
    """Real folders first, then links to folders that have not been read."""

    def __init__(
        self,
        root: str,
        extensions: frozenset[str],
        passed_over: PassedOver | None = None,
        texts: list[str] | None = None,
    ) -> None:
        self._root = root
        self._extensions = extensions
        self._passed_over = passed_over
        self._texts = texts
        self._seen: set[tuple[int, int]] = set()
        real = Path(root).resolve()
        for above in (real, *real.parents):
            self._see(above.stat())
        self._found: dict[str, dict[str, list[str]]] = {}
        self._links: list[tuple[str, str]] = []

    def add(self, part: str) -> None:
        """Read a part and what really lies below it; links wait."""
        self._found[part] = {}
        if part and Path(self._root, part).is_symlink():
            self._links.append((part, part))
            return
        if part:
            self.is_new(part)
        self._read(part, part)

    def finished(self) -> dict[str, list[str]]:
        """The images of every part, those behind links too."""
        while self._links:
            part, link = self._links.pop(0)
            if self.is_new(link):
                self._read(part, link)
                continue
            _add(self._passed_over, _LINK, f"{self._root}/{link}")
            if link == part:
                del self._found[part]
        return {
            part: [f"{place}/{n}" if place else n for place in sorted(files) for n in files[place]]
            for part, files in self._found.items()
        }

    def _read(self, part: str, start: str) -> None:
        waiting = [start]
        while waiting:
            place = waiting.pop()
            names, folders, links = self.list_folder(place)
            if names:
                self._found[part][place] = names
            self._links += [(part, link) for link in links]
            waiting += [folder for folder in folders if self._is_unread(folder)]

    def _is_unread(self, folder: str) -> bool:
        if self.is_new(folder):
            return True
        _add(self._passed_over, _LINK, f"{self._root}/{folder}")
        return False

    def is_new(self, place: str) -> bool:
        """Whether a folder has not been read under any name; from now on it counts as read."""
        try:
            return self._see(Path(self._root, place).stat())
        except OSError as error:
            raise _unreadable(f"{self._root}/{place}", error) from None

    def _see(self, found: os.stat_result) -> bool:
        key = (found.st_dev, found.st_ino)
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def list_folder(self, place: str) -> tuple[list[str], list[str], list[str]]:
        """The names of the images in a folder, and the places of its folders and links to some."""
        names: list[str] = []
        folders: list[str] = []
        links: list[str] = []
        for entry in _entries(f"{self._root}/{place}" if place else self._root):
            name = entry.name
            if is_system_name(name):
                _add(self._passed_over, _SYSTEM, entry.path)
                continue
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() in self._extensions and not _is_folder(entry):
                names.append(name)
            elif _is_folder(entry):
                below = f"{place}/{name}" if place else name
                (links if entry.is_symlink() else folders).append(below)
            else:
                self._pass_over(place, entry, _no_image(stem, extension))
        return names, folders, links

    def _pass_over(self, place: str, entry: os.DirEntry[str], reason: str) -> None:
        _add(self._passed_over, reason, entry.path)
        if self._texts is not None and is_text(entry.name):
            self._texts.append(f"{place}/{entry.name}" if place else entry.name)


def _no_image(stem: str, extension: str) -> str:
    is_one = stem and extension.isalnum() and len(extension) <= 10
    return (
        f"files that are no images (.{extension.lower()})" if is_one else "files of no known kind"
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=attrgetter("name"))
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: str, error: OSError) -> InputError:
    return InputError(
        f"the folder {folder} cannot be read ({reason_of(error)}); make it readable, or move it "
        "away"
    )


def _add(passed_over: PassedOver | None, reason: str, name: str) -> None:
    if passed_over is not None:
        passed_over.add(reason, name)


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
    paired = [name for name in images if PurePath(name).with_suffix("") in stems] if stems else []
    if 2 * len(paired) > len(images):
        raise InputError(
            f"{len(paired)} of the {len(images)} images below {folder} have a text file of their "
            f"name (such as {paired[0]}), which class folders do not read; write a .csv or .tsv "
            "list of images and captions, or tars, and give those"
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
