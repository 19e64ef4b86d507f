"""``engine.deterministic``: two runs on the same GPUs end in the same bits.

torch then takes deterministic kernels wherever it has them and refuses operations that have none;
attention is torch's, since those of xformers add gradients in any order; cuBLAS keeps to its own
workspace, and NCCL to algorithms that add in one order. What it costs was not measured here.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from frugal.common.errors import InputError

_WORKSPACES = (":4096:8", ":16:8")
"""With which cuBLAS is deterministic, in its variable."""
_NCCL = re.compile(r"(\w+:)?(ring|tree)(,(ring|tree))*(;(\w+:)?(ring|tree)(,(ring|tree))*)*", re.I)
"""Values of NCCL_ALGO that leave out NVLS and CollNet, which add in switches as data comes in."""


def make_deterministic(log: logging.Logger) -> None:
    """Have this process compute with deterministic kernels; before it has computed anything.

    Raises:
        InputError: if a variable of the environment asks for something else.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise InputError(
            f"engine.deterministic needs CUBLAS_WORKSPACE_CONFIG to be {' or '.join(_WORKSPACES)}, "
            f"but it is {workspace!r}; unset it"
        )
    algorithm = os.environ.setdefault("NCCL_ALGO", "Ring")
    if not _NCCL.fullmatch(algorithm):
        raise InputError(
            f"engine.deterministic needs NCCL_ALGO to name Ring and Tree alone, but it is "
            f"{algorithm!r}, and others add in an order of their own; unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which chooses kernels by the time that they take
    log.info("deterministic kernels alone, which may be slower: what they cost is not measured")


@contextmanager
def naming_what_is_not_deterministic() -> Iterator[None]:
    """Around a run: an operation without a deterministic kernel ends it with a sentence.

    Raises:
        InputError: naming the operation.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise InputError(
            f"engine.deterministic is set, but torch has no deterministic kernel of {found[1]} on "
            "this device, which this recipe needs; leave engine.deterministic out"
        ) from None
