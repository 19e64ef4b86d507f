"""Images with what is seen of them, what matters in them, and how well the rest is predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from frugal.common.evaluation.pictures import Picture, as_array, gray_dropped, labeled_row
from frugal.common.models.vit import ImageTower
from frugal.common.reduction.image import KeptPatches
from frugal.milan.decoders import Split


def draw_reconstruction(
    images: Tensor,
    tower: ImageTower,
    split: Split,
    *,
    importance: Tensor | None,
    losses: Tensor,
    hidden_only: bool,
) -> Picture:
    """Rows of pictures under a line of text each.

    The images; what the encoder sees of them; where there is a teacher, the importance of every
    patch, from none (dark) to the most of the image (bright), and the cosine of predicted and
    wanted features, from 0 to 1; without one, the error of hidden patches.

    Args:
        images: (B, 3, H, W) uint8, or float that is normalized.
        tower: the encoder.
        split: what is seen.
        importance: (B, N), or None.
        losses: (B, T) of every predicted token, in the order of the decoder.
        hidden_only: only hidden patches were predicted.

    Returns:
        (3, H*, W*) uint8, for ``SummaryWriter.add_image``.
    """
    pictures = _as_bytes(as_array(images), tower)
    stays = KeptPatches.dense(split.visible).mask(tower.num_patches)
    rows = [
        labeled_row("images", pictures),
        labeled_row("seen", gray_dropped(pictures, stays, tower.patch_size)),
    ]
    if importance is not None:
        highest = importance.amax(dim=1, keepdim=True).clamp(min=1e-12)
        rows.append(labeled_row("importance", _map(importance / highest, tower)))
    patches = np.zeros((len(pictures), tower.num_patches), np.float32)
    losses = losses if hidden_only else losses[:, 1:]
    index = split.hidden if hidden_only else split.order[:, 1:] - 1
    np.put_along_axis(patches, as_array(index), as_array(losses.float()), axis=1)
    if importance is not None:
        label = f"cosine of predicted and wanted features, mean {1 - patches.mean() / 2:.2f}"
        rows.append(labeled_row(label, _map(1 - patches / 2, tower)))
    else:
        error = patches / max(float(patches.max()), 1e-12)
        rows.append(labeled_row("error of hidden patches", _map(error, tower)))
    return np.concatenate(rows, axis=1)


def _as_bytes(images: np.ndarray, tower: ImageTower) -> Picture:
    if images.dtype == np.uint8:
        return images
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (tower.mean, tower.std))
    return ((images * std + mean) * 255).round().clip(0, 255).astype(np.uint8)


def _map(values: Any, tower: ImageTower) -> Picture:
    """(B, N) numbers from 0 to 1 as (B, 3, H, W) colors, patch by patch."""
    import matplotlib as mpl

    colored = mpl.colormaps["viridis"](as_array(values).clip(0, 1))[..., :3]  # (B, N, 3)
    grid = colored.reshape(len(colored), *tower.grid, 3).transpose(0, 3, 1, 2)
    side = tower.patch_size
    return (grid.repeat(side, axis=2).repeat(side, axis=3) * 255).round().astype(np.uint8)
