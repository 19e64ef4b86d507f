"""Pre-norm transformer blocks over dense or packed tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frugal.common.models.attention import Attention, Layout
from frugal.common.models.config import Activation, ImageTower, TextTower


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


@dataclass(frozen=True)
class Picked:
    """The one token of every sequence that the pooling reads."""

    index: Tensor
    """(B,) its place in its sequence; in packed tokens, its place among all of them."""
    end: Tensor | None
    """(B,) how many tokens it sees, from the first of its sequence on; None: all, dense only."""

    def take(self, tokens: Tensor) -> Tensor:
        """(B, L, D) or packed (T, D) to (B, D)."""
        if tokens.ndim == 2:
            return tokens.index_select(0, self.index)
        return tokens[torch.arange(len(tokens), device=tokens.device), self.index]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, tower: ImageTower | TextTower, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.attn = Attention(tower.width, tower.heads)
        self.ls1 = self._scale(tower)
        self.norm2 = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.mlp = Mlp(tower.width, tower.mlp_width, tower.activation)
        self.ls2 = self._scale(tower)

    @staticmethod
    def _scale(tower: ImageTower | TextTower) -> nn.Module:
        if tower.layer_scale is None:
            return nn.Identity()
        return LayerScale(tower.width, tower.layer_scale)

    def forward(self, tokens: Tensor, layout: Layout, picked: Picked | None = None) -> Tensor:
        """(B, L, D) or (T, D), as the layout says, to the same shape.

        With ``picked``, only that token of every sequence is computed: (B, D).
        """
        if picked is None:
            branch = self.attn(self.norm1(tokens), layout)
        else:
            normed = self.norm1(tokens)
            tokens, one = picked.take(tokens), picked.take(normed)  # (B, D) each
            branch = self.attn.forward_picked(normed, one, layout, picked.end)
            layout = Layout()
        tokens = tokens + self._drop(self.ls1(branch), layout)
        return tokens + self._drop(self.ls2(self.mlp(self.norm2(tokens))), layout)

    def _drop(self, branch: Tensor, layout: Layout) -> Tensor:
        """Stochastic depth: a whole sequence skips the branch (Huang et al., 2016)."""
        if self.drop_path == 0 or not self.training:
            return branch
        packed = layout.packed
        sequences = len(branch) if packed is None else len(packed.lengths_list)
        stays = torch.rand(sequences, device=branch.device) >= self.drop_path  # (B,)
        factor = stays.to(branch.dtype) / (1 - self.drop_path)
        if packed is not None:
            return branch * factor[packed.sequence, None]
        return branch * factor.view(-1, *[1] * (branch.ndim - 1))


class Blocks(nn.ModuleList):
    """A stack of blocks."""

    def __init__(self, tower: ImageTower | TextTower) -> None:
        last = max(tower.depth - 1, 1)
        super().__init__(Block(tower, tower.drop_path * i / last) for i in range(tower.depth))
        self.checkpoint_activations = False
        """Recompute every block in the backward pass instead of storing what is inside."""

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        picked: Picked | None = None,
        outputs_of: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Run every block.

        Args:
            tokens: (B, L, D) or (T, D), as the layout says.
            layout: boundaries and masks.
            picked: the last block computes only this token of every sequence.
            outputs_of: numbers of blocks whose output is wanted too.

        Returns:
            The output of the last block, (B, D) where one token was picked, and those of the
            blocks asked for, in the order of the stack.
        """
        outputs = []
        for number, block in enumerate(cast("Iterable[Block]", self)):
            one = picked if number == len(self) - 1 else None
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                tokens = checkpoint(
                    block,
                    tokens,
                    layout,
                    one,
                    use_reentrant=False,
                    preserve_rng_state=block.drop_path > 0,
                )
            else:
                tokens = block(tokens, layout, one)
            if number in outputs_of:
                outputs.append(tokens)
        return tokens, outputs
