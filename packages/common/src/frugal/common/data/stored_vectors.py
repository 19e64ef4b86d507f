"""Training on what a frozen image tower has put out, in the place of images.

``frugal.common.embed --output pooled`` stores it, shard by shard; here it is joined to the samples
by their shard and number. Locked-image tuning (LiT, Zhai et al., arXiv:2111.07991) and CiT need no
more of an image whose tower is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from frugal.common.data.contents import below_common_folder, shard_digests
from frugal.common.data.damage import Damaged
from frugal.common.data.sources import Source
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_json_object, reason_of
from frugal.common.randomness import sample_generator

INDEX = "index.json"
HEADER = "embeddings"
"""In the header of a file: what it is of, as JSON."""
POOLED, PROJECTED = "image_pooled", "image"
"""Names of the tensors (S, V, D), V views of every image: what a tower hands to its projection, and
what it puts out."""
VALID = "image_valid"
"""Of the tensor (S,) bool: which images could be read."""
_OPEN = 16
"""Shards whose vectors a process holds: as many as are mixed with one another by default."""


@dataclass(frozen=True)
class StoredVectors:
    """The vectors of all shards of some sources."""

    files: list[Path]
    """Of every shard."""
    width: int
    views: int
    seed: int
    """Which view of an image is taken is drawn from it and the number of the sample."""
    tower: str
    """Digest of the tower that put them out."""

    def of(self, shard: int, index: int, number: int) -> np.ndarray:
        """(D,) float32 of a sample; raises ``Damaged`` where its image could not be read."""
        try:
            is_valid, rows = _read(self.files[shard])
        except (OSError, SafetensorError) as error:
            raise Damaged("unreadable", reason_of(error)) from None
        if not is_valid[index]:
            raise Damaged("no image", "it could not be read when it was embedded")
        view = 0
        if self.views > 1:
            view = int(sample_generator(self.seed, "stored view", number).integers(self.views))
        return rows[index, view].astype(np.float32)


@lru_cache(maxsize=_OPEN)
def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(S,) bool and (S, V, D): whole, as single rows of a file take long to ask for."""
    with safe_open(path, framework="np") as file:
        return file.get_tensor(VALID), file.get_tensor(POOLED)


def open_vectors(folder: Path, sources: Sequence[Source], *, seed: int) -> StoredVectors:
    """The vectors of the samples of some sources.

    Raises:
        InputError: if there are none, they are of other samples, or not all are there yet.
    """
    about, told = _told(folder)
    shards = {(each["name"], each["samples"], each["digest"]): each["file"] for each in told}
    # as they were embedded: all entries one after the other
    all_shards = [shard for source in sources for shard in source.shards]
    names = below_common_folder([shard.name for shard in all_shards])
    digests = [digest for source in sources for digest in shard_digests(source)]
    files: list[Path] = []
    for name, shard, digest in zip(names, all_shards, digests, strict=True):
        file = shards.get((name, shard.num_samples, digest))
        if file is None:
            raise InputError(
                f"data.stored {folder} holds nothing of {name} as it is now; embed the data of "
                "data.train with frugal.common.embed, all entries at once"
            )
        files.append(folder / file)
        _check_shard(files[-1], [name, shard.num_samples, digest])
    width, views = _shape(folder, told)
    return StoredVectors(files, width, views, seed, str(about.get("tower", "")))


def _check_shard(path: Path, shard: list[Any]) -> None:
    """Refuse a file that is gone, or holds the vectors of another shard."""
    try:
        with safe_open(path, framework="np") as file:
            found = parse_json(file.metadata()[HEADER])["shard"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from None
    if found != shard:
        raise InputError(
            f"{path} holds the vectors of another shard than {shard[0]}; remove it, and give the "
            "command of frugal.common.embed again"
        )


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be read ({reason_of(error)}); give the command of frugal.common.embed again"
    )


def width_of(folder: Path) -> int:
    """Of a vector; raises ``InputError`` if a folder holds no pooled vectors."""
    return _shape(folder, _told(folder)[1])[0]


def _shape(folder: Path, told: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Width of a vector, and views of every image, as the first file that has any tells."""
    for each in told:
        path = folder / each["file"]
        try:
            with safe_open(path, framework="np") as file:
                if POOLED in file.keys():  # noqa: SIM118 - it is no mapping
                    _, views, width = file.get_slice(POOLED).get_shape()
                    return width, views
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
    raise InputError(
        f"data.stored {folder} holds no pooled vectors of images; embed them with --output pooled"
    )


def _told(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the index says of the model, and of every shard.

    Raises:
        InputError: if there is none, or it is of something else or not complete.
    """
    try:
        content: dict[str, Any] = read_json_object(folder / INDEX)
    except FileNotFoundError:
        raise InputError(
            f"data.stored {folder} holds no {INDEX}; give a folder that frugal.common.embed wrote"
        ) from None
    about, shards = content.get("about"), content.get("shards")
    names = ("name", "samples", "digest", "file")
    if (
        not isinstance(about, dict)
        or not isinstance(shards, list)
        or any(name not in each for each in shards for name in names)
    ):
        raise InputError(f"{folder / INDEX} is not of embeddings; give another data.stored")
    if any(Path(str(each["file"])).name != each["file"] for each in shards):
        raise InputError(f"{folder / INDEX} names files that do not lie beside it")
    if not content.get("complete"):
        raise InputError(
            f"data.stored {folder} is not complete; give the command of frugal.common.embed again"
        )
    return about, shards
