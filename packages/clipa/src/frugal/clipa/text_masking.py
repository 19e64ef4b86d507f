"""Random and block masking of captions: a random part of the tokens stays, or one run of them.

Source: Li et al., "An Inverse Scaling Law for CLIP Training", arXiv:2305.07017, section 3. Both
leave captions alone that fit, and draw anew every time a caption is read. They need no knowledge
of a language and work with every tokenizer: whatever it puts around the content (start and end
for CLIP's byte pairs, [CLS] alone for CLIPA-v2's word pieces) stays.

Differences from open_clip (``random_mask_tokenize``, ``simple_mask_tokenize``): given the same
draws the ids are the same, but the draws belong to the sample instead of the process. Differences
from the JAX code of CLIPA-v2: random masking keeps the order of the tokens unless told otherwise,
a window may also be the last one, and it is drawn over pieces, not words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frugal.common.errors import InputError
from frugal.common.reduction.text import CaptionTokenizer, TextReduction

SHORTEST_TEXT = 3
"""Tokens: a start, a word, an end."""


def check_length(length: int) -> None:
    """Refuse a text length that leaves no room for words.

    Raises:
        InputError: if it does.
    """
    if length < SHORTEST_TEXT:
        raise InputError(
            f"a text length of {length} leaves no room for words beside the special tokens; set "
            f"model.text.length to at least {SHORTEST_TEXT}"
        )


def content_room(tokenizer: CaptionTokenizer, length: int) -> int:
    """How many tokens of the content fit beside the special ones.

    Raises:
        InputError: if the text length leaves no room for words.
    """
    check_length(length)
    return length - len(tokenizer.assemble((), length))


def random_subset(
    ids: Sequence[int], room: int, permutation: Sequence[int], *, shuffle: bool = False
) -> list[int]:
    """The ``room`` tokens that a permutation of their places names first, in text order.

    Args:
        ids: the content.
        room: tokens that stay.
        permutation: of the places of ``ids``.
        shuffle: in the order of the permutation instead.
    """
    kept = permutation[:room]
    return [ids[place] for place in (kept if shuffle else sorted(kept))]


def window(ids: Sequence[int], room: int, start: int) -> list[int]:
    """The ``room`` tokens from a place on."""
    return list(ids[start : start + room])


@dataclass(frozen=True, kw_only=True)
class RandomTextMasking(TextReduction):
    """A uniformly random part of the tokens stays, in the order of the caption."""

    shuffle: bool = False
    """Do not restore the order of captions that were too long."""

    def check_length(self, length: int) -> None:
        """Refuse a recipe whose texts are too short for words."""
        check_length(length)

    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int]:
        """At most ``length`` token ids, special tokens included, without padding."""
        room = content_room(tokenizer, length)
        ids = tokenizer.encode(caption)
        if len(ids) > room:
            permutation = generator.permutation(len(ids)).tolist()
            ids = random_subset(ids, room, permutation, shuffle=self.shuffle)
        return tokenizer.assemble(ids, length)


@dataclass(frozen=True, kw_only=True)
class BlockTextMasking(TextReduction):
    """A run of tokens stays, at a uniformly random place of the caption."""

    def check_length(self, length: int) -> None:
        """Refuse a recipe whose texts are too short for words."""
        check_length(length)

    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int]:
        """At most ``length`` token ids, special tokens included, without padding."""
        room = content_room(tokenizer, length)
        ids = tokenizer.encode(caption)
        if len(ids) > room:
            ids = window(ids, room, int(generator.integers(len(ids) - room + 1)))
        return tokenizer.assemble(ids, length)
