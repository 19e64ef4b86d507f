"""Words of an English caption and their parts of speech: NLTK's, several times faster.

NLTK's data files are used as they are, and both functions answer exactly what NLTK's
``word_tokenize`` and ``pos_tag`` answer. What is faster: captions of plain words skip the
rules that cannot apply to them, and the averaged perceptron adds up rows of a table where NLTK
adds up dictionaries, in the same order and hence with the same rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from frugal.common.errors import InputError

TAGGER = "taggers/averaged_perceptron_tagger_eng"
SENTENCE_SPLITTER = "tokenizers/punkt_tab"
"""NLTK's names of the data that are needed."""
_PLAIN = re.compile(r"(?:[A-Za-z0-9\s]|-(?!-)|,(?!\S))*\.?\s*", re.ASCII)
"""Letters, digits, single hyphens, commas that end a word, one full stop that ends the text."""
_CONTRACTED = re.compile(r"cannot|gimme|gonna|gotta|lemme|wanna", re.IGNORECASE)
"""What NLTK splits inside of a word of letters."""


def split_words(text: str) -> list[str]:
    """The words as ``nltk.word_tokenize`` has them: sentences by Punkt, then Treebank's rules.

    Raises:
        InputError: if NLTK's sentence splitter is missing or damaged.
    """
    if _PLAIN.fullmatch(text) and not _CONTRACTED.search(text):
        plain = text.rstrip()
        if plain.endswith("."):
            plain = plain[:-1] + " ."
        return plain.replace(",", " , ").split()
    from nltk.tokenize import word_tokenize

    try:
        return word_tokenize(text)
    except (LookupError, OSError) as error:
        raise _unusable(SENTENCE_SPLITTER, error) from None


class Tagger:
    """An averaged perceptron with the features of NLTK's English tagger."""

    _start = ("-START-", "-START2-")
    _end = ("-END-", "-END2-")

    def __init__(
        self,
        weights: Mapping[str, Mapping[str, float]],
        known: Mapping[str, str],
        classes: Iterable[str],
    ) -> None:
        """Make a tagger of trained weights.

        Args:
            weights: of every feature, by tag.
            known: words that have one tag only.
            classes: all tags.
        """
        # of equal scores NLTK takes the last tag in the alphabet, argmax the first column
        self._classes = sorted(classes, reverse=True)
        columns = {tag: column for column, tag in enumerate(self._classes)}
        self._rows = {feature: row for row, feature in enumerate(weights)}
        self._table = np.zeros((len(weights), len(columns)))  # (features, tags)
        for row, by_tag in enumerate(weights.values()):
            for tag, weight in by_tag.items():
                self._table[row, columns[tag]] = weight
        self._known = dict(known)

    def tag(self, words: Sequence[str]) -> list[str]:
        """The Penn Treebank tag of every word, as ``nltk.pos_tag`` has it."""
        context = [*self._start, *map(_shape, words), *self._end]
        last, before_last = self._start
        tags = []
        for place, word in enumerate(words):
            tag = self._known.get(word)
            if not tag:
                tag = self._best(_features(word, context[place : place + 5], last, before_last))
            tags.append(tag)
            last, before_last = tag, last
        return tags

    def _best(self, features: Sequence[str]) -> str:
        rows = [row for name in features if (row := self._rows.get(name)) is not None]
        # adds row by row, in the order of the features
        return self._classes[int(self._table[rows].sum(axis=0).argmax())]


def _shape(word: str) -> str:
    """What the tagger sees of a word beside its letters."""
    if "-" in word and word[0] != "-":
        return "!HYPHEN"
    if word.isdigit() and len(word) == 4:
        return "!YEAR"
    return "!DIGITS" if word[:1].isdigit() else word.lower()


def _features(word: str, around: Sequence[str], last: str, before_last: str) -> tuple[str, ...]:
    """The features of a word, named as in NLTK's weights; ``around`` are five shapes."""
    two_left, left, middle, right, two_right = around
    return (
        "bias",
        f"i suffix {word[-3:]}",
        f"i pref1 {word[:1]}",
        f"i-1 tag {last}",
        f"i-2 tag {before_last}",
        f"i tag+i-2 tag {last} {before_last}",
        f"i word {middle}",
        f"i-1 tag+i word {last} {middle}",
        f"i-1 word {left}",
        f"i-1 suffix {left[-3:]}",
        f"i-2 word {two_left}",
        f"i+1 word {right}",
        f"i+1 suffix {right[-3:]}",
        f"i+2 word {two_right}",
    )


@lru_cache(maxsize=1)
def load_tagger() -> Tagger:
    """NLTK's English tagger from the folders that NLTK searches (``NLTK_DATA`` first).

    Raises:
        InputError: if its data are missing or damaged.
    """
    from nltk.tag.perceptron import PerceptronTagger

    try:
        loaded = PerceptronTagger()
        return Tagger(loaded.model.weights, loaded.tagdict, loaded.classes)
    except Exception as error:  # noqa: BLE001 - each kind of damage raises errors of its own
        raise _unusable(TAGGER, error) from None


def load_language_data() -> Tagger:
    """The tagger, after a look that the sentence splitter is there too.

    Raises:
        InputError: if either is missing or damaged.
    """
    from nltk.tokenize import sent_tokenize

    tagger = load_tagger()
    try:
        sent_tokenize("One sentence. Another one.")
    except Exception as error:  # noqa: BLE001 - each kind of damage raises errors of its own
        raise _unusable(SENTENCE_SPLITTER, error) from None
    return tagger


def _unusable(package: str, error: Exception) -> InputError:
    import nltk

    what = "part-of-speech tagger" if package == TAGGER else "sentence splitter"
    if type(error) is LookupError:
        problem = f"is in none of the folders {', '.join(nltk.data.path)}; run"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"cannot be read from {nltk.data.find(package)} ({reason}); remove it and run"
    return InputError(
        f"syntax masking needs NLTK's English {what} ({package}), which {problem} `python -m "
        "frugal.clipa.nltk_data` once, set NLTK_DATA to a folder that has it, or choose random, "
        "block or frequency masking, which need no such data"
    )
