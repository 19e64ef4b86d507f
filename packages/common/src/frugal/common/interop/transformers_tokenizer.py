"""Our tokenizers as tokenizers of the transformers library."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.vocabularies import Transformers, read_entries
from frugal.common.errors import InputError


def as_transformers(tokenizer: Tokenizer, *, length: int) -> Any:
    """A tokenizer of transformers that gives the same ids.

    Characters that captions seldom hold are the exception: transformers' CLIP tokenizer resolves
    no entities (``&amp;``) and repairs no broken encodings, and WordPiece differs on a few hundred
    code points outside of Latin script.

    Args:
        tokenizer: ours.
        length: tokens of a caption, special tokens included.

    Raises:
        InputError: if transformers has no fast form of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder)
        tokenizer.save(saved)  # its files tell what it is
        if (saved / "merges.txt").exists():
            return _clip(saved / "merges.txt", length)
        if (saved / "vocab.txt").exists():
            backend = _word_pieces(read_entries(saved / "vocab.txt"))
        else:
            backend = _backend(saved / Transformers.folder)
    return _with_special_tokens(backend, tokenizer, length)


def save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of transformers so that every version of it finds the class."""
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    if content["tokenizer_class"] == "TokenizersBackend":  # as version 5 calls it
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.write_text(json.dumps(content, indent=2) + "\n")


def _clip(path: Path, length: int) -> Any:
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
    merges: Any = [tuple(line.split()) for line in lines]
    symbols = list(bytes_to_unicode().values())
    entries = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    ids = {entry: number for number, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)


def _word_pieces(entries: list[str]) -> Any:
    """WordPiece with the rules of TensorFlow Text, as near as the tokenizers library has them."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    ids = {entry: number for number, entry in enumerate(entries)}
    backend = Backend(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
    # what case folding changes and lower case leaves: sharp s, final sigma
    folded = [("\u00df", "ss"), ("\u1e9e", "ss"), ("\u03c2", "\u03c3")]
    backend.normalizer = normalizers.Sequence(
        [
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
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the tokenizer of this run ({type(loaded).__name__}) has no fast form in "
            "transformers, which its export needs; export with --to frugal"
        )
    return backend


def _with_special_tokens(backend: Any, tokenizer: Tokenizer, length: int) -> Any:
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
    end = {} if tokenizer.end_id is None else {"eos_token": name[tokenizer.end_id]}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=backend.id_to_token(tokenizer.pad_id),
        model_max_length=length,
        padding_side="right",
        truncation_side="right",
        **end,
    )
