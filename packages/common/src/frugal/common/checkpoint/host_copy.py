"""Tensors in memory that another process can write: a safetensors file before it is on a disk.

The memory is anonymous (``memfd_create``): it has no name that could be left behind, is not bounded
by the size of ``/dev/shm`` as containers have it, and lives as long as any process has it open.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from frugal.common.checkpoint.tensor_bytes import TensorBytes, file_header
from frugal.common.files import size_words

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors calls them."""
_MEMORY_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""What a container may use and uses, under version 2 and 1 of control groups."""


class HostCopy:
    """Room for tensors of given types and shapes."""

    def __init__(self, layout: Mapping[str, Tensor]) -> None:
        """Take the memory.

        Args:
            layout: tensors by name, of which type and shape count (they may be on ``meta``).

        Raises:
            OSError: if this system has no such memory, or not enough of it.
        """
        header, starts = file_header(
            {
                name: TensorBytes(Path(), _DTYPES[t.dtype], tuple(t.shape), 0, t.nbytes)
                for name, t in layout.items()
            }
        )
        self.layout = _described(layout)
        self.size = len(header) + sum(tensor.nbytes for tensor in layout.values())
        available = available_memory()
        if 2 * self.size > available:
            raise MemoryError(
                f"the copy takes {size_words(self.size)} of memory, of which "
                f"{size_words(available)} are available"
            )
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memory that processes can hand over")
        self.descriptor = os.memfd_create("checkpoint")
        try:
            # now, instead of being killed later where it is not there
            os.posix_fallocate(self.descriptor, 0, self.size)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # else the first copy waits for every page
            self._memory = mmap.mmap(self.descriptor, self.size, flags=flags)
        except OSError:
            os.close(self.descriptor)
            raise
        self._memory[: len(header)] = header
        self.tensors = {
            name: torch.frombuffer(
                self._memory, dtype=layout[name].dtype, count=layout[name].numel(), offset=start
            ).view(layout[name].shape)
            if layout[name].numel()
            else torch.empty(layout[name].shape, dtype=layout[name].dtype)
            for name, start in starts.items()
        }
        """Views of it, to be copied into."""

    def fits(self, layout: Mapping[str, Tensor]) -> bool:
        """Whether tensors are of the types and shapes that this has room for."""
        return self.layout == _described(layout)

    def close(self) -> None:
        """Give this process's hold on the memory back."""
        os.close(self.descriptor)


def _described(layout: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in layout.items()}


def available_memory() -> int:
    """Bytes that this machine, or the container that this process is in, has left."""
    found = [1 << 62]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) << 10)
    for most, used in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int(Path(most).read_text()) - int(Path(used).read_text()))
    return min(found)
