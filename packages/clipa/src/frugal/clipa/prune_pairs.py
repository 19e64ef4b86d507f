"""Choose pairs by the words of their captions: ``python -m frugal.clipa.prune_pairs``.

Source: Liang and Larson, "Enhancing Vision-Language Model Pre-training with Image-text Pair
Pruning Based on Word Frequency", arXiv:2410.10879, as its released code computes it. A word that
makes up the share f of a corpus has the value P = 1 - sqrt(t / f), t = 1e-7; one that is rarer, or
unknown, has 1. A caption of n words (the first 30) scores (1 - the product of their P) / n: high
where it has words of middling frequency and few words in all. The pairs of the highest scores are
kept; a short stage on all pairs follows.

Writes the list that ``--data.subset`` reads.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from frugal.clipa.word_counts import Patterns, find_shards
from frugal.common.cli import command_words, exit_politely
from frugal.common.data.contents import below_common_folder
from frugal.common.data.damage import Damaged
from frugal.common.data.samples import Fields, Shard
from frugal.common.data.sources import open_indexed
from frugal.common.data.subset import key_within
from frugal.common.data.vocabularies import clean_caption
from frugal.common.errors import InputError
from frugal.common.files import write_file

THRESHOLD = 1e-7
MIN_COUNT = 5
MAX_WORDS = 30
_FIELDS = Fields()
Rare = Literal["neutral", "keep"]


@lru_cache(maxsize=1)
def _word_pattern() -> Any:
    import regex

    # CLIP's: contractions, runs of letters, single digits, runs of other marks
    return regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )


def words_of(caption: str) -> list[str]:
    """The words of a caption as CLIP's tokenizer has them before it takes them apart."""
    return _word_pattern().findall(clean_caption(caption))


def drop_values(
    counts: Mapping[str, int],
    *,
    threshold: float = THRESHOLD,
    min_count: int = MIN_COUNT,
    rare: Rare = "neutral",
) -> dict[str, float]:
    """P of every word that is common enough to count.

    Args:
        counts: of every word of the corpus.
        threshold: t.
        min_count: words that occur less often count nowhere, as if they were unknown.
        rare: neutral: 1 for what is rarer than the threshold, as published, so that a caption of
            such words alone scores 0 and goes first. keep: 0, so that it stays.
    """
    common = {word: count for word, count in counts.items() if count >= min_count}
    total = sum(common.values())
    seldom = 1.0 if rare == "neutral" else 0.0
    values = {w: 1 - math.sqrt(threshold / (count / total)) for w, count in common.items()}
    return {word: value if value >= 0 else seldom for word, value in values.items()}


def score(
    words: Sequence[str],
    values: Mapping[str, float],
    *,
    max_words: int = MAX_WORDS,
    rare: Rare = "neutral",
) -> float:
    """(1 - the product of P) / n of the first words; minus infinity where there is none."""
    first = words[:max_words]
    if not first:
        return -math.inf
    unknown = 1.0 if rare == "neutral" else 0.0
    return (1 - math.prod(values.get(word, unknown) for word in first)) / len(first)


def kept_pairs(scores: np.ndarray, ratio: float) -> np.ndarray:
    """The numbers of the pairs that stay, ascending: of equal scores the earlier ones.

    Args:
        scores: (n,) float64.
        ratio: share of the pairs that stays, rounded down.
    """
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[: int(ratio * len(scores))])


