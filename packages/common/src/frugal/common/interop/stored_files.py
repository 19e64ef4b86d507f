"""Files of tensors that others wrote, read without running anything that stands in them."""

from __future__ import annotations

import argparse
import pathlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from frugal.common.errors import InputError

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
        from frugal.common.interop.foreign_files import read_torchscript

        return read_torchscript(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch.load raises errors of every kind
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{path} cannot be read as a PyTorch file of tensors and plain values: {reason}"
        ) from None


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of compiled code and its constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


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
