"""First weights, drawn from a generator that is passed in.

What all towers share stands here; a tower draws the rest of its weights in its ``initialize``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from frugal.common.models.attention import Attention, QueryKeyValue
from frugal.common.models.blocks import Block, BlockConfig, Blocks, LayerScale

Initialization = Literal["flip", "open_clip"]
"""FLIP's and MAE's scheme: Xavier uniform matrices, zero biases, normal(0.02) tables. open_clip's:
OpenAI's for text, and mostly torch's defaults for images."""


def uniform(tensor: Tensor, limit: float, generator: torch.Generator) -> None:
    """Fill a tensor uniformly from -limit to limit."""
    tensor.uniform_(-limit, limit, generator=generator)


def normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a tensor from the normal distribution of mean 0."""
    tensor.normal_(0.0, std, generator=generator)


def _linear_xavier(layer: nn.Linear, generator: torch.Generator) -> None:
    rows, columns = layer.weight.shape
    uniform(layer.weight, math.sqrt(6 / (rows + columns)), generator)
    if layer.bias is not None:
        layer.bias.zero_()


def _linear_default(layer: nn.Linear, generator: torch.Generator) -> None:
    """As torch's own linear and convolution layers start."""
    limit = 1 / math.sqrt(layer.weight.shape[1])
    uniform(layer.weight, limit, generator)
    if layer.bias is not None:
        uniform(layer.bias, limit, generator)


def _reset_norms(module: nn.Module) -> None:
    """Set what is the same in every scheme: norms and layer scales."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.fill_(1)
            part.bias.zero_()
        elif isinstance(part, nn.BatchNorm1d):
            part.reset_parameters()
        elif isinstance(part, LayerScale):
            part.gamma.fill_(part.value)


@torch.no_grad()
def initialize_xavier(module: nn.Module, generator: torch.Generator) -> None:
    """Draw Xavier uniform matrices, with zero biases; norms and layer scales start as always.

    The fused projection of queries, keys and values counts as one matrix.
    """
    _reset_norms(module)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            _linear_xavier(part, generator)


@torch.no_grad()
def draw_layers(
    tower: nn.Module,
    projection: nn.Module,
    *,
    width: int,
    generator: torch.Generator,
    scheme: Initialization,
) -> None:
    """Draw the layers that all towers have: everything but tokens and tables.

    Args:
        tower: the whole.
        projection: its last layer; no ``nn.Linear`` where there is none.
        width: of the tower.
        generator: on the CPU.
        scheme: how.
    """
    if scheme == "flip":
        initialize_xavier(tower, generator)
        return
    _reset_norms(tower)
    for module in tower.modules():
        if isinstance(module, QueryKeyValue):
            _linear_xavier(module, generator)
        elif isinstance(module, nn.Linear):
            _linear_default(module, generator)
    for module in tower.modules():
        if isinstance(module, Attention):
            module.proj.bias.zero_()
    if isinstance(projection, nn.Linear):
        normal(projection.weight, width**-0.5, generator)


@torch.no_grad()
def shrink_residual_branches(
    blocks: Blocks, config: BlockConfig, generator: torch.Generator
) -> None:
    """Draw the blocks of open_clip's text tower, whose residual branches shrink with the depth.

    Source: Radford et al. (2021), section 2.5, as released.
    """
    width = config.width
    into_residual = (2 * config.depth * width) ** -0.5
    for block in cast("Iterable[Block]", blocks):
        normal(block.attn.qkv.weight, width**-0.5, generator)
        normal(block.attn.proj.weight, into_residual, generator)
        normal(block.mlp.fc1.weight, (2 * width) ** -0.5, generator)
        normal(block.mlp.fc2.weight, into_residual, generator)
