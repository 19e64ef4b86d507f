"""Whether all processes see the same data."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import Any

from frugal.common.data.contents import Contents
from frugal.common.errors import InputError
from frugal.common.run import Run


def check_same_data(contents: Contents, run: Run) -> None:
    """Refuse to train where a process sees another copy; every process of a run must call this.

    Nothing happens where ``torch.distributed`` does not run.

    Args:
        contents: what this process sees.
        run: whose processes.

    Raises:
        InputError: as :func:`agree`.
    """
    import torch.distributed as dist

    if run.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return

    def gather(value: Any) -> list[Any]:
        found = [value] * run.world_size
        dist.all_gather_object(found, value)
        return found

    parts = [part for entry in contents for part in entry]
    digest = hashlib.sha256()
    for part in parts:
        line = f"{part.name}\0{part.samples}\0{part.digest}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    samples = sum(part.samples or 0 for part in parts)
    words = f"{samples:,} samples in {len(parts):,} shards or folders"
    agree(digest.hexdigest(), "data that data.train names", gather, words=words)


def agree(value: Any, what: str, gather: Callable[[Any], list[Any]], *, words: str = "") -> None:
    """Refuse to work on something that the processes see differently.

    Args:
        value: compared; equal where the processes see the same.
        what: it stands for, such as ``data of the evaluation 'a'``.
        gather: collects the value of every process, in rank order, on all of them.
        words: what a person is told of it.

    Raises:
        InputError: on every process alike, naming those that differ from process 0.
    """
    found = gather((value, words, socket.gethostname()))
    first, first_words, first_host = found[0]
    odd = [rank for rank, (other, _, _) in enumerate(found) if other != first]
    if not odd:
        return
    _, odd_words, odd_host = found[odd[0]]
    listed = ", ".join(map(str, odd[:8])) + (" and others" if len(odd) > 8 else "")
    numbers = "of other names or bytes"
    if odd_words != first_words:
        numbers = f"{odd_words} where there are {first_words}"
    raise InputError(
        f"the {what} is not the same everywhere: process {listed} of {len(found)} "
        f"{'sees' if len(odd) == 1 else 'see'} another copy than process 0 ({numbers}; process "
        f"{odd[0]} is on {odd_host}, process 0 on {first_host}); give every machine the same files "
        "under the same path"
    )