def prune_pairs(
    patterns: Patterns,
    *,
    out: Path,
    ratio: float = 0.5,
    threshold: float = THRESHOLD,
    min_count: int = MIN_COUNT,
    max_words: int = MAX_WORDS,
    rare: Rare = "neutral",
    processes: int | None = None,
    fields: Fields = _FIELDS,
) -> int:
    """Score the captions of pairs and list those that stay, for --data.subset.

    Args:
        patterns: shards, folders or lists, as data.train takes them.
        out: the list to write.
        ratio: share of the pairs that stays.
        threshold: share of the corpus up to which a word is rare.
        min_count: words that occur less often count as unknown.
        max_words: words of a caption that are looked at.
        rare: whether rare and unknown words count as nothing (neutral, as published) or keep their
            caption.
        processes: shards read at a time; one per core if not given.
        fields: where captions are in a sample; the first of several is scored.
    """
    _check(ratio=ratio, threshold=threshold, min_count=min_count, max_words=max_words)
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}, must be at least 1")
    paths = find_shards(patterns)
    names = below_common_folder([str(path) for path in paths])
    with ProcessPoolExecutor(min(processes or os.cpu_count() or 1, len(paths))) as pool:
        counts = Counter[str]()
        for part in pool.map(partial(_count, fields=fields), paths):
            counts.update(part)
        values = drop_values(counts, threshold=threshold, min_count=min_count, rare=rare)
        if not values:
            raise InputError(
                f"no word occurs {min_count} times in the captions of {', '.join(patterns)}; say "
                "where captions are with --fields.caption or --fields.csv-caption, or lower "
                "--min-count"
            )
        rate = partial(_score, fields=fields, values=values, max_words=max_words, rare=rare)
        parts = list(pool.map(rate, paths, names))
    keys = [key for part in parts for key in part.keys]
    scores = np.concatenate([part.scores for part in parts])
    kept = kept_pairs(scores, ratio)
    if not len(kept):
        raise InputError(f"--ratio {ratio:g} of {len(keys):,} pairs leaves none; raise it")
    write_file(out, "".join(f"{keys[number]}\n" for number in kept))
    damaged = sum(part.damaged for part in parts)
    sys.stdout.write(
        f"{len(kept):,} of {len(keys):,} pairs kept, of scores from {scores[kept].min():.3g} to "
        f"{scores[kept].max():.3g}; {int(np.isneginf(scores).sum()):,} captions without a word, "
        f"{damaged:,} samples could not be read and are not listed\n"
        f"written to {out}; train on them with --data.subset {out}\n"
    )
    return 0


def _check(*, ratio: float, threshold: float, min_count: int, max_words: int) -> None:
    if not 0 < ratio <= 1:
        raise InputError(f"--ratio is {ratio:g}, must be more than 0 and at most 1")
    if not 0 < threshold <= 1:
        raise InputError(f"--threshold is {threshold:g}, must be more than 0 and at most 1")
    for name, value in (("--min-count", min_count), ("--max-words", max_words)):
        if value < 1:
            raise InputError(f"{name} is {value}, must be at least 1")


@dataclass(frozen=True)
class _Scored:
    """Of one shard."""

    keys: list[str]
    """Of the samples that can be read, from the name of the shard on."""
    scores: np.ndarray
    """(n,) float64."""
    damaged: int


def _captions(shard: Shard, fields: Fields) -> Iterator[tuple[str, str | None]]:
    """Key and caption of every sample of a shard in order; None where it cannot be read."""
    reader = shard.open(fields)
    for number in range(shard.num_samples):
        key = key_within(shard, reader.key(number))
        try:
            captions = [text for text in reader.captions(number) if text]
        except Damaged:
            yield key, None
            continue
        yield key, captions[0] if captions else ""
    reader.close()


def _count(path: Path, *, fields: Fields) -> Counter[str]:
    counts = Counter[str]()
    shard, _ = open_indexed(path, fields)
    for _, caption in _captions(shard, fields):
        counts.update(words_of(caption or ""))
    return counts


def _score(
    path: Path,
    name: str,
    *,
    fields: Fields,
    values: Mapping[str, float],
    max_words: int,
    rare: Rare,
) -> _Scored:
    shard, _ = open_indexed(path, fields)
    pairs = list(_captions(shard, fields))
    read = [(key, caption) for key, caption in pairs if caption is not None]
    scores = [
        score(words_of(caption), values, max_words=max_words, rare=rare) for _, caption in read
    ]
    return _Scored(
        [f"{name}/{key}" for key, _ in read],
        np.array(scores, np.float64),
        damaged=len(pairs) - len(read),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    program = "python -m frugal.clipa.prune_pairs"
    return exit_politely(lambda: tyro.cli(prune_pairs, prog=program, args=command_words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
