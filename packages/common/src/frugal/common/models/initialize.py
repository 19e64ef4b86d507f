"""First weights, drawn from a generator that is passed in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from frugal.common.models.attention import QueryKeyValue
from frugal.common.models.blocks import Block, LayerScale
from frugal.common.models.positions import image_table
from frugal.common.models.text import TextTransformer
from frugal.common.models.vit import ImageTransformer


def _uniform(tensor: Tensor, limit: float, generator: torch.Generator) -> None:
    tensor.uniform_(-limit, limit, generator=generator)


def _normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    tensor.normal_(0.0, std, generator=generator)


def _linear_xavier(layer: nn.Linear, generator: torch.Generator) -> None:
    rows, columns = layer.weight.shape
    _uniform(layer.weight, math.sqrt(6 / (rows + columns)), generator)
    if layer.bias is not None:
        layer.bias.zero_()


def _linear_default(layer: nn.Linear, generator: torch.Generator) -> None:
    """As torch's own linear and convolution layers start."""
    limit = 1 / math.sqrt(layer.weight.shape[1])
    _uniform(layer.weight, limit, generator)
    if layer.bias is not None:
        _uniform(layer.bias, limit, generator)


def _start_fixed_parts(tower: nn.Module) -> None:
    """What is the same in every scheme: norms, layer scales, fixed tables."""
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        elif isinstance(module, nn.BatchNorm1d):
            module.reset_parameters()
        elif isinstance(module, LayerScale):
            module.gamma.fill_(module.value)
        elif isinstance(module, ImageTransformer) and module.config.positions != "learned":
            module.pos_embed.copy_(image_table(module.config))


@torch.no_grad()
def initialize_xavier(module: nn.Module, generator: torch.Generator) -> None:
    """Xavier uniform matrices and zero biases; norms, layer scales and fixed tables as always.

    The fused projection of queries, keys and values counts as one matrix.
    """
    _start_fixed_parts(module)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            _linear_xavier(part, generator)


@torch.no_grad()
def initialize_flip(tower: ImageTransformer | TextTransformer, generator: torch.Generator) -> None:
    """FLIP's and MAE's scheme: Xavier uniform matrices, zero biases, normal(0.02) tables."""
    initialize_xavier(tower, generator)
    if isinstance(tower, TextTransformer):
        _normal(tower.token_embedding.weight, 0.02, generator)
        _normal(tower.pos_embed, 0.02, generator)
        return
    if tower.config.class_token != "none":
        _normal(tower.cls_token, 0.02, generator)
    if tower.config.positions == "learned":
        _normal(tower.pos_embed, 0.02, generator)


@torch.no_grad()
def initialize_open_clip(
    tower: ImageTransformer | TextTransformer, generator: torch.Generator
) -> None:
    """open_clip's scheme, which is OpenAI's for text and mostly torch's defaults for images."""
    _start_fixed_parts(tower)
    width, depth = tower.config.width, tower.config.depth
    for module in tower.modules():
        if isinstance(module, QueryKeyValue):
            _linear_xavier(module, generator)
        elif isinstance(module, nn.Linear):
            _linear_default(module, generator)
    blocks = cast("Iterable[Block]", tower.blocks)
    for block in blocks:
        block.attn.proj.bias.zero_()
    if isinstance(tower.projection, nn.Linear):
        _normal(tower.projection.weight, width**-0.5, generator)
    if isinstance(tower, ImageTransformer):
        if tower.config.class_token != "none":
            _normal(tower.cls_token, width**-0.5, generator)
        if tower.config.positions == "learned":
            _normal(tower.pos_embed, width**-0.5, generator)
        return
    _normal(tower.token_embedding.weight, 0.02, generator)
    _normal(tower.pos_embed, 0.01, generator)
    for block in blocks:
        _initialize_text_block(block, width, depth, generator)


def _initialize_text_block(
    block: Block, width: int, depth: int, generator: torch.Generator
) -> None:
    """Radford et al. (2021), section 2.5, as released: residual branches shrink with depth."""
    into_residual = (2 * depth * width) ** -0.5
    _normal(block.attn.qkv.weight, width**-0.5, generator)
    _normal(block.attn.proj.weight, into_residual, generator)
    _normal(block.mlp.fc1.weight, (2 * width) ** -0.5, generator)
    _normal(block.mlp.fc2.weight, into_residual, generator)
