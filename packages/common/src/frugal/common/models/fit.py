"""Whether named tensors are those of a model: which are missing, unknown or of another shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from frugal.common.models.in_words import some


def misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the tensors for a model that has these, by name and count; or None.

    Tensors of one number fit each other whatever their dimensions.
    """
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} has the shape {tuple(found[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in found
        and found[name].shape != tensor.shape
        and not found[name].numel() == tensor.numel() == 1
    ]
    what = []
    if missing:
        what.append(f"it lacks {some(missing)}")
    if unknown:
        what.append(f"it holds {some(unknown)} besides")
    if shapes:
        what.append(some(shapes, most=2))
    return ", ".join(what) or None
