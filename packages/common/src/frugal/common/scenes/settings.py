"""What decides the bytes of a drawn data set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from frugal.common.errors import InputError

VERSION = 3
"""Raised whenever the same settings would give other bytes."""
ADDED = "segmentation_samples"
"""The setting that only adds files: a data set without them gets them beside what it has."""
_MOST_CANDIDATES = 600  # pairs of classes run out; see samples.retrieval_numbers


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to draw, and where to."""

    out: Path
    """Folder for the data set: new, empty, or holding the same data set already."""
    train_samples: int = 20_000
    """Training pairs."""
    zero_shot_samples: int = 1_280
    """Labeled test pictures of one thing, spread evenly over all classes."""
    probe_samples: int = 2_240
    """Labeled training pictures for linear probes, without the held-out classes."""
    retrieval_samples: int = 500
    """Test pairs whose captions each fit one picture only."""
    compositional_samples: int = 100
    """Test items of each of SugarCrepe's seven kinds."""
    segmentation_samples: int = 0
    """Training pictures with pixel masks in ADE20K's layout; a quarter as many for validation."""
    image_size: int = 64
    """Side of the pictures in pixels."""
    seed: int = 0
    processes: int | None = None
    """Writer processes; without it one per core. Their number changes no byte."""
    shard_size: int = 1_000
    """Samples per shard."""
    format: Literal["jpg", "png", "webp"] = "jpg"
    irrelevant: float = 0.0
    """Fraction of the training pairs that are weather reports, which no task asks about."""
    long_captions: bool = False
    """Training captions of several sentences that tell everything."""
    masks: bool = False
    """Add mask.png to every sample of a shard: 0, or 1 + class index, per pixel."""

    def check(self) -> None:
        """Refuse what cannot be drawn.

        Not done on construction: the command line's parser would wrap the sentence in a box.

        Raises:
            InputError: naming the flag, its value and what is allowed.
        """
        if self.image_size < 16:
            raise InputError(
                f"--image-size is {self.image_size}, must be at least 16 for shapes to show"
            )
        if not 0 <= self.irrelevant <= 1:
            raise InputError(f"--irrelevant is {self.irrelevant}, must lie between 0 and 1")
        if not 1 <= self.shard_size <= 10_000:
            raise InputError(
                f"--shard-size is {self.shard_size}, must lie between 1 and 10000 (img2dataset's "
                "keys have four digits for the place in a shard)"
            )
        if self.processes is not None and self.processes < 1:
            raise InputError(f"--processes is {self.processes}, must be at least 1")
        for name in (
            "train", "zero_shot", "probe", "retrieval", "compositional", "segmentation"
        ):  # fmt: skip
            if getattr(self, f"{name}_samples") < 0:
                flag = f"--{name.replace('_', '-')}-samples"
                raise InputError(
                    f"{flag} is {getattr(self, f'{name}_samples')}, must not be negative"
                )
        if self.retrieval_samples > _MOST_CANDIDATES:
            raise InputError(
                f"--retrieval-samples is {self.retrieval_samples}, must be at most "
                f"{_MOST_CANDIDATES}: beyond it captions would fit several pictures"
            )

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes, JSON-ready."""
        silent = {"out", "processes"}
        if not self.segmentation_samples:
            silent.add(ADDED)  # as in data sets that were drawn before there were any
        names = [field.name for field in fields(self) if field.name not in silent]
        return {"version": VERSION, **{name: getattr(self, name) for name in names}}
