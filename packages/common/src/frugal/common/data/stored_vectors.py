"""Training on what a frozen image tower has put out, in the place of images.

``frugal.common.embed --output pooled`` stores it, shard by shard; here it is joined to the samples
by their shard and number. Locked-image tuning (LiT, Zhai et al., arXiv:2111.07991) and CiT need no
more of an image whose tower is not trained.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from frugal.common.data.contents import below_common_folder, shard_digests
from frugal.common.data.damage import Damaged
from frugal.common.data.sources import Source
from frugal.common.errors import InputError
from frugal.common.files import read_bytes, read_json_object, reason_of
from frugal.common.randomness import sample_generator

INDEX = "index.json"
POOLED = "image_pooled"
"""Name of the tensor (S, V, D): what a tower hands to its projection, V views of every image."""
VALID = "image_valid"
_OPEN = 16
"""Shards whose vectors a process holds: as many as are mixed with one another by default."""


@dataclass
class StoredVectors:
    """The vectors of all shards of some sources."""

    files: list[Path | None]
    """Of every shard; None of one without samples."""
    width: int
    views: int
    seed: int
    """Which view of an image is taken is drawn from it and the number of the sample."""
    tower: str
    """Digest of the tower that put them out."""
    _opened: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=OrderedDict)

    def of(self, shard: int, index: int, number: int) -> np.ndarray:
        """(D,) float32 of a sample; raises ``Damaged`` where its image could not be read."""
        try:
            is_valid, rows = self._shard(shard)
        except (OSError, SafetensorError) as error:
            raise Damaged("unreadable", reason_of(error)) from None
        if not is_valid[index]:
            raise Damaged("no image", "it could not be read when it was embedded")
        view = 0
        if self.views > 1:
            view = int(sample_generator(self.seed, "stored view", number).integers(self.views))
        return rows[index, view].astype(np.float32)

    def _shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(S,) bool and (S, V, D): whole, as single rows of a file take long to ask for."""
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        with safe_open(self.files[shard], framework="np") as file:
            found = file.get_tensor(VALID), file.get_tensor(POOLED)
        self._opened[shard] = found
        if len(self._opened) > _OPEN:
            self._opened.popitem(last=False)
        return found


def digest_of(folder: Path) -> str:
    """Of what a folder says that it holds; raises ``InputError`` where it cannot be read."""
    return hashlib.sha256(read_bytes(folder / INDEX)).hexdigest()


def open_vectors(folder: Path, sources: Sequence[Source], *, seed: int) -> StoredVectors:
    """The vectors of the samples of some sources.

    Raises:
        InputError: if there are none, they are of other samples, or not all are there yet.
    """
    told = _told(folder)
    shards = {(each["name"], each["samples"], each["digest"]): each["file"] for each in told}
    files: list[Path | None] = []
    # as they were embedded: all entries one after the other
    names = below_common_folder([shard.name for source in sources for shard in source.shards])
    found = [
        (name, shard.num_samples, digest)
        for name, (shard, digest) in zip(
            names,
            (pair for s in sources for pair in zip(s.shards, shard_digests(s), strict=True)),
            strict=True,
        )
    ]
    for key in found:
        if key not in shards:
            raise InputError(
                f"data.stored {folder} holds nothing of {key[0]} as it is now; embed the data of "
                "data.train with frugal.common.embed, all entries at once"
            )
        files.append(folder / shards[key] if key[1] else None)
    width, views = shape_of(folder)
    return StoredVectors(files, width, views, seed, _tower(folder))


def shape_of(folder: Path) -> tuple[int, int]:
    """Width of a vector, and views of every image.

    Raises:
        InputError: if the folder holds no pooled vectors.
    """
    for each in _told(folder):
        path = folder / each["file"]
        try:
            with safe_open(path, framework="np") as file:
                if POOLED in file.keys():  # noqa: SIM118 - it is no mapping
                    _, views, width = file.get_slice(POOLED).get_shape()
                    return width, views
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({reason_of(error)}); give the command of "
                "frugal.common.embed again"
            ) from None
    raise InputError(
        f"data.stored {folder} holds no pooled vectors of images; embed them with --output pooled"
    )


def _content(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json_object(folder / INDEX)
    except FileNotFoundError:
        raise InputError(
            f"data.stored {folder} holds no {INDEX}; give a folder that frugal.common.embed wrote"
        ) from None
    return content


def _told(folder: Path) -> list[dict[str, Any]]:
    """What the index says of every shard."""
    content = _content(folder)
    shards = content.get("shards")
    names = ("name", "samples", "digest", "file")
    if not isinstance(shards, list) or any(name not in each for each in shards for name in names):
        raise InputError(f"{folder / INDEX} is not of embeddings; give another data.stored")
    if any(Path(str(each["file"])).name != each["file"] for each in shards):
        raise InputError(f"{folder / INDEX} names files that do not lie beside it")
    if not content.get("complete"):
        raise InputError(
            f"data.stored {folder} is not complete; give the command of frugal.common.embed again"
        )
    return shards


def _tower(folder: Path) -> str:
    return str(_content(folder).get("about", {}).get("tower", ""))
