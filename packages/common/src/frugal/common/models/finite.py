"""Weights that are numbers: what was trained into NaN, or damaged, is refused when it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from frugal.common.errors import InputError


def refuse_not_finite(state: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse weights with a NaN or an infinity; masks, which may hold infinities, are passed over.

    Every number is read once and no tensor is made of their size.

    Raises:
        InputError: naming the first such tensor and how many there are.
    """
    if odd := [name for name, tensor in state.items() if not _is_finite(name, tensor)]:
        raise _refusal(odd, source)


def refuse_not_finite_parts(parts: Iterable[Tensor], name: str, *, source: str) -> None:
    """:func:`refuse_not_finite` for one tensor that is read in portions.

    Raises:
        InputError: naming it.
    """
    if not all(_is_finite(name, part) for part in parts):
        raise _refusal([name], source)


def _refusal(odd: list[str], source: str) -> InputError:
    more = f" and {len(odd) - 1} more tensors" if len(odd) > 1 else ""
    return InputError(
        f"the weights of {source} are not finite: there is NaN or infinity in {odd[0]}{more}; take "
        "an earlier checkpoint, or copy the file again"
    )


def _is_finite(name: str, tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or name.endswith("mask"):
        return True
    if tensor.element_size() == 1:  # torch compares no numbers of eight bits
        tensor = tensor.float()
    lowest, highest = torch.aminmax(tensor.detach())
    return bool(lowest.isfinite() and highest.isfinite())
