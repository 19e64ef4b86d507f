"""Whether all processes of a run see the same data."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable
from pathlib import PurePath

from frugal.common.errors import InputError
from frugal.common.run import Run


def check_same_data(shards: Iterable[tuple[str, int]], run: Run, *, what: str) -> None:
    """Refuse to go on where a process sees another copy; every process of a run must call this.

    Nothing happens where ``torch.distributed`` does not run.

    Args:
        shards: names and samples of all shards, in order; of a path only its last part counts,
            since machines may keep their copies in different places.
        run: whose processes.
        what: the field that names the data, such as data.train.

    Raises:
        InputError: naming the first process that sees something else than the first one.
    """
    import torch.distributed as dist

    if run.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return
    digest, number, samples = hashlib.sha256(), 0, 0
    for name, count in shards:
        digest.update(f"{PurePath(name).name}\0{count}\0".encode("utf-8", "surrogateescape"))
        number, samples = number + 1, samples + count
    mine = (digest.hexdigest(), number, samples, socket.gethostname())
    seen: list[tuple[str, int, int, str]] = [mine] * run.world_size
    dist.all_gather_object(seen, mine)
    first = seen[0]
    for rank, (found, shards_seen, samples_seen, host) in enumerate(seen):
        if found != first[0]:
            more = sum(other[0] != first[0] for other in seen) - 1
            others = f" and {more} more do" if more else " does"
            raise InputError(
                f"process {rank} on {host}{others} not see the data that process 0 on {first[3]} "
                f"sees ({samples_seen:,} samples in {shards_seen:,} shards where there are "
                f"{first[2]:,} in {first[1]:,}, or shards of other names or sizes); give every "
                f"process the same copy in {what}"
            )
