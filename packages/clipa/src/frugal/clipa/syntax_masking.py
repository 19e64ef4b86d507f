"""Syntax masking: nouns stay first, then adjectives, then verbs, then the rest.

Source: Li et al., "An Inverse Scaling Law for CLIP Training", arXiv:2305.07017, section 3, and
"CLIPA-v2", arXiv:2306.15658. For English captions only: the parts of speech come from NLTK's
English tagger. In other languages use random, block or frequency masking.

Two ways, chosen by the tokenizer:

* with an end token (CLIP's byte pairs): every word is tagged in its caption, as many words stay
  as there is room for tokens, and these words, joined by spaces, are tokenized and truncated. The
  words are the Penn Treebank's ("can't" is "ca" and "n't", quotes are `` and ''), also in captions
  that are short enough.
* word pieces without an end token (CLIPA-v2): every entry of the vocabulary is tagged once, without
  a caption around it (of "cannot", two words to NLTK, the last one counts); a word has the tag of
  its first piece. Captions with no more words than there is room are truncated.

Differences from open_clip's ``syntax_mask_tokenize``: of words with equal priority the earlier
ones stay (NumPy's default sort is not stable: which words stay in open_clip depends on the
processor), and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np

from frugal.clipa.part_of_speech import load_language_data, load_tagger, split_words
from frugal.clipa.text_masking import check_length, content_room
from frugal.common.reduction.text import CaptionTokenizer, TextReduction

_CACHED_CAPTIONS = 1 << 16
"""Captions whose words are remembered in every loader process: about 25 MB at 80 letters each."""
_LONGEST_CAPTION = 20_000
"""Letters; what is behind them is dropped. NLTK's rules take seconds for some longer texts."""
_KINDS = ("NN", "JJ", "VB")
_REST = len(_KINDS) + 1


class VocabularyTokenizer(CaptionTokenizer, Protocol):
    """What syntax masking asks of a tokenizer; ``Tokenizer`` of ``frugal.common`` has it."""

    vocab_size: int

    @property
    def end_id(self) -> int | None:
        """The last token of every caption, where there is one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids; of a single one: the entry."""
        ...

    def __hash__(self) -> int: ...


def priority(tag: str) -> int:
    """1 for nouns, 2 for adjectives, 3 for verbs, 4 for every other Penn Treebank tag."""
    return next((rank for rank, kind in enumerate(_KINDS, 1) if tag.startswith(kind)), _REST)


def first_in_priority(priorities: Sequence[int], room: int) -> list[int]:
    """The places of at most ``room`` words, ascending: lowest priority first, then the earlier."""
    ranked = sorted(range(len(priorities)), key=priorities.__getitem__)  # stable
    return sorted(ranked[:room])


def keep_words(words: Sequence[str], tags: Sequence[str], room: int) -> str:
    """At most ``room`` words of a tagged caption, joined by spaces."""
    kept = first_in_priority([priority(tag) for tag in tags], room)
    return " ".join(words[place] for place in kept)


def keep_pieces(words: Sequence[Sequence[int]], priorities: Sequence[int], room: int) -> list[int]:
    """The word pieces of at most ``room`` words, perhaps more of them than fit.

    Args:
        words: the pieces of every word.
        priorities: of every word.
        room: word pieces that fit.
    """
    kept = first_in_priority(priorities, room)
    return [piece for place in kept for piece in words[place]]


@lru_cache(maxsize=_CACHED_CAPTIONS)
def _kept_text(caption: str, room: int) -> str:
    words = split_words(caption)
    return keep_words(words, load_tagger().tag(words), room)


@dataclass(frozen=True)
class WordPieceEntries:
    """What syntax masking knows of the entries of a WordPiece vocabulary."""

    priorities: bytes
    """(V,) from 1 to 4."""
    continues: bytes
    """(V,) 1 where an entry continues a word."""

    def words(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """The pieces of every word of a caption."""
        starts = [place for place, piece in enumerate(ids) if not self.continues[piece]]
        return [ids[start:stop] for start, stop in pairwise([*starts, len(ids)])]


@lru_cache(maxsize=4)
def tag_entries(tokenizer: VocabularyTokenizer) -> WordPieceEntries | None:
    """Tag every entry by itself; None for vocabularies that are not of the WordPiece kind.

    Raises:
        InputError: if NLTK's tagger is missing or damaged.
    """
    entries = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    continues = bytes(entry.startswith("##") and entry != "##" for entry in entries)
    if not any(continues):
        return None
    tagger = load_tagger()
    # special tokens have no text; the only one that stands in captions is the unknown word
    tags = (tagger.tag(split_words(entry or "[UNK]")) for entry in entries)
    return WordPieceEntries(bytes(priority(tag[-1]) if tag else _REST for tag in tags), continues)


@dataclass(frozen=True, kw_only=True)
class SyntaxMasking(TextReduction):
    """Nouns stay first, then adjectives, verbs and the rest, in the order of the caption."""

    def check_length(self, length: int) -> None:
        """Refuse a recipe whose texts are too short for words."""
        check_length(length)

    # a vocabulary is needed, which every tokenizer of a recipe has
    def prepare(  # type: ignore[override]
        self, tokenizer: VocabularyTokenizer, *, length: int
    ) -> None:
        """Load the tagger, so that loader processes need not, or say that it is missing.

        Raises:
            InputError: if it is, or the text length leaves no room for words.
        """
        check_length(length)
        load_language_data()
        if tokenizer.end_id is None:
            tag_entries(tokenizer)

    def encode(  # type: ignore[override]
        self,
        caption: str,
        tokenizer: VocabularyTokenizer,
        *,
        length: int,
        generator: np.random.Generator | None,
    ) -> list[int]:
        """At most ``length`` token ids, special tokens included, without padding.

        Raises:
            InputError: if NLTK's data are missing or damaged.
        """
        del generator  # nothing is drawn
        room = content_room(tokenizer, length)
        entries = tag_entries(tokenizer) if tokenizer.end_id is None else None
        if entries is None:
            text = _kept_text(caption[:_LONGEST_CAPTION], room)
            return tokenizer.assemble(tokenizer.encode(text), length)
        words = entries.words(tokenizer.encode(caption))
        priorities = [entries.priorities[word[0]] for word in words]
        return tokenizer.assemble(keep_pieces(words, priorities, room), length)
