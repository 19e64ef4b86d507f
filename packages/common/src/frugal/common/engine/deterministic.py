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

_WORKSPACE, _ALGORITHM = "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"
"""Variables that cuBLAS and NCCL read."""
_WORKSPACES = (":4096:8", ":16:8")
"""With which cuBLAS is deterministic."""
_NCCL = re.compile(r"(\w+:)?(ring|tree)(,(ring|tree))*(;(\w+:)?(ring|tree)(,(ring|tree))*)*", re.I)
"""Values of that variable without NVLS and CollNet, which add in switches as data comes in."""


@contextmanager
def deterministic_kernels(log: logging.Logger, *, wanted: bool) -> Iterator[None]:
    """Around a run: this process computes with deterministic kernels, where that is wanted.

    It must not have computed anything before. Afterwards torch and the environment are as they
    were: what the process does next is not to be slower, or to fail, for a run that is over.

    Raises:
        InputError: if a variable of the environment asks for something else; or naming an operation
            that has no deterministic kernel.
    """
    if not wanted:
        yield
        return
    environment = {name: os.environ.get(name) for name in (_WORKSPACE, _ALGORITHM)}
    torch_had = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    try:
        with naming_what_is_not_deterministic():
            make_deterministic(log)
            yield
    finally:
        was_on, only_warns, torch.backends.cudnn.benchmark = torch_had
        torch.use_deterministic_algorithms(was_on, warn_only=only_warns)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)


def make_deterministic(log: logging.Logger) -> None:
    """Have this process compute with deterministic kernels from now on.

    Raises:
        InputError: if a variable of the environment asks for something else.
    """
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise InputError(
            f"engine.deterministic needs {_WORKSPACE} to be {' or '.join(_WORKSPACES)}, "
            f"but it is {workspace!r}; unset it"
        )
    algorithm = os.environ.setdefault(_ALGORITHM, "Ring")
    if not _NCCL.fullmatch(algorithm):
        raise InputError(
            f"engine.deterministic needs {_ALGORITHM} to name Ring and Tree alone, but it is "
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
