"""Captions to vectors: tokens, positions, blocks, pooling, projection."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.models.attention import Layout, Packed
from frugal.common.models.blocks import Blocks, Picked
from frugal.common.models.config import TextTower


class TextTransformer(nn.Module):
    """A text transformer with learned positions."""

    def __init__(self, config: TextTower, embed_dim: int | None = None) -> None:
        """Parameters are uninitialized in effect; see :mod:`~frugal.common.models.initialize`.

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
        if self.config.packed:
            tokens, layout = self._embed_packed(token_ids, lengths, text_positions)
        else:
            positions = self.pos_embed[:, : token_ids.shape[1]]  # (1, T, D)
            if text_positions is not None:
                positions = F.embedding(text_positions, self.pos_embed[0])  # (B, T, D)
            tokens = self.token_embedding(token_ids) + positions
            key_lengths = lengths if self.config.pad_mask else None
            layout = Layout(causal=self.config.causal, key_lengths=key_lengths)
        picked = self._picked(token_ids, lengths, layout)
        tokens, _ = self.blocks(tokens, layout, picked=picked)
        pooled = self.norm(tokens)
        if picked is None:
            pooled = self._mean(pooled, lengths, layout)  # (B, D)
        return pooled if output == "pooled" else self.projection(pooled)

    def forward_pooled(self, token_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """(B, D): the pooled vector before the projection."""
        return self(token_ids, text_lengths, output="pooled")

    @property
    def checkpoint_activations(self) -> bool:
        """Whether every block is recomputed in the backward pass; set it to change that."""
        return self.blocks.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, wanted: bool) -> None:
        self.blocks.checkpoint_activations = wanted

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

    def _embed_packed(
        self, token_ids: Tensor, lengths: Tensor, text_positions: Tensor | None
    ) -> tuple[Tensor, Layout]:
        packed = Packed.of(lengths)
        stays = packed.sequence * token_ids.shape[1] + packed.place  # (total,)
        slots = packed.place if text_positions is None else text_positions.flatten()[stays]
        ids = token_ids.flatten()[stays]
        tokens = self.token_embedding(ids) + F.embedding(slots, self.pos_embed[0])
        return tokens, Layout(packed=packed, causal=self.config.causal)

    def _picked(self, token_ids: Tensor, lengths: Tensor, layout: Layout) -> Picked | None:
        """The token that the pooling reads, if it reads only one."""
        if self.config.pooling == "end_of_text":
            place = lengths - 1  # (B,)
        elif self.config.pooling == "first":
            place = torch.zeros_like(lengths)
        elif self.config.pooling == "last":
            place = torch.full_like(lengths, token_ids.shape[1] - 1)
        else:
            return None
        end = None
        if self.config.causal:
            end = place + 1
        if self.config.pad_mask or layout.packed is not None:
            end = lengths if end is None else torch.minimum(end, lengths)
        return Picked(place if layout.packed is None else place + layout.packed.starts, end)

    def _mean(self, tokens: Tensor, lengths: Tensor, layout: Layout) -> Tensor:
        """(B, D): over the caption, or over every slot."""
        if self.config.pooling == "mean_all":
            return tokens.mean(1)
        if layout.packed is not None:
            return layout.packed.pad(tokens).sum(1) / lengths[:, None]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inside = (places < lengths[:, None]).unsqueeze(2)  # (B, T, 1)
        return (tokens * inside).sum(1) / lengths[:, None]
