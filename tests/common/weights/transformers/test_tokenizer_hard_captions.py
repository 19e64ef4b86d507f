"""Captions as the web has them: our ids, open_clip's, and those of exported tokenizers."""

from __future__ import annotations

import io
import time
from itertools import chain
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, T5Tokenizer

from frugal.common.data.sample_transform import Collator, SampleTransform
from frugal.common.data.samples import RawSample
from frugal.common.data.tokenizers import ClipBpe, HuggingFace, Tokenizer, WordPiece, text_length
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.evaluation.embed import Embedder
from frugal.common.reduction.text import Truncate
from frugal.common.weights.transformers.tokenizer import as_transformers, differences, save

GOLDEN = Path(__file__).parents[3] / "golden" / "flip"
LENGTH = 77
HARD = [
    # quotes, dashes and marks of word processors
    "\u2018single\u2019 and \u201cdouble\u201d",
    "it\u2019s Ana\u2019s",
    "\u201alow\u2018 \u201elow\u201c",
    "rock \u2019n\u2019 roll",
    "\u02bcokina",
    "a \u2013 b \u2014 c \u2026",
    "\u00abquoted\u00bb",
    "5\u2032 6\u2033",
    # entities, once and twice
    "fish &amp; chips",
    "fish &amp;amp; chips",
    "&lt;b&gt;bold&lt;/b&gt;",
    "&amp;lt;b&amp;gt;",
    "&quot;quoted&quot;",
    "Tom&#39;s",
    "Tom&#x27;s &#X27;",
    "Tom&apos;s",
    "&nbsp;x&nbsp;y",
    "caf&eacute;",
    "&copy; 2020 &reg; &trade;",
    "&hellip; &ndash; &mdash;",
    "&ldquo;hi&rdquo; &lsquo;s&rsquo;",
    "&amp;quot;twice&amp;quot;",
    "&amp;amp;lt;thrice",
    "5 &#8364; &euro; 5",
    "a&b R&D AT&T; x &",
    "&#8220;numbers&#8221;",
    "&amp;#39;s",
    "&AMP; &LT;x&GT; &QUOT;",
    "&#038;",
    "1 &lt; 2",
    "a <b> tag",
    # ligatures, widths, compositions
    "\ufb01sh \ufb02at \ufb00 \ufb03 \ufb04",
    "\ufb05 \ufb06",
    "\uff26\uff35\uff2c\uff2c\u3000\uff37idth",
    "\uff11\uff12\uff13\uff01\uff1f",
    "\uff76\uff9e\uff97\uff7d",
    "cafe\u0301 e\u0301\u0301 n\u0303",
    "\u212b \u2126",
    "\u1e9b\u0323",
    "\u0132 \u0149 \u01c4",
    "\u00bd \u00b2 \u2460 \u2162",
    "\uffe5100",
    # letters
    "Stra\u00dfe STRASSE \u1e9e",
    "\u0130stanbul I\u0131",
    "\u03a3\u0391\u03a3 \u039f\u0394\u039f\u03a3 \u03a3",
    "\u0441\u043e\u0431\u0430\u043a\u0430 \u0421\u041e\u0411\u0410\u041a\u0410",
    "\u4f60\u597d\u4e16\u754c \u732b",
    "\u3053\u3093\u306b\u3061\u306f\u30cd\u30b3",
    "\uac15\uc544\uc9c0 \u1100\u1161",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd \u200f123",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "we'll they're I'D don't 'S it'\u017f",
    "\u0661\u0662\u0663 1234 5G",
    # emoji and symbols
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\U0001f1e9\U0001f1ea flag",
    "\U0001f44d\U0001f3fd ok",
    "\u2615 coffee\u2122",
    "!!! ??? ... -- __ ##",
    "a/b\\c|d~e^f",
    "#dog @cat $5 50%",
    # controls, white space, what nobody sees
    "a\0b",
    "bell\x07 \x1b[31mred\x1b[0m",
    "tabs\tand\r\nlines\n",
    "  many   spaces  ",
    "a\u00a0b\u2003c\u3000d",
    "line\u2028para\u2029end",
    "zero\u200bwidth\u200d joiner",
    "\ufeffmark",
    "soft\u00adhyphen",
    "\u202ertl\u202c",
    "\x85next",
    "smart \x93quotes\x94 \x96 \x80",
    "\ufffcobject \u2060word",
    "a\x1cb\x1fc",
    "",
    "   ",
    # long, and like special tokens
    "word" * 60,
    "x" * 300,
    "a b " * 100,
    "\u4f60" * 200,
    "https://example.com/a_b-c?d=e&f=g#h",
    "IMG_2020.jpg",
    "<|endoftext|> <|startoftext|>",
    "a <end_of_text> b",
    "<start_of_text> x <END_OF_TEXT>",
    "&lt;end_of_text&gt; y",
    "[CLS] a [SEP] b [PAD] [UNK] [MASK]",
    "<s> a </s> <pad> <unk> <mask> <extra_id_0>",
]
DIFFERENT = {
    "broken encoding": [
        "caf\u00c3\u00a9",
        "\u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
        "it\u00e2\u20ac\u2122s",
    ],
    "other entities": ["&alpha; &checkmark;", "&#20320;"],
    "no semicolon": ["&copy 2020", "fish &amp chips"],
    "capitals": ["P&EACUTE;REZ"],
    "behind a <": ["a <b> &ldquo;x&rdquo;"],
    "behind punctuation": ["!!<end_of_text> a"],
    "Hangul": ["\uffa1"],
}
"""Of each kind that the model card names."""


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return ClipBpe().load()


