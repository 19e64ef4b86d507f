"""What a number was measured with: the weights, and the versions of what computed it."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

_PACKAGES = (
    "frugal-common", "torch", "torchvision", "transformers", "open_clip_torch", "timm", "numpy",
    "pillow",
)  # fmt: skip


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a model's weights and buffers.

    Equal weights have equal digests wherever they were loaded from.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        found.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Python's, and those of the packages that take part in an evaluation."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
