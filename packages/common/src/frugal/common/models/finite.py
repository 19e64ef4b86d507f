"""Weights that are numbers: what is NaN, damaged or quantized is refused when it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from frugal.common.errors import InputError


def refuse_not_finite(state: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse weights with a NaN or an infinity; masks, which may hold infinities, are passed over.

    Refuse too what is no plain floating-point weight: converted to float, quantized numbers would
    be weights without their scale. Every number is read once and no tensor is made of their size.

    Raises:
        InputError: naming the first such tensor and how many there are.
    """
    for name, tensor in state.items():
        if kind := kind_of_no_weight(name, tensor):
            raise quantized(name, kind, source=source)
    if odd := [name for name, tensor in state.items() if not _is_finite(name, tensor)]:
        raise _refusal(odd, source)


def refuse_not_finite_parts(parts: Iterable[Tensor], name: str, *, source: str) -> None:
    """:func:`refuse_not_finite` for one tensor that is read in portions.

    Raises:
        InputError: naming it.
    """
    if not all(_is_finite(name, part) for part in parts):
        raise _refusal([name], source)


def kind_of_no_weight(name: str, tensor: Tensor) -> str | None:
    """What a tensor is in words where it is no weight that can be computed with; else None.

    Whole numbers are fine where they are tables of places or counts.
    """
    if tensor.is_meta:
        return "without its numbers"
    if tensor.is_quantized or tensor.is_complex():
        return "quantized" if tensor.is_quantized else "complex"
    if tensor.layout is not torch.strided:
        return "sparse"
    if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.ndim:
        return None
    is_weight = tensor.element_size() == 1 or name.rpartition(".")[2] in _WEIGHTS
    return "of whole numbers" if is_weight else None


_WEIGHTS = ("weight", "bias", "kernel", "scale")
"""Last parts of names of what is never a table of whole numbers."""


def quantized(name: str, kind: str, *, source: str) -> InputError:
    """The sentence for weights that are no floating-point numbers, to be raised."""
    return InputError(
        f"the weights of {source} are no floating-point numbers: {name} is {kind}; save them again "
        "in float32 or half precision, where they were quantized or pruned"
    )


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
