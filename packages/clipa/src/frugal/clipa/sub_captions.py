"""Sub-captions: one sentence of a long caption, another one every time.

Source: Liu et al., "CLIPS: An Enhanced CLIP Framework for Learning with Synthetic Captions",
arXiv:2411.16828. Its PyTorch repository reads one whole text; the rule is that of the authors'
later code (OpenVision). Its second text, decoder and loss are not here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from typing_extensions import override

from frugal.common.ranges import Count, check_choices, check_ranges
from frugal.common.reduction.text import (
    CaptionTokenizer,
    PositionedTokens,
    TextReduction,
    Truncate,
)

_ENDS = {
    "spaced": re.compile(r"[.!]+(?:\s+|$)"),
    "strict": re.compile(r"[.!|]+"),
}
"""What stands between two sentences."""
_WORD = re.compile(r"\w")


def sentences(caption: str, split: Literal["spaced", "strict"] = "spaced") -> list[str]:
    """The sentences of a caption that hold a letter or a digit; [] where there is none.

    Args:
        caption: any text.
        split: strict: at every "." and "!" (and "|"), also within "3.5" and "U.S.", as published.
            spaced: only at those that white space follows, or the end.
    """
    pieces = (piece.strip() for piece in _ENDS[split].split(caption))
    return [piece for piece in pieces if _WORD.search(piece)]


@dataclass(frozen=True, kw_only=True)
class SubCaption(TextReduction):
    """One sentence of the caption, drawn every time; another reduction makes tokens of it."""

    then: TextReduction = field(default_factory=Truncate)
    """What becomes of the sentence; ``--reduction.text.then`` takes its class."""
    max_sentences: Count = 1
    """Sentences in a row that are taken, as far as the caption goes on; 1 in the paper."""
    split: Literal["spaced", "strict"] = "spaced"
    """Where a sentence ends: at "." and "!" before white space or the end, or, as published, at
    every one of them ("3.5" are two)."""

    def __post_init__(self) -> None:
        check_ranges(self, "reduction.text")
        check_choices(self, "reduction.text")

    @override
    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int] | PositionedTokens:
        """What the other reduction makes of the sentence; of all where there is no sentence."""
        found = sentences(caption, self.split)
        if len(found) > 1:
            first = int(generator.integers(len(found)))
            caption = ". ".join(found[first : first + self.max_sentences])
        return self.then.encode(caption, tokenizer, length=length, generator=generator)

    @override
    def most_tokens(self, length: int) -> int:
        """Those of the other reduction."""
        return self.then.most_tokens(length)

    @override
    def check_length(self, length: int) -> None:
        """Refuse what the other reduction refuses."""
        self.then.check_length(length)

    @override
    def prepare(self, tokenizer: CaptionTokenizer, *, length: int) -> None:
        """Load what the other reduction needs."""
        self.then.prepare(tokenizer, length=length)
