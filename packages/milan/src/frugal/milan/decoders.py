"""From the tokens of the patches that were seen to a prediction for every token.

Attention does not care in which order its keys stand, and neither does a mean over tokens. So
tokens stay as they come, class token first, then the seen patches, then the hidden ones: nothing
is ever put back into the order of the image. The tests compare it with a decoder that does that
(``tests/reference/reference_milan.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frugal.common.errors import InputError
from frugal.common.models.attention import attend
from frugal.common.models.blocks import Blocks, Mlp
from frugal.common.models.layout import Layout
from frugal.common.models.vit import ImageTower, image_table
from frugal.common.ranges import Count, check_ranges
from frugal.common.reduction.image import KeptPatches


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What tells the target of every patch from the encoded ones; thrown away after pretraining."""

    kind: Literal["prompting", "plain"] = "prompting"
    """prompting: encoded tokens stay as they are and hidden ones gather from them (MILAN). plain:
    all tokens change in ordinary blocks (MAE)."""
    width: Count = 512
    depth: Count = 8
    """Blocks."""
    heads: Count = 16

    def __post_init__(self) -> None:
        check_ranges(self, "model.decoder")

    def tower(self, image: ImageTower) -> ImageTower:
        """The shape of the decoder's blocks and positions, on the grid of an encoder.

        Raises:
            InputError: if there is no such decoder.
        """
        try:
            return ImageTower(
                width=self.width,
                depth=self.depth,
                heads=self.heads,
                mlp_width=4 * self.width,
                patch_size=image.patch_size,
                image_size=image.image_size,
                positions="sincos",
                norm_epsilon=image.norm_epsilon,
            )
        except InputError as error:
            raise InputError(str(error).replace("image.", "model.decoder.")) from None


@dataclass(frozen=True)
class Split:
    """Which patches of every image are seen and which are hidden."""

    visible: Tensor
    """(B, K) patch numbers, in any order."""
    hidden: Tensor
    """(B, M) the others."""

    @classmethod
    def of(cls, kept: KeptPatches, num_patches: int) -> Split:
        """From what an image reduction keeps, equally many of every image."""
        if kept.is_packed:
            raise ValueError("a split needs equally many patches of every image")
        # what stays sorts behind what goes; nothing is read on the host
        order = kept.mask(num_patches).byte().argsort(dim=1, stable=True)
        return cls(kept.index, order[:, : num_patches - kept.index.shape[1]])

    @property
    def order(self) -> Tensor:
        """(B, 1 + N) rows of a table with the class token's first, as the decoder has tokens."""
        first = self.visible.new_zeros((len(self.visible), 1))
        return torch.cat((first, self.visible + 1, self.hidden + 1), dim=1)


