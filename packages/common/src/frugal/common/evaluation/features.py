"""Embeddings of labeled images, kept on disk for the next time they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.data.labeled import LabeledImages, walk_images
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder
from frugal.common.files import reason_of
from frugal.common.run import Run


@dataclass(frozen=True)
class Features:
    """Embeddings with the classes of their images, complete on every process, on the CPU."""

    embeddings: Tensor
    """(N, E) float32 unit vectors, in the order of the data."""
    labels: Tensor
    """(N,) int64."""

    def __len__(self) -> int:
        """Images."""
        return len(self.labels)

    def rows(self, chosen: Tensor) -> Features:
        """Some of them."""
        return Features(self.embeddings[chosen], self.labels[chosen])

    def joined(self, other: Features) -> Features:
        """These, then the others."""
        return Features(
            torch.cat([self.embeddings, other.embeddings]), torch.cat([self.labels, other.labels])
        )


def embed_labeled(
    embedder: Embedder, data: LabeledImages, *, batch_size: int, workers: int, ranks: Ranks
) -> Features:
    """Embed every image once, whatever the number of processes and the batch size."""
    embeddings = torch.zeros(len(data), embedder.width, device=embedder.device)
    all_labels = torch.zeros(len(data), dtype=torch.int64, device=embedder.device)

    def compute(images: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return embedder.images(images, places), labels.to(embedder.device)

    tables = [embeddings, all_labels]
    walk_images(data, compute, tables, ranks=ranks, batch_size=batch_size, workers=workers)
    return Features(embeddings.cpu(), all_labels.cpu())


def kept(
    folder: Path | None,
    key: dict[str, Any],
    make: Callable[[], Features],
    *,
    data: Callable[[], str],
    ranks: Ranks,
    run: Run,
) -> Features:
    """Features from a folder where they are there for this key and data, else made and left there.

    Every process must call this. A file that is damaged, or of another key, is made again.

    Args:
        folder: made if missing; None keeps nothing.
        key: everything that the features depend on beside the data, ready for JSON.
        make: every process calls it, or none does.
        data: the digest of the samples' bytes, which costs their reading unless ``make`` read them:
            it is asked for before only where there are features of this key.
        ranks: the processes.
        run: which of them writes, and says what it did.

    Raises:
        InputError: if the folder cannot be written.
    """
    if folder is None:
        return make()
    start = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def everywhere(found: bool) -> bool:
        has = torch.tensor([found], dtype=torch.int64, device=run.device)
        return int(ranks.sum(has)) == ranks.world_size

    if everywhere(any(folder.glob(f"{start}-*.safetensors"))):
        path, words = _place(folder, start, key, data())
        found = _read(path, words)
        if everywhere(found is not None) and found is not None:
            run.log.info("%s embeddings were kept in %s", f"{len(found):,}", path)
            return found
    made = make()
    path, words = _place(folder, start, key, data())
    if run.is_main:
        _write(path, words, made)
    return made


def _place(folder: Path, start: str, key: dict[str, Any], data: str) -> tuple[Path, str]:
    """Where features lie, and the whole key that stands in the file."""
    words = json.dumps(key | {"data": data}, sort_keys=True)
    return folder / f"{start}-{data[:16]}.safetensors", words


def _read(path: Path, words: str) -> Features | None:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != words:
                return None
            made = Features(file.get_tensor("embeddings"), file.get_tensor("labels"))
    except (OSError, SafetensorError):
        return None
    return made if made.embeddings.isfinite().all() else None


def _write(path: Path, words: str, features: Features) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {"embeddings": features.embeddings, "labels": features.labels}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, metadata={"key": words})
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise InputError(
            f"the embeddings cannot be kept in {path.parent} ({reason_of(error)}); make room "
            "there, or choose another --linear-probe.features"
        ) from None
