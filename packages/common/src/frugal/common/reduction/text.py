"""What a text reduction receives and answers; plain truncation.

A text reduction runs in the data loader, one caption at a time. The tokenizer it is handed has
two verbs: ``encode(caption)`` gives the content as token ids without special tokens, and
``assemble(content_ids, length)`` cuts the content to what fits, adds the special tokens where
they belong and returns at most ``length`` ids, without padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from typing_extensions import override


@dataclass(frozen=True)
class PositionedTokens:
    """The tokens that stay, and the slots of the text tower in which they stood.

    What a reduction answers if its tokens do not stand in the first slots.
    """

    ids: list[int]
    """Tokens of the caption that stay, special tokens included."""
    positions: list[int]
    """Slots that stay, ascending and equally many for every caption: those of ``ids`` first, what
    is left of them holds padding."""


class CaptionTokenizer(Protocol):
    """What a text reduction asks of a tokenizer."""

    def encode(self, caption: str) -> list[int]:
        """Token ids of the content, without special tokens and without a limit."""
        ...

    def assemble(self, content_ids: Sequence[int], length: int) -> list[int]:
        """At most ``length`` ids: the first of the content that fit, and the special tokens."""
        ...


class TextReduction(ABC):
    """Decides which tokens of a caption stay; a frozen dataclass of a recipe."""

    @abstractmethod
    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int] | PositionedTokens:
        """At most ``length`` token ids, special tokens included, without padding.

        Or, where tokens keep the slots they had, ids with positions; always or never.
        """

    def most_tokens(self, length: int) -> int:
        """Tokens of a caption that stay at most, of a tower of ``length``."""
        return length

    def check_length(self, length: int) -> None:
        """Refuse a length of texts, in tokens, with which this cannot work.

        Raises:
            InputError: naming the setting.
        """
        del length

    def prepare(self, tokenizer: CaptionTokenizer, *, length: int) -> None:
        """Load what it needs beside captions (a tagger, a file of counts) before training starts.

        Raises:
            InputError: if something is missing or does not go with the tokenizer.
        """
        del tokenizer, length


@dataclass(frozen=True, kw_only=True)
class Truncate(TextReduction):
    """The start of the caption stays."""

    @override
    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int]:
        """At most ``length`` token ids, special tokens included, without padding."""
        return tokenizer.assemble(tokenizer.encode(caption), length)