class Decoder(nn.Module):
    """What both kinds of decoder share: tokens with positions in, predictions out."""

    pos_embed: Tensor

    def __init__(self, tower: ImageTower, *, inputs: int, outputs: int) -> None:
        """Parameters are uninitialized in effect; see :func:`frugal.milan.model.build`.

        Args:
            tower: shape of the blocks, and the grid.
            inputs: width of the encoder.
            outputs: numbers predicted for every token.
        """
        super().__init__()
        self.tower = tower
        self.embed = nn.Linear(inputs, tower.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, tower.width))
        self.register_buffer("pos_embed", image_table(tower), persistent=False)
        self.norm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.head = nn.Linear(tower.width, outputs)
        self.checkpoint_activations = False
        """Recompute every block in the backward pass instead of storing what is inside."""

    def forward(self, latent: Tensor, split: Split, *, hidden_only: bool = False) -> Tensor:
        """Predict.

        Args:
            latent: (B, 1 + K, D) from the encoder, class token first.
            split: which patches these tokens belong to, and which are missing.
            hidden_only: leave out class token and seen patches.

        Returns:
            (B, 1 + K + M, outputs) for the class token, the seen and the hidden patches, or
            (B, M, outputs).
        """
        positions = F.embedding(split.order, self.pos_embed[0])  # (B, 1 + N, E)
        encoded = latent.shape[1]
        fixed = self.embed(latent) + positions[:, :encoded]
        hidden = self.mask_token + positions[:, encoded:]
        fixed, hidden = self.mix(fixed, hidden)
        tokens = hidden if hidden_only else torch.cat((fixed, hidden.to(fixed.dtype)), dim=1)
        return self.head(self.norm(tokens))

    @abstractmethod
    def mix(self, fixed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + K, E) and (B, M, E) to the same, after all blocks."""


class PlainDecoder(Decoder):
    """MAE's: encoded and hidden tokens go through ordinary blocks together."""

    def __init__(self, tower: ImageTower, *, inputs: int, outputs: int) -> None:
        super().__init__(tower, inputs=inputs, outputs=outputs)
        self.blocks = Blocks(tower)

    def mix(self, fixed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + K, E) and (B, M, E) to the same, after all blocks."""
        self.blocks.checkpoint_activations = self.checkpoint_activations
        tokens = torch.cat((fixed, hidden.to(fixed.dtype)), dim=1)  # (B, 1 + N, E)
        tokens, _ = self.blocks(tokens, Layout())
        return tokens[:, : fixed.shape[1]], tokens[:, fixed.shape[1] :]


class PromptingBlock(nn.Module):
    """Hidden tokens gather from all tokens; the others stay as they are."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.heads = tower.heads
        self.norm1 = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.query = nn.Linear(tower.width, tower.width)
        self.proj = nn.Linear(tower.width, tower.width)
        self.norm2 = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.mlp = Mlp(tower.width, tower.mlp_width, tower.activation)

    def forward(self, hidden: Tensor, fixed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One block.

        Args:
            hidden: (B, M, E).
            fixed: (B, 1 + K, 2 E) keys and values of the tokens that stay as they are.
            weight: (2 E, E) from tokens to keys and values.
            bias: (2 E,)

        Returns:
            (B, M, E).
        """
        normed = self.norm1(hidden)
        both = torch.cat((fixed, F.linear(normed, weight, bias)), dim=1)  # (B, 1 + N, 2 E)
        query, key, value = (
            item.unflatten(-1, (self.heads, -1))
            for item in (self.query(normed), *both.chunk(2, dim=-1))
        )  # (B, M or 1 + N, H, C)
        hidden = hidden + self.proj(attend(query, key, value, Layout()).flatten(-2))
        return hidden + self.mlp(self.norm2(hidden))


class PromptingDecoder(Decoder):
    """MILAN's: the encoded tokens are a prompt that no block changes (arXiv:2208.06049, 3.2).

    Their keys and values, of which every block has its own, come from the same tokens, without a
    norm: one product makes those of all blocks. Its weights belong to the decoder as a whole for
    that reason, and not to the blocks.
    """

    def __init__(self, tower: ImageTower, *, inputs: int, outputs: int) -> None:
        super().__init__(tower, inputs=inputs, outputs=outputs)
        self.kv_weight = nn.Parameter(torch.zeros(tower.depth, 2 * tower.width, tower.width))
        self.kv_bias = nn.Parameter(torch.zeros(tower.depth, 2 * tower.width))
        self.blocks = nn.ModuleList(PromptingBlock(tower) for _ in range(tower.depth))

    def mix(self, fixed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + K, E) as it is, and (B, M, E) after all blocks."""
        bias = self.without_key_gradient(self.kv_bias)
        made = F.linear(fixed, self.kv_weight.flatten(0, 1), bias.flatten())
        made = made.unflatten(-1, bias.shape)  # (B, 1 + K, blocks, 2 E)
        parts = zip(made.unbind(2), self.kv_weight.unbind(), bias.unbind(), strict=True)
        for block, part in zip(cast("Iterable[PromptingBlock]", self.blocks), parts, strict=True):
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                hidden = checkpoint(
                    block, hidden, *part, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = block(hidden, *part)
        return fixed, hidden

    @staticmethod
    def without_key_gradient(bias: Tensor) -> Tensor:
        """(..., 2 E) the same; see :class:`~frugal.common.models.attention.QueryKeyValue`."""
        key, value = bias.chunk(2, dim=-1)
        return torch.cat((key.detach(), value), dim=-1)
