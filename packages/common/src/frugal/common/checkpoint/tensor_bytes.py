"""Tensors of safetensors files as ranges of bytes, to be copied without being in memory at once.

A file begins with the length of a JSON header (8 bytes, little-endian), which says of every tensor
its type, its shape and where its bytes lie behind the header.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_AT_ONCE = 1 << 22
"""Bytes in memory at a time."""
_FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_ALIGNED = 8
"""Every tensor starts at a multiple of this many bytes, as safetensors writes them."""


@dataclass(frozen=True)
class TensorBytes:
    """One tensor of a file."""

    path: Path
    dtype: str
    """As safetensors calls it: F32, I64."""
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""

    def read(self) -> Iterator[bytes]:
        """Its bytes, a few MiB at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left and (block := file.read(min(left, _AT_ONCE))):
                left -= len(block)
                yield block

    def parts(self) -> Iterator[Tensor]:
        """Its numbers in portions of a few MiB, without their shape; none where they are whole."""
        dtype = _FLOATS.get(self.dtype)
        if dtype is not None:
            for block in self.read():
                yield torch.frombuffer(bytearray(block), dtype=dtype)

    def equals(self, other: TensorBytes) -> bool:
        """Whether both have the same type, shape and bits."""
        if (self.dtype, self.shape, self.size) != (other.dtype, other.shape, other.size):
            return False
        return all(a == b for a, b in zip(self.read(), other.read(), strict=True))


def find_tensors(path: Path) -> dict[str, TensorBytes]:
    """The tensors of a safetensors file, by name.

    Raises:
        SafetensorError: if its header lies, or it is cut.
    """
    safe_open(path, framework="pt")  # which verifies every place that the header speaks of
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            found[name] = TensorBytes(
                path, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first
            )
    return found


def file_header(tensors: Mapping[str, TensorBytes]) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file of these tensors begins, and where the bytes of each start in it.

    Those that start first come first. It depends on what the tensors are alone.
    """
    # the largest elements first, so that all of them start at multiples of their size
    names = sorted(tensors, key=lambda name: (-_element(tensors[name]), name))
    header, starts, end = {}, {}, 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.size],
        }
        starts[name] = end
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    text = len(text).to_bytes(8, "little") + text
    return text, {name: len(text) + start for name, start in starts.items()}


def copy_tensors(tensors: Mapping[str, TensorBytes], path: Path) -> str:
    """Write a safetensors file of these tensors under these names, and read it back.

    The file depends on what the tensors are alone, not on where they lay.

    Returns:
        What went wrong, or nothing.
    """
    header, starts = file_header(tensors)
    try:
        with path.open("wb") as file:
            file.write(header)
            for name in starts:
                for block in tensors[name].read():
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = find_tensors(path)
        different = [name for name in starts if not tensors[name].equals(written[name])]
    except OSError as error:
        return f"{path.name}: {error}"
    return f"{path.name}: {different[0]} reads back differently" if different else ""


def _element(tensor: TensorBytes) -> int:
    """Bits of one number, as the name of its type says; what is called otherwise comes last."""
    digits = re.search(r"\d+", tensor.dtype)
    return int(digits[0]) if digits else 0
