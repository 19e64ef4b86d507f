"""From a pattern to the paths it stands for: what exists as it is written, braces, globs."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from braceexpand import braceexpand

from frugal.common.data.passed_over import shortened
from frugal.common.errors import InputError
from frugal.common.files import is_system_name

_MAGIC = re.compile(r"[{}\[\]*?\\]")


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
