"""TorchScript archives, read without ever running anything that is in them.

OpenAI's published models are TorchScript archives: a pickle, the bytes of the tensors, and code.
``torch.jit.load`` would compile that code, and ``torch.load(weights_only=True)`` refuses the file.
Here the pickle is read by an unpickler that knows tensors, lists and nameless modules, and the
code is never opened.
"""

from __future__ import annotations

import itertools
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.files import reason_of, refuse_swelling

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_MOST_MODULES = 100_000


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of compiled code and its constants."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # noqa: BLE001 - an altered archive fails in any way, and torch says how
        return False


class _Module:
    """Stands for a module of any class; what it held is kept and nothing is called."""

    def __setstate__(self, state: Any) -> None:
        self.held = state if isinstance(state, dict) else {}


def _rebuild(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor has more numbers than its file")
    return torch.as_strided(storage, size, stride, offset).clone()


def _same(value: Any) -> Any:
    return value


class _Unpickler(pickle.Unpickler):
    """Knows tensors, ordered dictionaries, TorchScript's lists, and modules without their code."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return _same
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to a {kind!r}")
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            size = torch.empty((), dtype=dtype).element_size()
            if len(content) < count * size:
                raise pickle.UnpicklingError(f"the tensor {key} is cut short")
            whole = torch.frombuffer(content, dtype=dtype, count=count) if count else None
            self._storages[key] = torch.empty(0, dtype=dtype) if whole is None else whole
        return self._storages[key]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of an archive, by their names in the state dict.

    Raises:
        InputError: if it is truncated, or holds more than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            refuse_swelling(archive, path.stat().st_size)
            root = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).split("/")[0]
            return dict(_walk(_Unpickler(archive, root).load(), "", itertools.count()))
    except Exception as error:  # noqa: BLE001 - an altered pickle fails in any way
        raise InputError(
            f"{path} cannot be read as TorchScript ({reason_of(error)}); copy it again"
        ) from None


def _walk(module: Any, prefix: str, met: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    if next(met) > _MOST_MODULES:
        raise pickle.UnpicklingError(f"it holds more than {_MOST_MODULES:,} modules")
    for name, value in getattr(module, "held", {}).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{name}.", met)
