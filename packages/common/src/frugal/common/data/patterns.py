"""From what a user calls data to files: paths, braces, globs, and what a folder holds."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from braceexpand import braceexpand

from frugal.common.data.damage import PassedOver, shortened
from frugal.common.data.samples import Fields
from frugal.common.data.stores.image_walk import KNOWN_FILES, has_image, subfolders
from frugal.common.data.stores.index import SUFFIX
from frugal.common.errors import InputError
from frugal.common.files import is_system_name, reason_of

_MAGIC = re.compile(r"[{}\[\]*?\\]")
_STREAM = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_KIND_OF_NAME = {
    "tar": re.compile(r".*\.tar", re.IGNORECASE | re.DOTALL),
    "tfrecord": re.compile(
        r".*\.tfrec(ords?)?(-\d+-of-\d+)?|.*\.tfrec(ords?)?-\d+", re.IGNORECASE | re.DOTALL
    ),
    "list": re.compile(r".*\.[ct]sv", re.IGNORECASE | re.DOTALL),
}
"""What a file holds, by its name; TensorFlow's data sets end in ``.tfrecord-00000-of-00010``."""
_LIKE_SHARDS = re.compile(r"\.(tar|tgz|tfrecords?)(\.|$)", re.IGNORECASE)
"""Shards that were compressed, or whose download was not finished."""
_SPLITS = ("train", "val", "validation", "test")
_KINDS = "tars, TFRecords, CSV files, or folders of one of these or of class folders with images"


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sorts 2.tar before 10.tar, also where the number stands in a folder's name."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", text)
    return [(int(digits or -1), words) for words, digits in parts]


def expand_braces(pattern: str) -> list[str]:
    """Every string that ``{00000..41407}`` and ``{a,b}`` in a pattern stand for.

    Raises:
        InputError: if a brace is not closed.
    """
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise InputError(
            f"the data pattern {pattern!r} has an unbalanced brace; write {{00000..00010}}"
        ) from None


def matching_paths(pattern: str) -> list[Path]:
    """The files and folders that a pattern stands for: those of globs in natural order.

    What exists as it is written is taken so, whatever letters it has; that holds for the folders
    at the beginning of a pattern too. ``**`` stands for any number of folders.

    Raises:
        InputError: if a path that is named is not there, or nothing matches.
    """
    if not pattern.strip():
        raise InputError("a data pattern is empty; give a path (a shell variable may not be set)")
    if Path(pattern).exists():
        return [Path(pattern)]
    folder, rest = _existing_folder(pattern)
    paths: list[Path] = []
    missing: list[str] = []
    places = expand_braces(rest)
    for place in places:
        found = [Path(folder + place)]
        if not found[0].exists():
            found = _glob(folder, place)
        paths += found
        if not found and not glob.has_magic(place):
            missing.append(folder + place)
    if missing:
        raise InputError(_missing(pattern, missing, len(places)))
    if not paths:
        raise InputError(f"the data pattern {pattern!r} matches nothing; check the path")
    return paths


def _existing_folder(pattern: str) -> tuple[str, str]:
    """The longest folder that is there under the name that is written, and what follows it."""
    ends = [place.end() for place in re.finditer("/", pattern)]
    has_magic = [end for end in ends if _MAGIC.search(pattern[:end])]
    end = next((end for end in reversed(has_magic) if Path(pattern[:end]).is_dir()), 0)
    return pattern[:end], pattern[end:]


def _glob(folder: str, place: str) -> list[Path]:
    """What a glob matches, in natural order; of ``**`` the files, where there are any."""
    found = glob.glob(glob.escape(folder) + place, recursive=True)  # noqa: PTH207
    paths = [Path(path) for path in sorted(found, key=natural_key)]
    if "**" in place:
        paths = [path for path in paths if not any(map(is_system_name, path.parts[1:]))]
        files = [path for path in paths if path.is_file()]
        return files or paths
    return paths


def _missing(pattern: str, missing: list[str], count: int) -> str:
    if count == 1:
        return (
            f"the data pattern {pattern!r} names {missing[0]}, which does not exist; check the path"
        )
    return (
        f"the data pattern {pattern!r} names {shortened(missing, 3)}, which "
        f"{'does' if len(missing) == 1 else 'do'} not exist ({len(missing)} of {count} are "
        "missing); copy what is missing, or leave it out, as a glob such as '*.tar' does"
    )


def kind_of(path: Path) -> str | None:
    """What a file holds, by its name: "tar", "tfrecord" or "list"; None if it is none of them."""
    name = path.name
    return next((kind for kind, form in _KIND_OF_NAME.items() if form.fullmatch(name)), None)


def is_stream(pattern: str) -> bool:
    """Whether a pattern names something that can only be read from its beginning on."""
    return _STREAM.match(pattern) is not None


def needs_index(path: Path) -> bool:
    """Whether samples of this file are found by a side-car index."""
    return kind_of(path) in ("tar", "tfrecord")


def find_files(
    pattern: str,
    *,
    fields: Fields | None = None,
    without_classes: bool = False,
    passed_over: PassedOver | None = None,
) -> list[Path]:
    """The shards, lists or class folders that a pattern stands for, in order.

    A pattern is a path, a path with braces as in webdataset, a glob, or a folder. Shards of a glob
    or a folder come in natural order: 2.tar before 10.tar.

    Args:
        pattern: what a user calls data.
        fields: which files of a folder are images.
        without_classes: take a folder of images that has no class folders too.
        passed_over: counts what lies beside the shards of a folder.

    Raises:
        InputError: if there is nothing, something of no known kind, or a folder of two kinds.
    """
    files: list[Path] = []
    for path in matching_paths(pattern):
        if path.is_dir():
            extensions = (fields or Fields()).image
            files += _files_of_folder(path, extensions, without_classes, passed_over)
        elif path.name.endswith(SUFFIX):
            continue  # the index of a shard that a glob matches too
        else:
            files.append(_known(path))
    if not files:
        raise InputError(f"the data pattern {pattern!r} matches nothing; check the path")
    return files


