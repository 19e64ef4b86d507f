"""Masking of captions, FLIP's ablation: half of the slots of every caption are never computed.

Source: Li et al., "Scaling Language-Image Pre-training via Masking", arXiv:2212.00794, table 2c.
The published code does not contain it. The tokens that stay keep the positions they had, so that
evaluation, which masks nothing, finds every position trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from frugal.common.errors import InputError
from frugal.common.ranges import ShareBelowOne
from frugal.common.reduction.text import CaptionTokenizer, PositionedTokens, TextReduction

Order = Literal["random", "padding_first"]


@dataclass(frozen=True, kw_only=True)
class TextMasking(TextReduction):
    """Keep a random subset of the slots of a caption, equally many for every caption.

    What the towers pool never goes, as the class token of an image never does: the special
    tokens of a tokenizer, and the first slot where there is none in front of the text. It is the
    slot that FLIP's text tower reads its vector from, in training as in evaluation.
    """

    mask_ratio: ShareBelowOne = 0.5
    """Fraction of the slots that goes."""
    order: Order = "random"
    """random: a slot of padding is as likely to go as a word. padding_first: words go only when
    no padding is left."""

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise InputError(
                f"text mask ratio {self.mask_ratio} must lie in [0, 1): it is the fraction of the "
                "slots of a caption that is removed"
            )
        if self.order not in ("random", "padding_first"):
            raise InputError(
                f"the order of text masking is {self.order!r}; choose random or padding_first"
            )

    def most_tokens(self, length: int) -> int:
        """Slots that stay of ``length``."""
        return self.num_kept(length)

    def check_length(self, length: int) -> None:
        """Refuse captions that would keep nothing."""
        self.num_kept(length)

    def num_kept(self, length: int) -> int:
        """Slots that stay of ``length``, by the rule that holds for patches.

        Raises:
            InputError: if nothing would stay.
        """
        kept = int(length * (1 - self.mask_ratio))
        if kept == 0:
            raise InputError(
                f"text mask ratio {self.mask_ratio} keeps none of {length} slots; choose a smaller "
                "ratio or a larger model.text.length"
            )
        return kept

    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int] | PositionedTokens:
        """The tokens with the smallest noise, in the order of the caption.

        Args:
            caption: the text.
            tokenizer: its content is cut to what ``length`` slots hold before anything is masked.
            length: slots of the tower.
            generator: of this caption; draws one number per slot.

        Returns:
            Tokens with their slots; plain ids where the ratio is 0.

        Raises:
            InputError: if nothing would stay, or fewer slots than there are special tokens.
        """
        ids = tokenizer.assemble(tokenizer.encode(caption), length)
        if self.mask_ratio == 0:
            return ids
        count = self.num_kept(length)
        noise = generator.random(length)
        if self.order == "padding_first":
            noise[len(ids) :] += 1
        fixed = _fixed_slots(tokenizer, len(ids), length)
        if len(fixed) > count:
            raise InputError(
                f"text mask ratio {self.mask_ratio} keeps {count} of {length} slots, fewer than "
                f"the {len(fixed)} special tokens of a caption; choose a smaller ratio"
            )
        noise[fixed] = -1
        slots = np.sort(np.argsort(noise, kind="stable")[:count]).tolist()
        return PositionedTokens([ids[slot] for slot in slots if slot < len(ids)], slots)


def _fixed_slots(tokenizer: CaptionTokenizer, used: int, length: int) -> list[int]:
    """The slots that never go, of a caption of ``used`` tokens."""
    content = -1  # no token has this id
    surrounded = tokenizer.assemble([content], length)
    front = surrounded.index(content)
    behind = len(surrounded) - front - 1
    return [*range(max(front, 1)), *range(used - behind, used)]
