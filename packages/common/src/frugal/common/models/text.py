"""The text transformer: its configuration, and captions to vectors.

Tokens are looked up and get their positions, then come the blocks, the pooling and the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.models.blocks import Activation, Blocks, check_block_config
from frugal.common.models.initialize import (
    Initialization,
    draw_layers,
    normal,
    shrink_residual_branches,
)
from frugal.common.models.layout import Layout, Packed, PooledToken
from frugal.common.ranges import Count, CountOrZero, NotNegative, Positive, ShareBelowOne

TextPooling = Literal["first", "last", "end_of_text", "mean", "mean_all"]
"""The first slot, the last slot (padding included), the end-of-text token, the mean of the
caption, or the mean of every slot (padding included)."""

CLIP_VOCABULARY = 49_408


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """A text transformer with learned positions."""

    width: Count
    depth: Count
    """Blocks."""
    heads: Count
    mlp_width: Count
    vocabulary: Count = CLIP_VOCABULARY
    """Rows of the token table."""
    length: Count = 77
    """Most tokens of a caption, special tokens included."""
    pad_id: CountOrZero = 0
    causal: bool = True
    """A token sees itself and what stands before it."""
    pad_mask: bool = False
    """No token sees padding."""
    activation: Activation = "gelu"
    norm_epsilon: Positive = 1e-5
    pooling: TextPooling = "end_of_text"
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    layer_scale: NotNegative | None = None
    """First value of the layer scales; without it there are none."""
    packed: bool = False
    """Compute captions without their padding; the numbers stay."""

    def __post_init__(self) -> None:
        check_block_config(self, "text")
        if self.pad_id >= self.vocabulary:
            raise InputError(f"text.pad_id {self.pad_id} is outside of the vocabulary")
        if self.packed and self.padding_matters:
            raise InputError(
                "model.text.packed leaves the padding out, but here it changes the result "
                f"(model.text.causal={self.causal}, model.text.pad_mask={self.pad_mask}, "
                f"model.text.pooling={self.pooling}); add --model.text.pad-mask, or "
                "--model.text.no-packed"
            )

    @property
    def padding_matters(self) -> bool:
        """Whether the slots behind a caption change its vector."""
        return self.pooling in ("last", "mean_all") or not (self.causal or self.pad_mask)

    def module(self, embed_dim: int | None = None) -> TextTransformer:
        """The tower; its weights are yet to be drawn."""
        return TextTransformer(self, embed_dim)


class TextTransformer(nn.Module):
    """A text transformer with learned positions."""

    def __init__(self, config: TextTower, embed_dim: int | None = None) -> None:
        """Build the layers; :meth:`initialize` draws their weights.

        Args:
            config: shape and options.
            embed_dim: width that the pooled vector is projected to; None for no projection.
        """
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.length, config.width))
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.projection = (
            nn.Identity() if embed_dim is None else nn.Linear(config.width, embed_dim, bias=False)
        )

    def forward(
        self,
        token_ids: Tensor,
        text_lengths: Tensor | None = None,
        text_positions: Tensor | None = None,
        *,
        output: Literal["embedding", "pooled"] = "embedding",
    ) -> Tensor:
        """Run the tower.

        Args:
            token_ids: (B, T) int64, padded on the right, T at most the tower's length.
            text_lengths: (B,) tokens before the padding. Without them the end-of-text token is
                the highest id of a caption, as in CLIP's vocabulary; elsewhere padding is what
                stands behind the last id that is not the padding's.
            text_positions: (B, T) slots of the tower that the tokens, padding included, stand in,
                ascending. The tower sees these slots and no others, and pools the first or last
                of them where it pools the first or last slot. Without them: the first slots.
            output: ``embedding``, the pooled and projected vector; ``pooled``, the same before
                the projection.

        Returns:
            (B, E) or (B, D).
        """
        token_ids = self._checked(token_ids, text_positions)
        lengths = self._lengths(token_ids, text_lengths)
        packed = Packed.of(lengths) if self.config.packed else None
        return self._encode(token_ids, lengths, text_positions, packed, output)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` the tower, but for the one read of packed tokens; options are its."""
        self._encode = torch.compile(self._encode, *args, **kwargs)  # type: ignore[method-assign]

    def _encode(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        text_positions: Tensor | None,
        packed: Packed | None,
        output: str,
    ) -> Tensor:
        tokens, layout = self._embed(token_ids, lengths, text_positions, packed)
        pooled_token = self._pooled_token(token_ids, lengths, layout)
        tokens, _ = self.blocks(tokens, layout, pooled=pooled_token)
        pooled = self.norm(tokens)
        if pooled_token is None:
            within = None if self.config.pooling == "mean_all" else lengths
            pooled = layout.mean(pooled, within)  # (B, D)
        return pooled if output == "pooled" else self.projection(pooled)

    def forward_pooled(self, token_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """(B, D): the pooled vector before the projection."""
        return self(token_ids, text_lengths, output="pooled")

    @property
    def checkpoint_activations(self) -> bool:
        """Whether every block is recomputed in the backward pass; set it to change that."""
        return self.blocks.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, enabled: bool) -> None:
        self.blocks.checkpoint_activations = enabled

    @torch.no_grad()
    def initialize(self, generator: torch.Generator, scheme: Initialization = "open_clip") -> None:
        """Draw every weight afresh."""
        width = self.config.width
        draw_layers(self, self.projection, width=width, generator=generator, scheme=scheme)
        normal(self.token_embedding.weight, 0.02, generator)
        normal(self.pos_embed, 0.02 if scheme == "flip" else 0.01, generator)
        if scheme == "open_clip":
            shrink_residual_branches(self.blocks, self.config, generator)

    def _checked(self, token_ids: Tensor, text_positions: Tensor | None) -> Tensor:
        width, length = token_ids.shape[1], self.config.length
        if text_positions is not None and text_positions.shape != token_ids.shape:
            raise ValueError(
                f"there are {tuple(text_positions.shape)} positions for {tuple(token_ids.shape)} "
                "tokens; every token has one"
            )
        if width > length:
            raise InputError(
                f"captions of {width} tokens reached a text tower of {length}; set "
                "model.text.length to the tokens of the longest caption"
            )
        if width < length and self.config.padding_matters and text_positions is None:
            # the tower was trained on captions that always fill every slot
            return F.pad(token_ids, (0, length - width), value=self.config.pad_id)
        return token_ids

    def _lengths(self, token_ids: Tensor, text_lengths: Tensor | None) -> Tensor:
        """(B,) between 1 and T: a damaged sample has no token, yet its row must stay finite."""
        if text_lengths is None and self.config.pooling == "end_of_text":
            text_lengths = token_ids.argmax(1) + 1
        elif text_lengths is None:
            places = torch.arange(1, token_ids.shape[1] + 1, device=token_ids.device)
            text_lengths = (places * (token_ids != self.config.pad_id)).amax(1)
        return text_lengths.clamp(1, token_ids.shape[1])

    def _embed(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        text_positions: Tensor | None,
        packed: Packed | None,
    ) -> tuple[Tensor, Layout]:
        """(B, T, D) or packed tokens with their positions, and how they lie."""
        config, slots = self.config, text_positions
        if packed is not None:
            stays = packed.sequence * token_ids.shape[1] + packed.place  # (sum of lengths,)
            token_ids = token_ids.flatten()[stays]
            slots = packed.place if slots is None else slots.flatten()[stays]
            layout = Layout(packed=packed, causal=config.causal)
        else:
            key_lengths = lengths if config.pad_mask else None
            layout = Layout(causal=config.causal, key_lengths=key_lengths)
        # a slice of the table where it will do: its gradient is a sum, not a scattered one
        positions = (
            self.pos_embed[:, : token_ids.shape[1]]
            if slots is None
            else F.embedding(slots, self.pos_embed[0])
        )
        return self.token_embedding(token_ids) + positions, layout

    def _pooled_token(
        self, token_ids: Tensor, lengths: Tensor, layout: Layout
    ) -> PooledToken | None:
        """The token that the pooling reads, if it reads only one."""
        if self.config.pooling == "end_of_text":
            place = lengths - 1  # (B,)
        elif self.config.pooling == "first":
            place = torch.zeros_like(lengths)
        elif self.config.pooling == "last":
            place = torch.full_like(lengths, token_ids.shape[1] - 1)
        else:
            return None
        attended = place + 1 if self.config.causal else None
        if self.config.pad_mask:
            attended = lengths if attended is None else torch.minimum(attended, lengths)
        return layout.pooled_token(place, attended)
