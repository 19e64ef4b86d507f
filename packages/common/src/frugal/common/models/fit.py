"""Whether named tensors are those of a model: which are missing, unknown or of another shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.models.in_words import some

_DEPTHS = frozenset({"depth", "layers", "num_hidden_layers", "num_layers", "n_layer"})
_WIDTHS = frozenset({"width", "hidden_size"})
_SIZES = frozenset(
    {
        *("width", "hidden_size", "mlp_ratio"),
        *("embed_dim", "mlp_width", "vocabulary", "vocab_size", "length", "context_length"),
        *("image_size", "patch_size", "heads", "head_width", "intermediate_size", "img_size"),
        *("max_position_embeddings", "num_attention_heads", "projection_dim", "num_heads"),
    }
)
"""What a model has at least as many numbers as."""
_FEW_TENSORS, _FEW_NUMBERS = 1_000, 1 << 27
"""What takes no time and memory to speak of, and is built whatever the weights are."""


def refuse_larger(
    settings: Mapping[str, Any], *, tensors: int, numbers: int, source: str | Path
) -> None:
    """Refuse to build a model of which a file of weights cannot hold every part.

    Settings of other people's are believed only as far as the weights bear them out: a depth of
    10**8 would be built for days, a width of 10**9 takes all memory.

    Args:
        settings: of one or several towers, by whatever library's names, nested.
        tensors: in the file of weights.
        numbers: in all of them.
        source: for messages.

    Raises:
        InputError: naming the setting.
    """
    numbers, tensors = max(numbers, _FEW_NUMBERS), max(tensors, _FEW_TENSORS)
    depth = width = 1.0
    for name, value in settings.items():
        parts = value if isinstance(value, list | tuple) else [value]
        sizes = [part for part in parts if isinstance(part, int | float)]
        if name in _DEPTHS:
            depth, is_too_large = sum(sizes), sum(sizes) > tensors
        else:
            is_too_large = name in _SIZES and any(size > numbers for size in sizes)
        width = max([width, *sizes]) if name in _WIDTHS else width
        if is_too_large or depth * width > numbers / width:
            raise InputError(
                f"{source} says that {name} is {str(value)[:40]}, but the weights are {tensors:,} "
                f"tensors of {numbers:,} numbers at most; copy both again"
            )
        for part in parts:
            if isinstance(part, Mapping):
                refuse_larger(part, tensors=tensors, numbers=numbers, source=source)


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
