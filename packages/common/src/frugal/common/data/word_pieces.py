"""WordPiece with the rules of TensorFlow Text's ``BertTokenizer(lower_case=True)``."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import regex

from frugal.common.data.vocabularies import WordCache, first_line
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes, write_file

_LONGEST_WORD = 100
"""Bytes in UTF-8; longer words are unknown."""
_CJK = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f"
)


@lru_cache(maxsize=1)
def _patterns() -> tuple[Any, Any]:
    """What is a word (a punctuation character, an ideograph, or a run of others), and what goes."""
    alone = rf"!-/:-@\[-`{{-~\p{{P}}{_CJK}"
    words = regex.compile(rf"[{alone}]|[^\s{alone}]+")
    return words, regex.compile(r"\p{Default_Ignorable_Code_Point}+")


def fold_caption(text: str) -> str:
    """NFKC case-folded text without accents, control and format characters made spaces.

    Python has no NFKC_Casefold; these are the steps of its definition (Unicode, D145).
    """
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
        text = unicodedata.normalize("NFKC", text.casefold())
        text = unicodedata.normalize("NFD", _patterns()[1].sub("", text))
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    if text.isprintable():
        return text
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf") else c for c in text)


class WordPieces:
    """Greedy longest-match pieces of words (Wu et al., arXiv:1609.08144); "##" continues a word."""

    def __init__(self, entries: list[str]) -> None:
        self._entries = entries
        self._ids = {entry: number for number, entry in enumerate(entries)}
        self._unknown = self._ids["[UNK]"]
        self._longest = max(map(len, entries))
        self._cache = WordCache()

    @property
    def entries(self) -> list[str]:
        """Words and pieces of words by their ids."""
        return list(self._entries)

    @property
    def size(self) -> int:
        """Entries."""
        return len(self._entries)

    def encode(self, text: str) -> list[int]:
        """The content as ids; special tokens written out in it are ordinary text."""
        ids: list[int] = []
        for word in _patterns()[0].findall(fold_caption(text)):
            ids += self._cache.get(word) or self._cache.put(word, self._encode_word(word))
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if len(word.encode(errors="surrogatepass")) > _LONGEST_WORD:
            return [self._unknown]
        ids: list[int] = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            ends = range(min(len(word), start + self._longest), start, -1)
            stop = next((end for end in ends if mark + word[start:end] in self._ids), None)
            if stop is None:
                return [self._unknown]
            ids.append(self._ids[mark + word[start:stop]])
            start = stop
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The pieces joined to words; [PAD] and [CLS] left out."""
        pieces = (self._entries[token] for token in ids)
        words = " ".join(piece for piece in pieces if piece not in ("[PAD]", "[CLS]"))
        return words.replace(" ##", "")

    def save(self, folder: Path) -> None:
        """Write ``vocab.txt``."""
        write_file(folder / "vocab.txt", "\n".join([*self._entries, ""]))

    @classmethod
    def load(cls, folder: Path) -> WordPieces:
        """The vocabulary saved in a folder."""
        return cls(read_entries(folder / "vocab.txt"))


def read_entries(path: Path) -> list[str]:
    """The entries of a WordPiece vocabulary, by their ids.

    Args:
        path: a file with one entry per line, or the folder of a Hugging Face tokenizer, which
            holds it as ``vocab.txt`` or inside ``tokenizer.json``.

    Raises:
        InputError: if it cannot be read, is empty, or holds an entry twice.
    """
    if path.is_dir():
        if not (path / "vocab.txt").is_file():
            return _folder_entries(path / "tokenizer.json")
        path = path / "vocab.txt"
    lines = _read_text(path).removesuffix("\n").split("\n")
    if len(set(lines)) < len(lines):
        twice = Counter(lines).most_common(1)[0][0]
        raise InputError(
            f"the vocabulary {path} holds {twice!r} twice; give a text file with one entry per line"
        )
    return lines


def _folder_entries(path: Path) -> list[str]:
    """The entries that a ``tokenizer.json`` of Hugging Face numbers from 0 on."""
    try:
        model = parse_json(_read_text(path))["model"]
        entries = sorted(model["vocab"], key=model["vocab"].__getitem__)
        is_word_piece = model["type"] == "WordPiece"
    except (ValueError, KeyError, TypeError):
        is_word_piece, model, entries = False, {}, []
    if not is_word_piece or sorted(model["vocab"].values()) != list(range(len(entries))):
        raise InputError(
            f"{path} does not hold a WordPiece vocabulary; give a text file with one entry per "
            "line, or the folder of a BERT tokenizer"
        )
    return entries


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise InputError(
            f"the vocabulary {path} cannot be read ({error.strerror}); give a text file with one "
            "entry per line"
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"the vocabulary {path} is not UTF-8 text; give a text file with one entry per line"
        ) from None


def bert_vocabulary() -> Path:
    """BERT's uncased vocabulary from the Hugging Face hub, or from its cache on this machine.

    Raises:
        InputError: if the hub cannot be reached.
    """
    try:
        return Path(huggingface_hub.hf_hub_download("google-bert/bert-base-uncased", "vocab.txt"))
    except Exception as error:  # noqa: BLE001 - the client raises errors of every kind
        raise InputError(
            "BERT's uncased vocabulary could not be fetched from the Hugging Face hub "
            f"({first_line(error)}); give the file as the tokenizer's vocab"
        ) from None
