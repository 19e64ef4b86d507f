"""Pre-norm transformer blocks over dense or packed tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frugal.common.errors import InputError
from frugal.common.models.attention import Attention
from frugal.common.models.layout import Layout, PooledToken
from frugal.common.ranges import check_choices, check_ranges

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""Exact GELU, its tanh approximation, or x * sigmoid(1.702 x)."""


class BlockConfig(Protocol):
    """What a stack of blocks needs to know: a part of the configuration of every tower."""

    @property
    def width(self) -> int:
        """Channels of a token."""
        ...

    @property
    def depth(self) -> int:
        """Blocks."""
        ...

    @property
    def heads(self) -> int:
        """Attention heads; they divide the width."""
        ...

    @property
    def mlp_width(self) -> int:
        """Channels inside of the MLP."""
        ...

    @property
    def activation(self) -> Activation:
        """The MLP's."""
        ...

    @property
    def norm_epsilon(self) -> float:
        """Added to the variance in every norm."""
        ...

    @property
    def drop_path(self) -> float:
        """Stochastic depth of the last block; it grows linearly from 0 at the first."""
        ...

    @property
    def layer_scale(self) -> float | None:
        """First value of the layer scales; without it there are none."""
        ...


def check_block_config(tower: BlockConfig, part: str) -> None:
    """Refuse a tower of impossible numbers or choices.

    Args:
        tower: its configuration, a dataclass.
        part: its name on the command line, such as ``image``.

    Raises:
        InputError: naming the field, its value and what is allowed.
    """
    check_ranges(tower, part)
    if tower.width % tower.heads:
        raise InputError(
            f"{part}.width {tower.width} does not divide among {part}.heads = {tower.heads}; "
            "choose a multiple"
        )
    check_choices(tower, part)


def activate(hidden: Tensor, kind: Activation) -> Tensor:
    """Elementwise activation of the MLP."""
    if kind == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate="tanh" if kind == "gelu_tanh" else "none")


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scaled tokens, same shape."""
        return tokens * self.gamma


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(activate(self.fc1(tokens), self.activation))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, tower: BlockConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.attn = Attention(tower.width, tower.heads)
        self.ls1 = self._scale(tower)
        self.norm2 = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.mlp = Mlp(tower.width, tower.mlp_width, tower.activation)
        self.ls2 = self._scale(tower)

    @staticmethod
    def _scale(tower: BlockConfig) -> nn.Module:
        if tower.layer_scale is None:
            return nn.Identity()
        return LayerScale(tower.width, tower.layer_scale)

    def forward(self, tokens: Tensor, layout: Layout, pooled: PooledToken | None = None) -> Tensor:
        """(B, L, D) or (T, D), as the layout says, to the same shape.

        With ``pooled``, only that token of every sequence is computed: (B, D).
        """
        if pooled is None:
            branch = self.attn(self.norm1(tokens), layout)
        else:
            # keys and values need the norm of every token, all else only the one that is read
            normed = self.norm1(tokens)
            tokens, token = pooled.take(tokens), pooled.take(normed)  # (B, D) each
            branch = self.attn.forward_pooled_token(normed, token, layout, pooled.attended)
            layout = Layout()  # from here on one token of every sequence, which is dense
        tokens = tokens + self._drop(self.ls1(branch), layout)
        return tokens + self._drop(self.ls2(self.mlp(self.norm2(tokens))), layout)

    def _drop(self, branch: Tensor, layout: Layout) -> Tensor:
        """Stochastic depth: a whole sequence skips the branch (Huang et al., 2016)."""
        if self.drop_path == 0 or not self.training:
            return branch
        # one draw for a sequence in either layout, so that packing changes no number
        draws = torch.rand(layout.num_sequences(branch), device=branch.device)  # (B,)
        factor = (draws >= self.drop_path).to(branch.dtype) / (1 - self.drop_path)
        return branch * layout.per_sequence(factor, branch)


class Blocks(nn.ModuleList):
    """A stack of blocks."""

    def __init__(self, tower: BlockConfig) -> None:
        last = max(tower.depth - 1, 1)
        super().__init__(Block(tower, tower.drop_path * i / last) for i in range(tower.depth))
        self.checkpoint_activations = False
        """Recompute every block in the backward pass instead of storing what is inside."""

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        pooled: PooledToken | None = None,
        outputs_of: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Run every block.

        Args:
            tokens: (B, L, D) or (T, D), as the layout says.
            layout: boundaries and masks.
            pooled: the last block computes only this token of every sequence.
            outputs_of: numbers of the blocks whose output is returned too, from 0.

        Returns:
            The output of the last block, (B, D) where one token is pooled, and the outputs of the
            blocks ``outputs_of``, in the order of the stack.
        """
        outputs = []
        for number, block in enumerate(cast("Iterable[Block]", self)):
            # earlier blocks compute every token: the last one attends to all of them
            token = pooled if number == len(self) - 1 else None
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                tokens = checkpoint(
                    block,
                    tokens,
                    layout,
                    token,
                    use_reentrant=False,
                    # reading the state of the generator waits for a GPU, and only drop path draws
                    preserve_rng_state=block.drop_path > 0,
                )
            else:
                tokens = block(tokens, layout, token)
            if number in outputs_of:
                outputs.append(tokens)
        return tokens, outputs
