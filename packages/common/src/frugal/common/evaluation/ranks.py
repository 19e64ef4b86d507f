"""How the processes of an evaluation share its work and add up what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from frugal.common.data.contents import agree


@dataclass(frozen=True)
class Ranks:
    """One process among those that evaluate together; the default is a process on its own."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """This process among all of ``torch.distributed``, or on its own without it."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; every process must call this.

        Exact for integers, and for tables in which only one process filled any one row.
        """
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A small value of every process, in rank order, on all of them."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def same_data(self, data: Any, name: str) -> None:
        """Refuse to share out images that the processes see differently.

        Args:
            data: has ``len()`` and ``listing()``.
            name: of the evaluation.

        Raises:
            InputError: on every process, if one sees other data.
        """
        if self.world_size > 1:
            what, words = f"data of the evaluation {name!r}", f"{len(data):,} images"
            agree((len(data), data.listing()), what, self.gather, words=words)

    def turns(self, count: int, chunk: int) -> Iterator[slice]:
        """The rows of ``count`` that are this process's: chunks taken in turn, the last shorter."""
        for start in range(self.rank * chunk, count, self.world_size * chunk):
            yield slice(start, min(start + chunk, count))

    def table(
        self,
        count: int,
        width: int,
        *,
        chunk: int,
        device: torch.device,
        fill: Callable[[slice], Tensor],
    ) -> Tensor:
        """(count, width) float32 on every process, filled ``chunk`` rows at a time.

        The chunks take turns among the processes, and the same rows share a chunk on any number
        of them: what ``fill`` computes does not depend on how many there are.
        """
        table = torch.zeros(count, width, device=device)
        for rows in self.turns(count, chunk):
            table[rows] = fill(rows)
        return self.sum(table)


def check_delivery(delivered: Tensor) -> None:
    """Refuse to count an image twice or not at all.

    Args:
        delivered: (N,) how often each image came, over all processes.
    """
    wrong = (delivered != 1).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise RuntimeError(
            f"{len(wrong)} of {len(delivered)} images were not evaluated exactly once; image "
            f"{first} came {int(delivered[first])} times"
        )