@pytest.fixture(scope="module")
def exported_clip(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save(as_transformers(clip, length=LENGTH), folder)
    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.assemble(tokenizer.encode(text), LENGTH)


def test_the_corpus_is_large() -> None:
    assert len(set(HARD)) == len(HARD) >= 80


@pytest.mark.parametrize("text", [*HARD, *chain(*DIFFERENT.values())], ids=ascii)
def test_our_ids_are_open_clip_s(clip, text):
    ids = ids_of(clip, text)
    expected = open_clip.tokenize([text])[0]
    assert ids + [0] * (LENGTH - len(ids)) == expected.tolist()
    # open_clip pools the highest id, and so the first end of text
    assert text_length(ids, clip) - 1 == int(expected.argmax())


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_the_exported_tokenizer_gives_our_ids(clip, exported_clip, text):
    assert exported_clip(text, truncation=True)["input_ids"] == ids_of(clip, text)


def test_what_the_exported_tokenizer_reads_otherwise_is_what_the_card_names(clip, exported_clip):
    for kind, texts in DIFFERENT.items():
        for text in texts:
            same = exported_clip(text, truncation=True)["input_ids"] == ids_of(clip, text)
            assert not same, (kind, text)
    card = differences(clip)
    for word in ("broken encodings", "Hangul", "semicolon", "capitals", "`<`", "AutoTokenizer"):
        assert word in card


def test_exported_byte_pairs_are_padded_and_decoded_as_those_of_clip(exported_clip):
    made = exported_clip(["a cat", "a"], padding=True, return_tensors="pt")
    assert made["input_ids"].tolist() == [[49406, 320, 2368, 49407], [49406, 320, 49407, 49407]]
    assert made["attention_mask"].sum(1).tolist() == [4, 3]
    text = exported_clip.decode(made["input_ids"][0], skip_special_tokens=True)
    assert text.strip() == "a cat"


def test_the_model_pools_where_open_clip_does(clip):
    text = "a <end_of_text> b c"
    place = int(open_clip.tokenize([text])[0].argmax())
    assert place == 2
    seen = []

    class Model(torch.nn.Module):
        def encode_text(self, ids, lengths):
            seen.append(lengths.tolist())
            return torch.ones(len(ids), 2)

    embedder = Embedder(Model(), clip, context_length=LENGTH, device=torch.device("cpu"))
    embedder.texts([text, "a b"])
    assert seen == [[place + 1, 4]]
    transform = SampleTransform(
        seed=0, augmentation=RandomResizedCrop(), image_size=(8, 8), tokenizer=clip,
        text=Truncate(), text_length=LENGTH,
    )  # fmt: skip
    collator = Collator(transform, np.zeros(1, np.int64))
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    collator.add("key", RawSample(image.getvalue(), [text]))
    assert collator.fields()["text_lengths"].tolist() == [place + 1]


# ------------------------------------------------------------------------------------------------
# text is never a special token


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bert) -> dict[str, Path]:
    """Tokenizers of other libraries, by kind."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaTokenizer

    folder = tmp_path_factory.mktemp("kinds")
    letters = "abcdefghijklmnopqrstuvwxyzSEPCLUNKMA<>/[]|_0"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.5)]
    pieces += [(f"\u2581{letter}", -2.0) for letter in letters]
    pieces += [(letter, -3.0) for letter in letters]
    T5Tokenizer(vocab=pieces, extra_ids=3).save_pretrained(folder / "t5")
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *pre_tokenizers.ByteLevel.alphabet()]
    entries = {name: number for number, name in enumerate(names)}
    RobertaTokenizer(vocab=entries, merges=[]).save_pretrained(folder / "roberta")
    words = Backend(
        models.WordLevel({"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "a": 3}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]"
    ).save_pretrained(folder / "words")
    return {"bert": bert} | {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["bert", "t5", "roberta", "words"])
def test_text_is_never_a_special_token_here_or_in_the_export(kind, folders, tmp_path):
    tokenizer = HuggingFace(name=str(folders[kind])).load()
    theirs = AutoTokenizer.from_pretrained(folders[kind])
    special = set(theirs.all_special_ids) - {theirs.unk_token_id}
    save(as_transformers(tokenizer, length=LENGTH), tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for text in (f"a {token} b{token}" for token in theirs.all_special_tokens):
        content = tokenizer.encode(text)
        assert content and special.isdisjoint(content), text
        assert exported(text)["input_ids"] == ids_of(tokenizer, text)
    assert special & set(theirs(f"a {theirs.pad_token}")["input_ids"])  # as they would be read


def test_word_pieces_of_hard_captions_are_exported(tmp_path):
    tokenizer = WordPiece(vocab=GOLDEN / "bert_uncased_vocab.txt").load()
    save(as_transformers(tokenizer, length=LENGTH), tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    other = [t for t in HARD if exported(t, truncation=True)["input_ids"] != ids_of(tokenizer, t)]
    assert not other
    assert "outside of Latin script" in differences(tokenizer)


# ------------------------------------------------------------------------------------------------
# long words


@pytest.mark.parametrize("word", ["a" * 1500, "abcab" * 300, "\u4f60\u597d" * 250, "!?" * 700])
def test_long_words_keep_open_clip_s_ids(clip, word):
    assert clip.encode(word) == open_clip.tokenizer.SimpleTokenizer().encode(word)


def test_a_word_of_a_hundred_thousand_letters_takes_no_minutes(clip):
    started = time.process_time()
    assert len(clip.encode("qwertyuiop" * 10_000)) > 10_000
    assert time.process_time() - started < 5  # 3 minutes where time grows with the square
    assert clip.encode("x" * 50_000)[:500] == clip.encode("x" * 10_000)[:500]
