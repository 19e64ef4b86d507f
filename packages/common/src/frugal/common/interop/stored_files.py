"""Files of tensors that others wrote, read without running anything that stands in them."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.interop.torchscript import is_torchscript, read_torchscript

State = dict[str, Tensor]

_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
    (pathlib.PureWindowsPath, "pathlib._local.WindowsPath"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]
"""What training scripts put beside tensors, and what does nothing when it is made: settings, paths
and numbers of NumPy."""
_NESTS = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
"""What data parallelism and compilation put in front of names."""


def read_content(path: Path) -> Any:
    """What a safetensors or PyTorch file holds; of a TorchScript archive its state.

    Raises:
        InputError: if it cannot be read, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {error}") from None
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch.load raises errors of every kind
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{path} cannot be read as a PyTorch file of tensors and plain values: {reason}"
        ) from None


def read_weights(path: Path) -> State:
    """The tensors of a file by name: safetensors, a torch checkpoint, or TorchScript.

    Raises:
        InputError: if the file is missing, truncated, or holds anything but tensors.
    """
    return state_in(read_content(path), source=str(path))


def weights_in(folder: Path, names: Sequence[str]) -> Path:
    """The file of weights in a folder, by the first of its usual names.

    Raises:
        InputError: if there is none.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"the folder {folder} holds none of {', '.join(names)}")
    return found


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def state_in(content: Any, *, source: str) -> State:
    """The named tensors in the content of a file: bare, or nested under a usual name.

    Raises:
        InputError: if there are none.
    """
    found = content
    while isinstance(found, Mapping):
        nest = next((name for name in _NESTS if isinstance(found.get(name), Mapping)), None)
        if nest is None:
            break
        found = found[nest]
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"{source} holds no state_dict; give the weights of a model")
    return {_bare(str(key)): value for key, value in found.items() if isinstance(value, Tensor)}


def _bare(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name
