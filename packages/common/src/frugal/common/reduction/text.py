"""What a text reduction receives and answers; plain truncation.

A text reduction runs in the data loader, one caption at a time. The tokenizer it is handed has
two verbs: ``encode(caption)`` gives the content as token ids without special tokens, and
``assemble(content_ids, length)`` cuts the content to what fits, adds the special tokens where
they belong and returns at most ``length`` ids, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Placed:
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


@dataclass(frozen=True, kw_only=True)
class Truncate:
    """The start of the caption stays."""

    def encode(
        self, caption: str, tokenizer: CaptionTokenizer, *, length: int, generator: Any
    ) -> list[int]:
        """At most ``length`` token ids, special tokens included, without padding."""
        return tokenizer.assemble(tokenizer.encode(caption), length)
