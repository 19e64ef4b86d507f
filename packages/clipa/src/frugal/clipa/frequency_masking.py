"""Frequency masking: the more common a word, the likelier it goes.

A word is dropped with probability ``1 - sqrt(t / f)``, f its share of all words of the corpus, t a
threshold: word2vec's subsampling (Mikolov et al., arXiv:1310.4546, section 2.3), used to mask
captions by Liang and Larson, "Frequency Is What You Need", arXiv:2412.16148. It needs no tagger
and works in every language that puts spaces between words. The shares come from a file that
``python -m frugal.clipa.word_counts`` writes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from frugal.clipa.text_masking import check_length
from frugal.common.data.vocabularies import clean_caption
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes
from frugal.common.ranges import Range, check_ranges
from frugal.common.reduction.text import CaptionTokenizer, TextReduction

_COUNT = "write it with `python -m frugal.clipa.word_counts SHARDS --out FILE`"


@lru_cache(maxsize=1)
def _word_pattern() -> Any:
    import regex

    return regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['\u2019]\p{L}+)*|[^\s\p{L}\p{M}\p{N}]+")


def find_words(caption: str) -> tuple[str, list[tuple[int, int]]]:
    """The caption, cleaned and in lower case as for CLIP, and where its words start and stop.

    A word is a run of letters and digits, apostrophes within included, or one of other marks.
    """
    text = clean_caption(caption)
    return text, [match.span() for match in _word_pattern().finditer(text)]


def keep_probability(share: float, threshold: float) -> float:
    """How likely a word stays that makes up this share of the corpus."""
    return min(math.sqrt(threshold / share), 1.0) if share > 0 else 1.0


def drawn_words(keep: Sequence[float], draws: Sequence[float]) -> list[int]:
    """The places of the words that stay, ascending; the rarest if none would.

    Args:
        keep: how likely each word stays.
        draws: uniform in [0, 1), one for each.
    """
    kept = [place for place, chance in enumerate(keep) if draws[place] < chance]
    if kept or not keep:
        return kept
    return [max(range(len(keep)), key=keep.__getitem__)]  # the first one of equals


def join_words(text: str, spans: Sequence[tuple[int, int]], kept: Sequence[int]) -> str:
    """The kept words, with what stood between them; a space where words are missing."""
    parts: list[str] = []
    for place, before in zip(kept, [-1, *kept], strict=False):
        start, stop = spans[place]
        if parts:
            parts.append(text[spans[before][1] : start] if before == place - 1 else " ")
        parts.append(text[start:stop])
    return "".join(parts)


_CorpusShare = Annotated[
    float,
    Range(
        above=0, most=1, words="must lie between 0 and 1; it is the share of the corpus up to "
        "which a word always stays",
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FrequencyMasking(TextReduction):
    """Common words are dropped at random; what then is still too long is truncated."""

    counts: Path | None = None
    """File with the words of the corpus, written by ``python -m frugal.clipa.word_counts``."""
    threshold: _CorpusShare = 1e-3
    """Share of the corpus up to which a word always stays; word_counts says how many words of a
    caption stay at several thresholds."""
    counts_checksum: str | None = None
    """Of the counts file, filled in when it is found: a resumed run refuses other counts."""

    def __post_init__(self) -> None:
        check_ranges(self, "reduction.text")
        if self.counts is not None and self.counts_checksum is None and self.counts.is_file():
            object.__setattr__(self, "counts_checksum", _checksum(_read(self.counts)))

    def check_length(self, length: int) -> None:
        """Refuse a recipe whose texts are too short for words."""
        check_length(length)

    def prepare(self, tokenizer: CaptionTokenizer, *, length: int) -> None:
        """Load the counts, so that loader processes need not, or say what is wrong with them.

        Raises:
            InputError: if they are missing, damaged or not those of the recipe, or the text length
                leaves no room for words.
        """
        check_length(length)
        self._common_words()

    def encode(
        self,
        caption: str,
        tokenizer: CaptionTokenizer,
        *,
        length: int,
        generator: np.random.Generator,
    ) -> list[int]:
        """At most ``length`` token ids, special tokens included, without padding.

        Raises:
            InputError: if the counts cannot be used.
        """
        check_length(length)
        text, spans = find_words(caption)
        common = self._common_words()
        keep = [common.get(text[start:stop], 1.0) for start, stop in spans]
        kept = drawn_words(keep, generator.random(len(spans)).tolist())
        if len(kept) < len(spans):
            caption = join_words(text, spans, kept)
        return tokenizer.assemble(tokenizer.encode(caption), length)

    def _common_words(self) -> Mapping[str, float]:
        if self.counts is None:
            raise InputError(
                "frequency masking needs the words of the corpus: give the file as "
                f"reduction.text.counts, or {_COUNT}"
            )
        return _load_common_words(self.counts, self.counts_checksum, self.threshold)


@lru_cache(maxsize=4)
def _load_common_words(path: Path, checksum: str | None, threshold: float) -> Mapping[str, float]:
    """How likely a word stays, for those that do not always stay."""
    encoded = _read(path)
    if checksum not in (None, _checksum(encoded)):
        raise InputError(
            f"the word counts {path} are not those that the recipe was made with (checksum "
            f"{_checksum(encoded)} instead of {checksum}); restore that file, or leave "
            "reduction.text.counts_checksum out to start a run with this one"
        )
    counts, total, least_share = _parse(encoded, path)
    if least_share > threshold:
        raise InputError(
            f"the word counts {path} leave out words that make up less than {least_share:g} of "
            f"the corpus, but with reduction.text.threshold = {threshold:g} some of them may be "
            f"dropped; count again with --least-share {threshold:g}, or choose a higher threshold"
        )
    keep = {word: keep_probability(count / total, threshold) for word, count in counts.items()}
    return {word: chance for word, chance in keep.items() if chance < 1}


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise InputError(
            f"the word counts {path} cannot be read ({error.strerror}); {_COUNT}"
        ) from None


def _checksum(encoded: bytes) -> str:
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()


def _parse(encoded: bytes, path: Path) -> tuple[dict[str, int], int, float]:
    """Counts by word, the number of words of the corpus, and the lowest share that is listed."""
    try:
        content = parse_json(encoded)
        counts, total, least_share = content["counts"], content["words"], content["least_share"]
        whole = all(type(count) is int and count > 0 for count in (total, *counts.values()))
        if whole and 0 < sum(counts.values()) <= total and 0 <= least_share <= 1:
            return counts, total, least_share
        problem = "its numbers do not add up"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    raise InputError(f"{path} holds no word counts ({problem}); {_COUNT}")
