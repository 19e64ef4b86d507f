"""Captions to token ids and back: CLIP's byte pairs, Hugging Face tokenizers, plain WordPiece.

A recipe holds one of the frozen configurations; ``load()`` reads the vocabulary and returns a
:class:`Tokenizer`. A tokenizer can be pickled (loader workers) and saved as a folder of text
files that needs neither the network nor the file it was made from.

Weights mean nothing with the ids of another tokenizer; :func:`token_difference` says how two
differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frugal.common.data.vocabularies import BytePairs, Transformers, Vocabulary
from frugal.common.data.word_pieces import WordPieces, bert_vocabulary, read_entries
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, reason_of, write_json
from frugal.common.ranges import Count, check_ranges

_DESCRIPTION = "tokenizer_description.json"
_KINDS: dict[str, type[BytePairs] | type[Transformers] | type[WordPieces]] = {
    "clip_bpe": BytePairs,
    "hugging_face": Transformers,
    "word_piece": WordPieces,
}


class Tokenizer:
    """Text to token ids, and what surrounds them in a caption of limited length."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        pad_id: int,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        """Entries; the embedding table has at least as many rows."""
        self.pad_id = pad_id
        """What fills the right of a caption."""
        self.prefix = tuple(prefix)
        """Special tokens in front of the content."""
        self.suffix = tuple(suffix)
        """Special tokens behind the content; they stay when the content is cut."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What turns text into ids."""
        return self._vocabulary

    @property
    def end_id(self) -> int | None:
        """The last token of every caption, where there is one."""
        return self.suffix[-1] if self.suffix else None

    def encode(self, text: str) -> list[int]:
        """Token ids of the content, without special tokens and without a limit."""
        return self._vocabulary.encode(text)

    def assemble(self, ids: Sequence[int], length: int) -> list[int]:
        """At most ``length`` ids: the first of the content that fit, and the special tokens.

        Raises:
            InputError: if the special tokens leave no room.
        """
        room = length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise InputError(
                f"a text length of {length} leaves no room for words beside "
                f"{len(self.prefix) + len(self.suffix)} special tokens; choose a longer one"
            )
        return [*self.prefix, *ids[:room], *self.suffix]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some token ids, special tokens left out, for people to read."""
        return self._vocabulary.decode([int(token) for token in ids])

    def save(self, folder: Path) -> None:
        """Write everything :func:`load_tokenizer` needs into a folder, made if missing."""
        self._vocabulary.save(folder)
        kind = next(name for name, kind in _KINDS.items() if isinstance(self._vocabulary, kind))
        description = {
            "kind": kind,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "prefix": self.prefix,
            "suffix": self.suffix,
        }
        write_json(folder / _DESCRIPTION, description)


def text_length(ids: Sequence[int], tokenizer: Any) -> int:
    """How many of the ids of a caption are its text: all, or up to the first end of text.

    A caption may hold the word ``<end_of_text>``, which open_clip reads as the token, and the first
    of them is the one that it pools.
    """
    end = getattr(tokenizer, "end_id", None)
    return list(ids).index(end) + 1 if end is not None and end in ids else len(ids)


def padded(
    captions: Sequence[Sequence[int]], tokenizer: Tokenizer, *, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """(B, length) int64 token ids, padded on the right, and (B,) int64 tokens of each text.

    Args:
        captions: token ids, special tokens included; at most ``length`` of each.
        tokenizer: that they are of.
        length: tokens that a text tower takes; by default those of the longest text, but one, as a
            tokenizer without special tokens makes none of an empty text.
    """
    length = max(1, *map(len, captions)) if length is None else length
    token_ids = torch.full((len(captions), length), tokenizer.pad_id, dtype=torch.int64)
    lengths = torch.zeros(len(captions), dtype=torch.int64)
    for row, ids in enumerate(captions):
        token_ids[row, : len(ids)] = torch.as_tensor(ids)
        lengths[row] = text_length(ids, tokenizer)
    return token_ids, lengths


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in a folder.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    path = folder / _DESCRIPTION
    try:
        description = parse_json(read_bytes(path))
        vocabulary = _KINDS[description.pop("kind")].load(folder)
        size = description.pop("vocab_size")
        tokenizer = Tokenizer(vocabulary, **description)
    except OSError as error:
        where = error.filename or path
        raise InputError(
            f"there is no complete tokenizer in {folder} ({where}: {reason_of(error)}); "
            "give the tokenizer folder of a run"
        ) from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} does not describe a tokenizer ({reason_of(error)}); copy the folder from the "
            "run again"
        ) from None
    if tokenizer.vocab_size != size:
        raise InputError(
            f"the vocabulary in {folder} has {tokenizer.vocab_size} entries instead of the {size} "
            "it was saved with; copy the folder from the run again"
        )
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class ClipBpe:
    """CLIP's byte pairs, 49,408 entries, with the vocabulary that open_clip carries."""

    def load(self) -> Tokenizer:
        """The tokenizer; equal to ``open_clip.get_tokenizer`` at every text length."""
        vocabulary = BytePairs.from_open_clip()
        start, end = vocabulary.special_ids
        return Tokenizer(vocabulary, pad_id=0, prefix=(start,), suffix=(end,))


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """Any tokenizer that transformers can load."""

    name: str
    """A folder, or a name on the Hugging Face hub."""
    class_token: bool = True
    """Keep what the tokenizer puts before a text: [CLS], <s>."""
    separator: bool = True
    """Keep what the tokenizer puts behind a text: [SEP], </s>."""

    def load(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: if the folder or name holds none, or the hub cannot be reached.
        """
        vocabulary = Transformers.from_pretrained(self.name)
        prefix, suffix = vocabulary.surroundings()
        return Tokenizer(
            vocabulary,
            pad_id=vocabulary.pad_id,
            prefix=prefix if self.class_token else (),
            suffix=suffix if self.separator else (),
        )


@dataclass(frozen=True, kw_only=True)
class WordPiece:
    """Uncased WordPiece with TensorFlow Text's rules, as FLIP was trained (its spec, 3.1).

    FLIP's embedding table has one row more than the vocabulary; no text ever reaches it.
    """

    vocab: Path | None = None
    """A file with one entry per line, or the folder of a Hugging Face BERT tokenizer; without it
    BERT's uncased vocabulary is fetched from the hub."""
    entries: Count | None = None
    """Lines the file must have: 30522 for BERT's uncased vocabulary; without it any number."""
    class_token: bool = False
    """Put [CLS] in front of the text; no published FLIP run did."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.tokenizer")

    def load(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: if the vocabulary cannot be had or is not one.
        """
        path = bert_vocabulary() if self.vocab is None else self.vocab
        entries = read_entries(path)
        if self.entries not in (None, len(entries)):
            raise InputError(
                f"the vocabulary {path} has {len(entries)} lines instead of {self.entries}; give "
                "the complete file that the model was made for"
            )
        needed = ["[PAD]", "[UNK]", "[CLS]"] if self.class_token else ["[PAD]", "[UNK]"]
        if missing := [token for token in needed if token not in entries]:
            raise InputError(
                f"the vocabulary {path} has no {missing[0]} among its {len(entries)} lines; give a "
                "WordPiece vocabulary with one entry per line"
            )
        prefix = (entries.index("[CLS]"),) if self.class_token else ()
        return Tokenizer(WordPieces(entries), pad_id=entries.index("[PAD]"), prefix=prefix)


@dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
    """The tokenizer that a run keeps; needs neither the network nor the file it was made from."""

    folder: Path
    """``tokenizer/`` of a run directory."""

    def load(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: if there is none, or it is damaged.
        """
        return load_tokenizer(self.folder)


TokenizerConfig = ClipBpe | HuggingFace | WordPiece | SavedTokenizer


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
            difference = f"{words} {_named(there, name)} there and {_named(here, name)} here"
            return Difference(difference, of_odd_texts=False)
    if odd := _other_ids(_PLAIN, there, here):
        return Difference(odd, of_odd_texts=False)
    if type(there._vocabulary) is type(here._vocabulary) and (row := _other_entry(there, here)):
        return Difference(row, of_odd_texts=False)
    if odd := _other_ids(_ODD, there, here):
        return Difference(odd, of_odd_texts=True)
    return None


def _named(tokenizer: Tokenizer, place: str) -> str:
    """The special tokens at one end of a caption."""
    ids: tuple[int, ...] = getattr(tokenizer, place)
    return f"the special token {', '.join(map(str, ids))}" if ids else "no special token"


def _other_ids(texts: tuple[str, ...], there: Tokenizer, here: Tokenizer) -> str | None:
    for text in texts:
        ids_there, ids_here = there.encode(text), here.encode(text)
        if ids_there != ids_here:
            return f"makes {ids_there[:8]} of {text!r} there and {ids_here[:8]} here"
    return None


def _other_entry(there: Tokenizer, here: Tokenizer) -> str | None:
    """The first id that stands for another text."""
    for token in range(min(there.vocab_size, here.vocab_size)):
        text_there, text_here = there.decode([token]), here.decode([token])
        if text_there != text_here:
            return f"writes {text_there!r} as {token} there, which stands for {text_here!r} here"
    return None
