"""Fixed position tables, and tables resampled to another grid or length."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ImagePositions = Literal["learned", "sincos", "sincos_bigvision", "sincos_moco"]
"""A learned table, or a fixed one: MAE's and FLIP's, big_vision's (frequencies end exactly at
1/10000), MoCo v3's (rows in the first half of the channels)."""


def sincos_table(
    grid: tuple[int, int], width: int, flavour: ImagePositions, *, class_row: bool = False
) -> Tensor:
    """A fixed table of sines and cosines, computed in float64.

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row;
    MoCo v3 has the row first (its reference indexes the grid as a matrix). Frequencies fall
    geometrically from 1 towards 1/10000, which big_vision reaches and the others do not.

    Args:
        grid: (rows, columns) of patches.
        width: channels, a multiple of 4.
        flavour: ``sincos`` (MAE, FLIP, MILAN), ``sincos_bigvision`` or ``sincos_moco``.
        class_row: put a row of zeros in front.

    Returns:
        ([1 +] N, D) float32, patches row by row.
    """
    if flavour not in ("sincos", "sincos_bigvision", "sincos_moco"):
        raise ValueError(f"{flavour!r} is no fixed position table")
    quarter = width // 4
    steps = quarter - 1 if flavour == "sincos_bigvision" else quarter
    exponent = torch.arange(quarter, dtype=torch.float64, device="cpu") / steps
    frequency = 10_000.0**-exponent  # (D / 4,)
    rows, columns = (torch.arange(side, dtype=torch.float64, device="cpu") for side in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    first, second = (row, column) if flavour == "sincos_moco" else (column, row)
    angles = [place.reshape(-1, 1) * frequency for place in (first, second)]  # (N, D / 4) each
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    if class_row:
        table = torch.cat([table.new_zeros(1, width), table])
    return table.to(torch.float32)


def resample_grid(
    table: Tensor,
    *,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """A learned image table on another grid; rows in front of the patches are copied.

    Bicubic: with antialiasing as in open_clip and CLIPA, without as in MAE; with aligned corners,
    and then without antialiasing, as in SWAG.

    Args:
        table: (..., [1 +] N, D) for ``old_grid``.
        old_grid: (rows, columns) of the table.
        new_grid: (rows, columns) of the result.
        antialias: whether shrinking averages.
        align_corners: whether the outer patches of both grids lie on each other.

    Returns:
        (..., [1 +] N', D) float32.
    """
    prefix = table.shape[-2] - old_grid[0] * old_grid[1]
    if prefix not in (0, 1):
        raise ValueError(
            f"a table of {table.shape[-2]} rows does not belong to a grid of "
            f"{old_grid[0]}x{old_grid[1]} patches"
        )
    flat = table.reshape(-1, *table.shape[-2:]).float()
    front, patches = flat[:, :prefix], flat[:, prefix:]
    picture = patches.transpose(1, 2).unflatten(2, old_grid)  # (1, D, rows, columns)
    picture = F.interpolate(
        picture,
        new_grid,
        mode="bicubic",
        align_corners=align_corners,
        antialias=antialias and not align_corners,
    )
    resampled = torch.cat([front, picture.flatten(2).transpose(1, 2)], dim=1)
    return resampled.reshape(*table.shape[:-2], *resampled.shape[1:])


def resample_length(
    table: Tensor, length: int, *, method: Literal["linear", "triangle"] = "linear"
) -> Tensor:
    """A text table of another length.

    Args:
        table: (..., T, D).
        length: slots of the result.
        method: ``linear`` as open_clip and CLIPA do in torch, without averaging when it shrinks;
            ``triangle`` as big_vision does, with it.

    Returns:
        (..., length, D) float32.
    """
    flat = table.reshape(-1, *table.shape[-2:]).float().transpose(1, 2)  # (1, D, T)
    if method == "linear":
        resampled = F.interpolate(flat, length, mode="linear", align_corners=False)
    else:
        resampled = flat @ _triangle_weights(flat.shape[2], length).to(flat).T
    return resampled.transpose(1, 2).reshape(*table.shape[:-2], length, table.shape[-1])


def _triangle_weights(old: int, new: int) -> Tensor:
    """(new, old) weights of a triangle filter that widens when the table shrinks."""
    scale = old / new
    center = (torch.arange(new, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = (center[:, None] - torch.arange(old, dtype=torch.float64)).abs()
    weights = (1 - distance / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
