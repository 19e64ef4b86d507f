"""Which packages are installed here, in which versions, and where the sources of ours lie."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import sys
from importlib import metadata
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


_PACKAGES = (
    "torch", "deepspeed", "accelerate", "transformers", "timm", "open_clip_torch", "xformers",
    "webdataset", "safetensors", "frugal-common", "pillow", "simplejpeg", "numpy",
)  # fmt: skip
"""Whose versions a run directory tells."""


@functools.cache
def package_versions() -> dict[str, str | None]:
    """Of the packages that decide what a run computes; None for those that are not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


@functools.cache
def code_version() -> dict[str, str]:
    """The version of ``frugal-common``, and a SHA-256 over every source file of ``frugal``."""
    sources = [(part, file) for part in source_folders() for file in part.rglob("*.py")]
    found = hashlib.sha256()
    for name, file in sorted((f"{part.name}/{f.relative_to(part)}", f) for part, f in sources):
        found.update(f"{name}\0".encode() + file.read_bytes())
    version = package_versions()["frugal-common"] or "unknown"
    return {"version": version, "sha256": found.hexdigest()}