def find_streams(pattern: str, passed_over: PassedOver | None = None) -> list[str]:
    """The tars that a pattern stands for, as URLs and paths that can be read as streams.

    Args:
        pattern: what a user calls data.
        passed_over: counts what lies beside the tars of a folder.

    Raises:
        InputError: if there is none.
    """
    if is_stream(pattern):
        return expand_braces(pattern)
    files = find_files(pattern, passed_over=passed_over)
    other = next((path for path in files if kind_of(path) != "tar"), None)
    if other is not None:
        raise InputError(
            f"{other} is no tar, and data.resampled_samples reads tars only; leave it out"
        )
    return [str(path) for path in files]


def _known(path: Path) -> Path:
    if kind_of(path) is None:
        raise InputError(
            f"{path} is of no known kind; data may be {_KINDS} (compressed shards must be unpacked)"
        )
    return path


def _find_data_set(folder: Path, below: list[str], extensions: tuple[str, ...]) -> str | None:
    """A sub-folder that is a split or a set of shards rather than a class; None if none is.

    CIFAR-100 and COCO have a class "train": beside other classes it holds images and no folders.
    """
    others = [name for name in below if name.lower() not in _SPLITS]
    for name in below:
        if any(map(_is_shard, _inside(folder / name))):
            return name
        if name in others:
            continue
        is_flat = not subfolders(folder / name)
        if not is_flat or not any(has_image(folder / other, extensions) for other in others):
            return name
    return None


def _inside(folder: Path) -> list[Path]:
    """What a folder holds, in order.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be read ({reason_of(error)}); make it readable, or move "
            "it away"
        ) from None


def _is_shard(path: Path) -> bool:
    return needs_index(path) and not is_system_name(path.name)


def _files_of_folder(
    folder: Path,
    extensions: tuple[str, ...],
    without_classes: bool,
    passed_over: PassedOver | None,
) -> list[Path]:
    below = subfolders(folder)
    files = sorted(
        (path for path in _inside(folder) if path.is_file() and not is_system_name(path.name)),
        key=lambda path: natural_key(path.name),
    )
    kinds = {
        "tars": [path for path in files if kind_of(path) == "tar"],
        "TFRecords": [path for path in files if kind_of(path) == "tfrecord"],
    }
    shards = {kind: paths for kind, paths in kinds.items() if paths}
    if len(shards) > 1:
        _refuse_two_kinds(folder, shards)
    for kind, paths in shards.items():
        _refuse_class_folders_beside(folder, kind, paths, below, extensions)
        _pass_over(folder, kind, paths, passed_over)
        return paths
    if split := _find_data_set(folder, below, extensions):
        raise InputError(
            f"{folder} holds data sets in folders of their own; give one of them, such as {split}"
        )
    if any(has_image(folder / name, extensions) for name in below):
        return [folder]
    if has_image(folder, extensions):
        if without_classes:
            return [folder]
        raise InputError(
            f"the folder {folder} holds images but no class folders; put the images of every class "
            "into a folder of their own"
        )
    if lists := [path for path in files if kind_of(path) == "list"]:
        return lists
    raise InputError(f"the folder {folder} holds no data; it may hold {_KINDS}")


def _refuse_two_kinds(folder: Path, kinds: dict[str, list[Path]]) -> None:
    named = " and ".join(f"{kind} ({paths[0].name})" for kind, paths in kinds.items())
    ways = " or ".join(f"'{folder}/*{paths[0].suffix}'" for paths in kinds.values())
    raise InputError(
        f"{folder} holds data of two kinds, {named}; choose one with {ways}, or move the other out "
        "of the folder"
    )


def _refuse_class_folders_beside(
    folder: Path, kind: str, shards: list[Path], below: list[str], extensions: tuple[str, ...]
) -> None:
    """Refuse shards beside class folders, of which only one could be read."""
    found = next((name for name in below if has_image(folder / name, extensions)), None)
    if found is not None:
        raise InputError(
            f"{folder} holds data of two kinds, {kind} ({shards[0].name}) and folders of images "
            f"({found}); move one kind out of the folder, or name the {kind} with "
            f"'{folder}/*{shards[0].suffix}'"
        )


def _pass_over(folder: Path, kind: str, shards: list[Path], passed_over: PassedOver | None) -> None:
    """Count what else lies in a folder of shards, and is no file that belongs to one of them."""
    if passed_over is None:
        return
    stems = {path.stem for path in shards}
    for path in _inside(folder):
        if path.is_dir():
            if any(map(_is_shard, _inside(path))):
                passed_over.add(f"folders with shards beside {kind}", str(path))
            elif needs_index(path):
                passed_over.add("folders that are called as shards", str(path))
        elif is_system_name(path.name):
            if needs_index(path):
                passed_over.add("hidden files", str(path))
        elif path in shards or path.name.endswith(SUFFIX) or path.name in KNOWN_FILES:
            continue
        elif not any(path.name.startswith(f"{stem}{mark}") for stem in stems for mark in "._") or (
            _LIKE_SHARDS.search(path.name)
        ):
            passed_over.add(f"files that are no {kind} ({path.suffix or 'no ending'})", str(path))
