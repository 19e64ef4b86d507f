"""Whether two tokenizers make the same ids: weights mean nothing with the ids of another one."""

from __future__ import annotations

from typing import NamedTuple

from frugal.common.data.tokenizers import Tokenizer

_PLAIN = (
    "a photo of a cat.",
    "Two red circles, left of 3 blue squares!",
    "the quick brown fox jumps over the lazy dog",
    "it's the dog's ball; isn't it great? I've seen 12,345.67 of them (and more) - at 50%",
    "A BLACK-AND-WHITE photograph; f/2.8, 1/250 s & ISO 100 #sunset @home",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "0 1 2 3 4 5 6 7 8 9 10 100 1000 2024",
)
_ODD = (
    "na\u00efve caf\u00e9, 7\u00bd \u2013 an \u201c\u00dcbel\u201d, John\u2019s\u2026",
    "&amp; &lt;b&gt; &quot;",
    "\u65e5\u672c\u8a9e \u0438 \u0441\u043e\u0431\u0430\u043a\u0430 \U0001f415",
    "\ufb01nal \uff46\uff55\uff4c\uff4c width \u00a0 spaces\tand\nlines",
    "<end_of_text> [SEP] </s> <|endoftext|>",
)
"""Accents, quotes of print, entities, other scripts, ligatures, full width, special tokens."""


class Difference(NamedTuple):
    """How two tokenizers differ."""

    words: str
    """As ``begins a caption with (49406,) there and () here``."""
    of_odd_texts: bool
    """Only texts with accents, other scripts, quotes of print or special tokens get other ids."""


def token_difference(there: Tokenizer, here: Tokenizer) -> Difference | None:
    """How the ids that two tokenizers make differ; None where they are the same.

    A number of texts is compared, and where both vocabularies are of one kind the text of every id.
    What they pad with is not: where padding counts, the text tower says its id.
    """
    for name, words in (("prefix", "begins a caption with"), ("suffix", "ends a caption with")):
        if getattr(there, name) != getattr(here, name):
            said = f"{words} {getattr(there, name)} there and {getattr(here, name)} here"
            return Difference(said, of_odd_texts=False)
    if odd := _other_ids(_PLAIN, there, here):
        return Difference(odd, of_odd_texts=False)
    if type(there._vocabulary) is type(here._vocabulary) and (row := _other_entry(there, here)):
        return Difference(row, of_odd_texts=False)
    if odd := _other_ids(_ODD, there, here):
        return Difference(odd, of_odd_texts=True)
    return None


def _other_ids(texts: tuple[str, ...], there: Tokenizer, here: Tokenizer) -> str | None:
    for text in texts:
        theirs, ours = there.encode(text), here.encode(text)
        if theirs != ours:
            return f"makes {theirs[:8]} of {text!r} there and {ours[:8]} here"
    return None


def _other_entry(there: Tokenizer, here: Tokenizer) -> str | None:
    """The first id that stands for another text."""
    for token in range(min(there.vocab_size, here.vocab_size)):
        theirs, ours = there.decode([token]), here.decode([token])
        if theirs != ours:
            return f"writes {theirs!r} as {token} there, which stands for {ours!r} here"
    return None
