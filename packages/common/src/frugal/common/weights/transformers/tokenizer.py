"""Our tokenizers as tokenizers of the transformers library."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.vocabularies import BytePairs, Transformers, split_special_pieces
from frugal.common.data.word_pieces import WordPieces
from frugal.common.errors import InputError
from frugal.common.weights.transformers.clip_normalizer import DIFFERENCES as CLIP_DIFFERENCES
from frugal.common.weights.transformers.clip_normalizer import clip_normalizer

CLEAN_UP = (
    "open_clip repairs encodings, resolves HTML entities and joins white space before it gives a "
    "caption to a tokenizer of transformers"
)


def as_transformers(tokenizer: Tokenizer, *, length: int) -> Any:
    """A tokenizer of transformers that gives the same ids, but for :func:`differences`.

    Args:
        tokenizer: ours.
        length: tokens of a caption, special tokens included.

    Raises:
        InputError: if transformers has no fast form of it.
    """
    vocabulary = tokenizer.vocabulary
    if isinstance(vocabulary, BytePairs):
        return _clip(tokenizer, vocabulary, length)
    if isinstance(vocabulary, WordPieces):
        return _with_special_tokens(_word_pieces(vocabulary.entries), tokenizer, length)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return _with_special_tokens(_backend(Path(folder) / Transformers.folder), tokenizer, length)


def differences(tokenizer: Tokenizer) -> str:
    """In which captions the exported tokenizer gives other tokens, for a model card; or ""."""
    if isinstance(tokenizer.vocabulary, BytePairs):
        return (
            f"Captions become the tokens of open_clip, with these exceptions: {CLIP_DIFFERENCES}. "
            "`CLIPTokenizer` would do less: load it with `AutoTokenizer` or the processor."
        )
    if isinstance(tokenizer.vocabulary, WordPieces):
        return (
            "Captions become the tokens of TensorFlow Text, but for some 800 characters "
            "outside of Latin script, and words of more than 100 bytes and at most 100 characters, "
            "which are unknown there."
        )
    return ""


def with_differences(usage: str, tokenizer: Tokenizer) -> str:
    """How to load a folder, in Markdown, with :func:`differences`."""
    return f"{usage.rstrip()}\n\n{differences(tokenizer)}".rstrip()


def save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of transformers so that every version of it finds the class."""
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    if content["tokenizer_class"] == "TokenizersBackend":  # as version 5 calls it
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.write_text(json.dumps(content, indent=2) + "\n")


def _clip(tokenizer: Tokenizer, vocabulary: BytePairs, length: int) -> Any:
    """open_clip's tokenizer: its special tokens are read where a caption holds their names.

    transformers' own ``CLIPTokenizer`` would put another clean-up in the place of the file's.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    entries, merges = vocabulary.entries, vocabulary.merges
    ids = {entry: number for number, entry in enumerate(entries)}
    backend = Backend(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
    backend.normalizer = clip_normalizer()
    words = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # bytes to text, and a space where a word ends
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    special = [AddedToken(name, special=True, normalized=True) for name in entries[-2:]]
    backend.add_special_tokens(special)
    start, end = special
    return _with_special_tokens(
        backend, tokenizer, length, split_special_tokens=False, bos_token=start, eos_token=end,
        pad_token=end, unk_token=end,
    )  # fmt: skip


def _word_pieces(entries: list[str]) -> Any:
    """WordPiece with the rules of TensorFlow Text, as near as the tokenizers library has them."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    ids = {entry: number for number, entry in enumerate(entries)}
    backend = Backend(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
    # what case folding changes and lower case leaves: sharp s, final sigma
    folded = [("\u00df", "ss"), ("\u1e9e", "ss"), ("\u03c2", "\u03c3")]
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[\\x00-\\x1f\\x7f-\\x9f]"), " "),
            normalizers.NFKC(),
            *(normalizers.Replace(letter, instead) for letter, instead in folded),
            normalizers.BertNormalizer(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _backend(folder: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    split_special_pieces(loaded)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the tokenizer of this run ({type(loaded).__name__}) has no fast form in "
            "transformers, which its export needs; export with --to frugal"
        )
    return backend


def _with_special_tokens(backend: Any, tokenizer: Tokenizer, length: int, **options: Any) -> Any:
    """What surrounds a caption here surrounds it there, and the same token pads it."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    name = {
        number: backend.id_to_token(number) for number in (*tokenizer.prefix, *tokenizer.suffix)
    }
    parts = [*(name[i] for i in tokenizer.prefix), "$A", *(name[i] for i in tokenizer.suffix)]
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{part}:0" for part in parts],
        special_tokens=[(token, number) for number, token in name.items()],
    )
    settings = {
        "pad_token": backend.id_to_token(tokenizer.pad_id),
        "split_special_tokens": True,  # what is written in a caption is text
        "padding_side": "right",
        "truncation_side": "right",
    }
    if tokenizer.end_id is not None:
        settings["eos_token"] = name[tokenizer.end_id]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=length, **settings | options
    )
