"""Texts to the features that curation compares: of the text tower, before its projection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frugal.cit.pool import padded
from frugal.common.data.tokenizers import text_length
from frugal.common.evaluation.embed import evaluating

TEXTS_AT_ONCE = 512
"""Texts in one forward pass."""


class TextFeatures:
    """A text tower with its tokenizer, in evaluation mode while it is asked."""

    def __init__(
        self,
        tower: nn.Module,
        tokenizer: Any,
        *,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Ask a tower.

        Args:
            tower: has ``forward_pooled(token_ids, text_lengths)``.
            tokenizer: has ``encode``, ``assemble`` and ``pad_id``.
            length: most tokens of a text.
            device: where the tower is.
            dtype: of the matrix products.
        """
        self._tower: Any = tower
        self._tokenizer = tokenizer
        self._length = length
        self._device = device
        self._dtype = dtype

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Around questions: no gradients, no dropout."""
        with evaluating(self._tower), torch.inference_mode():
            yield

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), D) float32 on the device."""
        tokens = [
            self._tokenizer.assemble(self._tokenizer.encode(text), self._length) for text in texts
        ]
        tokens = [ids[: text_length(ids, self._tokenizer)] for ids in tokens]
        return self.tokens(*padded(tokens, pad_id=self._tokenizer.pad_id))

    def tokens(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, D) float32 on the device, from token ids (B, T) and their numbers (B,).

        Texts of about one length share a pass, so that hardly any padding is computed.
        """
        order = lengths.argsort(stable=True)
        parts = []
        # the tower alone computes in the precision of training: features are compared in float32
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            for rows in order.split(TEXTS_AT_ONCE):
                longest = int(lengths[rows].max())
                ids = token_ids[rows, :longest].to(self._device, non_blocking=True)
                features = self._tower.forward_pooled(ids, lengths[rows].to(self._device))
                parts.append(features.float())
        return torch.cat(parts)[order.argsort().to(self._device)]
