"""The vocabularies behind the tokenizers, and the rules that turn text into their entries."""

from __future__ import annotations

import gzip
import heapq
import html
import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import ftfy
import regex

from frugal.common.errors import InputError
from frugal.common.files import read_bytes, write_file

_CACHED_WORDS = 1 << 17
"""Words whose ids are remembered; the words of captions repeat."""
_LONGEST_CACHED = 64
"""Characters of a word that is remembered."""


class Vocabulary(Protocol):
    """What a tokenizer asks of a vocabulary."""

    @property
    def size(self) -> int:
        """Entries."""
        ...

    def encode(self, text: str) -> list[int]:
        """The content as ids, without special tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write what ``load(folder)`` reads."""
        ...


class WordCache:
    """The ids of words, computed once; forgets everything when it has grown too large."""

    def __init__(self) -> None:
        self._ids: dict[str, list[int]] = {}

    def get(self, word: str) -> list[int] | None:
        """The ids, or None if they must be computed."""
        return self._ids.get(word)

    def put(self, word: str, ids: list[int]) -> list[int]:
        """Remember the ids, and return them."""
        if len(self._ids) >= _CACHED_WORDS:
            self._ids.clear()
        if len(word) <= _LONGEST_CACHED:
            self._ids[word] = ids
        return ids


@lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """A printable character for every byte: itself where it prints, else one from 256 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(256 + place) for place, byte in enumerate(others)}


def clean_caption(text: str) -> str:
    """Text with its encoding repaired, entities resolved, white space joined, in lower case."""
    # all but the last line leaves printable ASCII without entities alone: 9 in 10 captions
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class BytePairs:
    """CLIP's vocabulary: bytes, bytes that end a word, merges, start and end of text.

    Sources: Sennrich et al., arXiv:1508.07909; Radford et al., arXiv:2103.00020.
    """

    num_merges = 48_894
    special_tokens = ("<start_of_text>", "<end_of_text>")

    def __init__(self, merges: list[str]) -> None:
        self._merges = merges
        pairs = [(first, second) for first, second in map(str.split, merges)]
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        symbols = list(_byte_symbols().values())
        words = [symbol + "</w>" for symbol in symbols]
        self._entries = symbols + words + ["".join(pair) for pair in pairs]
        self._entries += self.special_tokens
        self._ids = {entry: number for number, entry in enumerate(self._entries)}
        self._pattern = regex.compile(
            "|".join(self.special_tokens)
            + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self._cache = WordCache()

    @classmethod
    @lru_cache(maxsize=1)  # a run asks for it several times
    def from_open_clip(cls) -> BytePairs:
        """The vocabulary that open_clip_torch carries."""
        # the package's folder is found without importing it: that would import torch
        package = importlib.util.find_spec("open_clip")
        assert package is not None and package.origin is not None
        path = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        return cls(lines[1 : 1 + cls.num_merges])  # after a line that names the version

    @property
    def size(self) -> int:
        """Entries."""
        return len(self._entries)

    @property
    def entries(self) -> list[str]:
        """Bytes, bytes that end a word, merges, start and end of text, by their ids."""
        return list(self._entries)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs that are joined, the first ones first."""
        return list(self._ranks)

    @property
    def special_ids(self) -> tuple[int, int]:
        """Start and end of text."""
        return self.size - 2, self.size - 1

    def encode(self, text: str) -> list[int]:
        """The content as ids; a literal ``<end_of_text>`` is the special token, as in open_clip.

        There the text ends for the model: ``frugal.common.data.tokenizers.text_length``.
        """
        ids: list[int] = []
        for word in self._pattern.findall(clean_caption(text)):
            ids += self._cache.get(word) or self._cache.put(word, self._encode_word(word))
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if word in self.special_tokens:
            return [self._ids[word]]
        symbols = [_byte_symbols()[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        return [self._ids[symbol] for symbol in merge_symbols(symbols, self._ranks)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens left out."""
        symbols = "".join(self._entries[token] for token in ids if token not in self.special_ids)
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        words = (bytes(byte_of[symbol] for symbol in word) for word in symbols.split("</w>"))
        return " ".join(word.decode(errors="replace") for word in words).strip()

    def save(self, folder: Path) -> None:
        """Write ``merges.txt``."""
        text = "\n".join(["#version: 0.2", *self._merges, ""])
        write_file(folder / "merges.txt", text)

    @classmethod
    def load(cls, folder: Path) -> BytePairs:
        """The vocabulary saved in a folder."""
        merges = read_bytes(folder / "merges.txt").decode("utf-8").split("\n")[1:-1]
        if odd := next((line for line in merges if len(line.split()) != 2), None):
            raise ValueError(f"merges.txt holds {odd[:40]!r}, which is no pair")
        return cls(merges)

    def __getstate__(self) -> list[str]:
        return self._merges

    def __setstate__(self, merges: list[str]) -> None:
        vars(self).update(vars(BytePairs(merges)))


def merge_symbols(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The symbols of a word with pairs joined, the pair of the lowest rank everywhere first.

    Time grows with n log n: a caption may hold one word of many thousand letters.
    """
    count = len(symbols)
    following = list(range(1, count + 1))  # the place of the next symbol; joined ones are skipped
    before = list(range(-1, count - 1))
    places: dict[int, list[int]] = {}  # where the pair of a rank begins, perhaps no longer
    heap: list[int] = []

    def add(place: int) -> None:
        rank = ranks.get((symbols[place], symbols[following[place]]))
        if rank is not None:
            if rank not in places:
                places[rank] = []
                heapq.heappush(heap, rank)
            places[rank].append(place)

    for place in range(count - 1):
        add(place)
    while heap:
        rank = heapq.heappop(heap)
        joined = []
        for place in sorted(places.pop(rank)):  # from the left
            after = following[place]
            if after == count or ranks.get((symbols[place], symbols[after])) != rank:
                continue  # a neighbor has taken one of the two
            symbols[place] += symbols[after]
            symbols[after] = ""
            following[place] = following[after]
            if following[after] < count:
                before[following[after]] = place
            joined.append(place)
        for place in joined:
            if (previous := before[place]) >= 0:
                add(previous)
            if following[place] < count:
                add(place)
    return [symbol for symbol in symbols if symbol]


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "merges.txt", "*.model")
"""Of which a folder holds at least one if transformers can make a tokenizer of it."""


class Transformers:
    """A tokenizer of the transformers library."""

    folder = "hugging_face"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name: str) -> Transformers:
        """The tokenizer of a folder or of a name on the hub.

        Raises:
            InputError: if there is none, or the hub cannot be reached.
        """
        is_folder = Path(name).is_dir()
        if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise InputError(
                f"there is no folder {name}; give a folder that holds a tokenizer, or a name on "
                "the Hugging Face hub"
            )
        from transformers import AutoTokenizer

        if is_folder and not any(any(Path(name).glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise InputError(
                f"the folder {name} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy its "
                "files there from where the model comes from"
            )
        source = f"the folder {name}" if is_folder else f"the Hugging Face hub's {name!r}"
        try:
            # a "[SEP]" that somebody wrote into a caption is text, and never ends it
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False, split_special_tokens=True
            )
        except Exception as error:  # noqa: BLE001 - each kind of file raises errors of its own
            raise InputError(
                f"no tokenizer could be loaded from {source} ({first_line(error)}); give a "
                "folder that holds one, or a name while the hub can be reached"
            ) from None
        # transformers 5 ignores a vocabulary that it does not find, or is given as vocab_file=
        if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
            raise InputError(
                f"the tokenizer of {source} knows no words, only {len(tokenizer)} special tokens; "
                "save it again with its vocabulary (BertTokenizer takes vocab=, not vocab_file=)"
            )
        split_special_pieces(tokenizer)
        return cls(tokenizer)

    @property
    def size(self) -> int:
        """Entries, added tokens included."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def pad_id(self) -> int:
        """The padding token; where the tokenizer has none its end of text, or else 0."""
        candidates = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def surroundings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and behind a text.

        Raises:
            InputError: if it does anything else to a text.
        """
        content = self.encode("a")
        whole = self._tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(content) + 1):
            stop = start + len(content)
            if content and whole[start:stop] == content:
                return tuple(whole[:start]), tuple(whole[stop:])
        raise InputError(
            f"the tokenizer {self._tokenizer.name_or_path} does not put its special tokens before "
            "or behind a text; choose one that does"
        )

    def encode(self, text: str) -> list[int]:
        """The content as ids; special tokens written out in it are ordinary text."""
        if not text.isascii():
            text = text.encode(errors="replace").decode()  # a lone surrogate is no text
        # a caption beyond the tokenizer's own limit is cut later, hence no warning
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def save(self, folder: Path) -> None:
        """Write the tokenizer's own files into a folder of their own."""
        self._tokenizer.save_pretrained(folder / self.folder)

    @classmethod
    def load(cls, folder: Path) -> Transformers:
        """The tokenizer saved in a folder."""
        return cls.from_pretrained(str((folder / cls.folder).resolve()))


def split_special_pieces(tokenizer: Any) -> None:
    """Keep text that looks like a special token apart from it, where it is an entry like others.

    Unigram and word-level vocabularies hold ``</s>`` among their pieces, and would find it in a
    caption even where special tokens are split. A cut behind its first character prevents that.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ not in ("Unigram", "WordLevel"):
        return
    from tokenizers import Regex, pre_tokenizers

    special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    cuts = [rf"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in special]
    if cuts:
        cut = pre_tokenizers.Split(Regex("|".join(cuts)), behavior="isolated")
        before = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])


def first_line(error: Exception) -> str:
    """What an error says, without its explanations."""
    return str(error).strip().partition("\n")[0].rstrip(".")
