"""Files of PyTorch, read without running what stands in them or unpacking more than they hold."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from frugal.common.files import refuse_swelling


def load_torch(path: Path, *, mapped: bool) -> Any:
    """The tensors and plain values of a file.

    Args:
        path: the file.
        mapped: leave the tensors on disk until they are used, where that is possible.

    Raises:
        Exception: of any kind, if it cannot be read, or holds more than that.
    """
    is_archive = zipfile.is_zipfile(path)  # files from before torch 1.6 are none
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            refuse_swelling(archive, path.stat().st_size)
    with warnings.catch_warnings():
        # whatever is wrong with a pickle is said by whoever asked for it
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive)
