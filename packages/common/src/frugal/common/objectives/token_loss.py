"""Which tokens its caption has, told from an image: a loss beside the contrast.

A linear layer on the mean of an image's patches scores every token of the vocabulary; the target of
an image is spread over the tokens of its caption, the rarer the more. Source: SuperCLIP,
arXiv:2512.14480. Nothing of the size of batch times vocabulary is built for the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frugal.common.contracts import Batch
from frugal.common.distributed import sum_over_processes
from frugal.common.errors import InputError
from frugal.common.models.initialize import normal

_ROWS = 256
"""Images scored at a time: their scores, a row of the vocabulary each, are computed again in the
backward pass rather than kept."""


class TokenLoss(nn.Module):
    """The layer, and how often every token has been seen, which goes into checkpoints.

    Counts are whole numbers over all processes, so that they do not depend on how many there are.
    """

    captions: Tensor
    """(1,) int64: captions seen so far."""
    with_token: Tensor
    """(V,) int64: those of them that have each token."""

    def __init__(self, width: int, vocabulary: int) -> None:
        """Build the layers; :meth:`initialize` draws their weights.

        Args:
            width: D, of the image tower.
            vocabulary: V, tokens of the text tower.
        """
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("captions", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("with_token", torch.zeros(vocabulary, dtype=torch.int64))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of deviation 1 / sqrt(D), no bias."""
        normal(self.head.weight, self.head.in_features**-0.5, generator)
        self.head.bias.zero_()

    @property
    def flops(self) -> int:
        """Forward FLOPs of one image."""
        return 2 * self.head.weight.numel()

    @torch.no_grad()
    def count(self, batches: Sequence[Batch]) -> None:
        """Count the captions of a step; every process brings its own."""
        found = torch.zeros_like(torch.cat((self.captions, self.with_token)))
        for batch in batches:
            ids, is_first = self._tokens_of(batch)
            is_first = is_first & batch.valid[:, None]
            found[1:].scatter_add_(0, ids.flatten(), is_first.flatten().long())
            found[0] += batch.valid.sum()
        found = sum_over_processes(found)
        self.captions += found[0]
        self.with_token += found[1:]

    def forward(self, patches: Tensor, batch: Batch) -> Tensor:
        """(B,): the loss of every image.

        Args:
            patches: (B, D) means of the patches that the tower saw.
            batch: with captions, which :meth:`count` has met.
        """
        ids, is_first = self._tokens_of(batch)
        target = torch.where(is_first, self._rarity()[ids], 0.0)
        target = target / target.sum(dim=1, keepdim=True).clamp(min=1e-12)  # (B, T)
        parts = zip(patches.split(_ROWS), ids.split(_ROWS), target.split(_ROWS), strict=True)
        losses = [
            checkpoint(self._of_rows, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.cat(losses)

    def _of_rows(self, patches: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        """(R,): cross-entropy with a target that is zero but at a few ids."""
        scores = self.head(self.norm(patches)).float()  # (R, V)
        return target.sum(dim=1) * scores.logsumexp(dim=1) - (target * scores.gather(1, ids)).sum(
            dim=1
        )

    def _rarity(self) -> Tensor:
        """(V,) float32: the logarithm of one over the share of captions with each token.

        Both counts have one more than was seen. What stands in every caption weighs nothing.
        """
        return ((self.captions + 1).double() / (self.with_token + 1)).log().float()

    def _tokens_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) ids of each caption in order, and which of them are the first of their kind.

        Padding is none of them: it is told by its place, as its id may be that of a word, too.
        """
        if batch.token_ids is None or batch.text_lengths is None:
            raise InputError(
                "objective.token_loss needs captions and their lengths, which the data do not give"
            )
        ids = batch.token_ids  # (B, T)
        is_text = torch.arange(ids.shape[1], device=ids.device) < batch.text_lengths[:, None]
        # in order of ids, text before padding of the same id
        keys = (2 * ids + ~is_text).sort(dim=1).values
        ids, is_text = keys // 2, keys % 2 == 0
        is_new = torch.ones_like(is_text)
        is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return ids, is_new & is_text
