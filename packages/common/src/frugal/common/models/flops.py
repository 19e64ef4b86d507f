"""What a model costs, counted from its configuration: two operations per multiply-add.

Only matrix products count (patch embedding, the linear layers, attention, projections); norms,
activations and the look-up of tokens are left out, as is usual. Every block counts in full,
although towers that pool one token leave the others out of their last block.
"""

from __future__ import annotations

from typing import Any

from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower


def block_flops(tower: ImageTower | TextTower, tokens: float) -> float:
    """Forward FLOPs of one block on a sequence of ``tokens`` tokens."""
    attention = 4 * tower.width**2 + 2 * tokens * tower.width
    return 2 * tokens * (attention + 2 * tower.width * tower.mlp_width)


def image_flops(tower: ImageTower, patches: float) -> float:
    """Forward FLOPs of one image of which ``patches`` patches are kept."""
    tokens = patches + (tower.class_token != "none")
    embedding = 2 * patches * 3 * tower.patch_size**2 * tower.width
    return embedding + tower.depth * block_flops(tower, tokens)


def text_flops(tower: TextTower, tokens: float) -> float:
    """Forward FLOPs of one caption of which ``tokens`` slots are computed."""
    return tower.depth * block_flops(tower, tokens)


def dual_encoder_flops(config: DualEncoderConfig, *, patches: float, tokens: float) -> float:
    """Forward FLOPs of one pair."""
    towers = tower_flops(config.image, patches) + tower_flops(config.text, tokens)
    return towers + projection_flops(config)


def tower_flops(tower: Any, seen: float) -> float:
    """Forward FLOPs of a tower of any library, without what projects into the shared space.

    Args:
        tower: its configuration.
        seen: patches, or slots of a caption, that are computed.
    """
    if isinstance(tower, ImageTower):
        return image_flops(tower, seen) + projector_flops(tower)
    return text_flops(tower, seen) if isinstance(tower, TextTower) else tower.flops(seen)


def projector_flops(tower: ImageTower) -> float:
    """Forward FLOPs of the projector on one pooled vector; 0 where there is none."""
    if tower.projector_width is None:
        return 0.0
    hidden = tower.projector_width
    return 2.0 * hidden * (tower.width + hidden + tower.projector_outputs)


def projection_flops(config: DualEncoderConfig) -> float:
    """Forward FLOPs of both projections of one pair into the shared space."""
    width = config.head_width or config.embed_dim
    second = 0 if config.head_width is None else 2 * width * config.embed_dim
    return 2 * width * (config.image.pooled_width + config.text.width) + 2 * second
