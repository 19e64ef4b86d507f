"""Which packages of Frugal are installed here, and where their sources lie."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path


@functools.cache
def installed_packages() -> tuple[str, ...]:
    """``common`` and the methods, as they are called below ``frugal``, in order.

    Also those that are installed to be edited, of which the namespace itself knows nothing.
    """
    # by the names of their folders: to read what every installed package says takes 0.1 s
    about = [f for entry in sys.path for f in Path(entry or ".").glob("frugal_*-info")]
    names = {re.split("[-.]", folder.name.removeprefix("frugal_"))[0] for folder in about}
    return tuple(sorted(names | {"common"}))


@functools.cache
def source_folders() -> tuple[Path, ...]:
    """The folders ``frugal/common``, ``frugal/flip`` and so on of all installed packages."""
    specs = [importlib.util.find_spec(f"frugal.{name}") for name in installed_packages()]
    places = [spec.submodule_search_locations or [] for spec in specs if spec is not None]
    return tuple(Path(place) for found in places for place in found if Path(place).is_dir())
