"""How tokens lie in memory: dense (B, L, D), or packed (T, D) with the sequences' boundaries.

Everything that differs between the two layouts stands here and in :func:`.attention.attend`, so
that a tower is written once for both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # a type of xformers, which takes longer to import than torch
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask


@dataclass(frozen=True)
class Packed:
    """Sequences of different lengths, laid one after another without padding."""

    lengths: Tensor
    """(B,) int64 tokens per sequence."""
    longest: int
    """Tokens of the longest sequence."""
    sequence: Tensor
    """(T,) the sequence that each token belongs to."""
    place: Tensor
    """(T,) the place of each token in its sequence."""
    slot: Tensor
    """(T,) the row of each token where sequences are padded to the longest, one after another."""
    lengths_list: tuple[int, ...]
    """``lengths`` on the host. Nothing that is compiled may ask for them: it would be compiled anew
    for every batch."""

    @classmethod
    def of(cls, lengths: Tensor) -> Packed:
        """The layout for these lengths; waits for the device once, to know them on the host.

        Towers call it before what is compiled of them, which no number of the device may interrupt.
        """
        # Shapes are numbers of the host: the only wait for the device of a whole packed forward
        # pass is this one, before the blocks have anything to do.
        on_host = tuple(lengths.tolist())
        numbers = torch.arange(len(on_host), device=lengths.device)
        # without output_size, repeat_interleave would wait a second time for its own sum
        sequence = numbers.repeat_interleave(lengths, output_size=sum(on_host))  # (T,)
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(sequence), device=lengths.device) - starts[sequence]
        longest = max(on_host)
        return cls(lengths, longest, sequence, place, sequence * longest + place, on_host)

    @property
    def starts(self) -> Tensor:
        """(B,) the first token of every sequence."""
        return self.lengths.cumsum(0) - self.lengths

    def pad(self, tokens: Tensor) -> Tensor:
        """(T, ...) to (B, longest, ...), zeros behind every sequence."""
        padded = tokens.new_zeros(len(self.lengths) * self.longest, *tokens.shape[1:])
        # whole rows by one flat index: a boolean mask would have to be counted on the host
        padded = padded.index_copy(0, self.slot, tokens)
        return padded.unflatten(0, (-1, self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, longest, ...) to (T, ...)."""
        return padded.flatten(0, 1).index_select(0, self.slot)

    @functools.cached_property
    def block_diagonal(self) -> BlockDiagonalMask:
        """The boundaries as xformers takes them; made once and used by every block."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        # xformers refuses empty sequences; as they have no token, nobody misses them
        lengths = [length for length in self.lengths_list if length > 0]
        return BlockDiagonalMask.from_seqlens(lengths, device=self.lengths.device)


@dataclass(frozen=True)
class PooledToken:
    """The one token of every sequence that the pooling reads.

    Where a tower pools one token, its last block computes that token alone.
    """

    index: Tensor
    """(B,) its place in its sequence; in packed tokens, its place among all of them."""
    attended: Tensor | None
    """(B,) how many tokens it attends to, from the first of its sequence on; None: all of them,
    which only dense tokens may have."""

    def take(self, tokens: Tensor) -> Tensor:
        """(B, L, D) or packed (T, D) to (B, D)."""
        if tokens.ndim == 2:
            return tokens.index_select(0, self.index)
        return tokens[torch.arange(len(tokens), device=tokens.device), self.index]


@dataclass(frozen=True)
class Layout:
    """How tokens lie in memory, and which of them attend to each other."""

    packed: Packed | None = None
    """Boundaries of packed tokens (T, D); without them tokens are dense (B, L, D)."""
    causal: bool = False
    """A token attends to itself and to what stands before it."""
    key_lengths: Tensor | None = None
    """(B,) dense only: tokens from this place on are padding, to which nobody attends."""

    def pooled_token(self, place: Tensor, attended: Tensor | None) -> PooledToken:
        """The token at some (B,) place of every sequence, which attends to so many tokens."""
        if self.packed is None:
            return PooledToken(place, attended)
        # the keys are padded to the longest sequence, so even a token that attends to its whole
        # sequence needs a limit
        lengths = self.packed.lengths
        attended = lengths if attended is None else torch.minimum(attended, lengths)
        return PooledToken(place + self.packed.starts, attended)

    def per_sequence(self, values: Tensor, tokens: Tensor) -> Tensor:
        """(B,) numbers of the sequences in a shape that multiplies their tokens.

        Args:
            values: (B,).
            tokens: (B, ...) or (T, D).
        """
        if self.packed is not None:
            return values[self.packed.sequence, None]  # (T, 1)
        return values.view(-1, *[1] * (tokens.ndim - 1))

    def num_sequences(self, tokens: Tensor) -> int:
        """B of (B, ...) or (T, D) tokens."""
        return len(tokens) if self.packed is None else len(self.packed.lengths)

    def mean(self, tokens: Tensor, lengths: Tensor | None = None, *, skip: int = 0) -> Tensor:
        """The mean over the tokens of every sequence.

        Args:
            tokens: (B, L, D) or (T, D).
            lengths: (B,) dense only: tokens from this place on are left out; None: all count.
            skip: tokens in front of every sequence that are left out.

        Returns:
            (B, D); zeros where no token is left.
        """
        if self.packed is not None:
            counts = (self.packed.lengths - skip).clamp(min=1)  # nothing left: zeros, not NaN
            return self.packed.pad(tokens)[:, skip:].sum(1) / counts[:, None]
        if lengths is None:
            return tokens[:, skip:].mean(1)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inside = (places < lengths[:, None]).unsqueeze(2)  # (B, L, 1)
        return (tokens * inside).sum(1) / lengths[:, None]


def lay_out(tokens: Tensor, packed: Packed | None, first: Tensor | None) -> tuple[Tensor, Layout]:
    """Sequences with one more token in front of each, and how they lie.

    Args:
        tokens: (B, K, D), or packed (T, D).
        packed: how packed sequences lie, first tokens included; None where the tokens are dense.
        first: (1, 1, D) the token, alike for every sequence; None for no such token.

    Returns:
        (B, [1 +] K, D), or packed (T [+ B], D), and their layout.
    """
    if packed is None:
        if first is not None:
            first = first.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat((first, tokens), dim=1)
        return tokens, Layout()
    if first is None:
        return tokens, Layout(packed=packed)
    is_first = packed.place == 0
    # One gather puts everything in its place. A token of sequence number s moves s + 1 places
    # back, because so many first tokens stand before it; the first token itself is the last row.
    source = torch.arange(len(is_first), device=tokens.device) - packed.sequence - 1
    source = torch.where(is_first, len(tokens), source)  # (T + B,)
    both = torch.cat((tokens, first[0].to(tokens.dtype)))  # (T + 1, D)
    return both[source], Layout(packed=packed)
