import json
import os
import pickle
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

from frugal.common.data import vocabularies, word_pieces
from frugal.common.data.tokenizers import (
    ClipBpe,
    HuggingFace,
    SavedTokenizer,
    Tokenizer,
    WordPiece,
    load_tokenizer,
    padded,
)
from frugal.common.errors import InputError
from support import run_code

GOLDEN = Path(__file__).parents[2] / "golden" / "flip"
BERT = GOLDEN / "bert_uncased_vocab.txt"
CAPTIONS = json.loads((GOLDEN / "tokenizer.json").read_text())["cases"]
ASCII = "".join(map(chr, range(32, 127)))
ODD_TEXTS = [
    "",
    "   ",
    "&lt;b&gt; fish &amp;amp; chips &quot;x&quot; &eacute;",
    "a <b> is &amp;amp;lt;b&amp;gt;",
    "caf\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
    "<start_of_text> hi <END_OF_TEXT>",
    "we'll they're I'D 'S it'\u017f",
    "tabs\tand\r\nlines\u2028and\u00a0spaces\x00\x1b[31m",
    "5G 1234 \u00bd \u0661\u0662 \u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469",
    "\uff26\uff35\uff2c\uff2c \ufb01ne e\u0301 \u0130stanbul STRASSE Stra\u00dfe",
    "lone \ud800 surrogate",
    "word" * 60,
    "[MASK] a [CLS] token [SEP] in text",
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return ClipBpe().load()


@pytest.fixture(scope="module")
def word_piece() -> Tokenizer:
    return WordPiece(vocab=BERT, entries=30522).load()


def random_texts(seed: int, count: int) -> list[str]:
    """Half printable ASCII, half any assigned characters of Unicode 15 and below."""
    rng = random.Random(seed)

    def character() -> str:
        while True:
            start, stop = rng.choice([(0, 0x250), (0x250, 0x3000), (0x3000, 0x20000)])
            drawn = chr(rng.randrange(start, stop))
            if unicodedata.category(drawn) not in ("Cn", "Co", "Cs"):
                return drawn

    texts = []
    for number in range(count):
        length = rng.randint(0, 60)
        if number % 2:
            texts.append("".join(rng.choice(ASCII) for _ in range(length)))
        else:
            texts.append(
                "".join(rng.choice((character(), " ", rng.choice(ASCII))) for _ in range(length))
            )
    return texts


# ------------------------------------------------------------------------------------------------
# CLIP


def test_clip_ids_equal_open_clip_at_every_length(clip: Tokenizer) -> None:
    open_clip = pytest.importorskip("open_clip")
    reference = open_clip.get_tokenizer("ViT-B-32")
    rng = random.Random(1)
    captions = [case["caption"] for case in CAPTIONS]
    for text in ODD_TEXTS + captions + random_texts(7, 1500) + ["a long one, " * 40]:
        length = rng.randint(8, 77)
        ids = clip.assemble(clip.encode(text), length)
        padded = ids + [clip.pad_id] * (length - len(ids))
        assert reference([text], context_length=length)[0].tolist() == padded, text


def test_clip_keeps_start_and_end_when_it_cuts(clip: Tokenizer) -> None:
    content = clip.encode("one two three four five six seven eight nine")
    assert clip.assemble(content, 5) == [49406, *content[:3], 49407]
    assert clip.assemble(content[:2], 5) == [49406, *content[:2], 49407]
    assert (clip.vocab_size, clip.end_id, clip.pad_id) == (49408, 49407, 0)


def test_clip_decodes_what_it_encoded(clip: Tokenizer) -> None:
    ids = clip.assemble(clip.encode("A  caf\u00e9, \u4f60\u597d &amp; 12"), 77)
    assert clip.decode(ids) == "a caf\u00e9 , \u4f60\u597d & 1 2"


def test_clip_loads_without_importing_transformers() -> None:
    code = (
        "import sys; from frugal.common.data.tokenizers import ClipBpe; "
        "ClipBpe().load().encode('a caf\u00e9'); sys.exit('transformers' in sys.modules)"
    )
    assert run_code(code).returncode == 0


def test_a_length_without_room_for_words_is_refused(clip: Tokenizer) -> None:
    with pytest.raises(InputError, match="text length of 2 leaves no room for words beside 2"):
        clip.assemble([1, 2, 3], 2)


# ------------------------------------------------------------------------------------------------
# WordPiece


@pytest.mark.parametrize("case", CAPTIONS, ids=lambda case: ascii(case["caption"])[:30])
def test_word_pieces_equal_tensorflow_text(case: dict, word_piece: Tokenizer) -> None:
    ids = word_piece.assemble(word_piece.encode(case["caption"]), case["max_len"])
    assert ids == case["ids"]


def test_the_recorded_captions_are_of_every_kind() -> None:
    captions = [case["caption"] for case in CAPTIONS]
    assert "" in captions
    assert any("[CLS]" in caption for caption in captions)
    assert any("[MASK]" in caption for caption in captions)
    assert any(100 in case["ids"] for case in CAPTIONS)
    assert any(len(case["ids"]) == case["max_len"] for case in CAPTIONS)  # cut
    assert any(not case["plain_hf_agrees"] for case in CAPTIONS)


def test_a_vocabulary_file_may_come_from_another_system(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(BERT.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n"))
    tokenizer = WordPiece(vocab=path, entries=30522).load()
    for case in CAPTIONS:
        ids = tokenizer.assemble(tokenizer.encode(case["caption"]), case["max_len"])
        assert ids == case["ids"]


def test_word_pieces_equal_transformers_on_folded_text(word_piece: Tokenizer) -> None:
    from transformers import BertTokenizer

    reference = BertTokenizer(
        vocab=str(BERT), do_lower_case=False, strip_accents=False, split_special_tokens=True
    )
    compared = 0
    for text in random_texts(11, 1500):
        folded = word_pieces.fold_caption(text)
        if any(unicodedata.ucd_3_2_0.category(c) in ("Cn", "Co") for c in folded):
            continue  # transformers drops private use, and what its older tables do not know
        assert word_piece.encode(text) == reference(folded, add_special_tokens=False)["input_ids"]
        compared += 1
    assert compared > 800


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\ufb01ne", "fine"),
        ("Stra\u00dfe", "strasse"),
        ("wait\u2026", "wait..."),
        ("10 m\u00b2", "10 m2"),
        ("\uff26\uff35\uff2c\uff2c", "full"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("hangul\u3164filler", "hangulfiller"),
        ("Jalape\u00f1o E\u0301T\u0301", "jalapeno et"),
        ("bell\x07ring", "bell ring"),
        ("noted\ufff9here", "noted here"),
        ("[CLS] a [MASK]", "[ cls ] a [ mask ]"),
    ],
)
def test_unusual_text_reads_like_its_plain_form(
    text: str, plain: str, word_piece: Tokenizer
) -> None:
    assert word_piece.encode(text) == word_piece.encode(plain)
    assert word_piece.encode(text).count(100) == 0


def test_words_beyond_100_bytes_are_unknown(word_piece: Tokenizer) -> None:
    assert word_piece.encode("a" * 100) != [100]
    assert word_piece.encode("a" * 101) == [100]
    cyrillic = "\u0430"  # two bytes in UTF-8
    assert word_piece.encode(cyrillic * 50) != [100]
    assert word_piece.encode(cyrillic * 51) == [100]


def test_word_piece_adds_no_special_token_but_the_class_token_asked_for(
    word_piece: Tokenizer,
) -> None:
    with_class = WordPiece(vocab=BERT, class_token=True).load()
    content = word_piece.encode("a photo of a dog and of many other things " * 5)
    assert word_piece.assemble(content, 32) == content[:32]
    assert with_class.assemble(content, 32) == [101, *content[:31]]
    assert word_piece.end_id is None
    assert word_piece.assemble([], 32) == []


def test_word_piece_decodes_to_words(word_piece: Tokenizer) -> None:
    assert word_piece.decode([*word_piece.encode("itap of a tench"), 0, 0]) == "itap of a tench"


@pytest.mark.parametrize("lines", [20_000, 30_521, 30_523])
def test_a_vocabulary_of_another_length_is_refused(lines: int, tmp_path: Path) -> None:
    entries = [*BERT.read_text(encoding="utf-8").removesuffix("\n").split("\n"), "one too many"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(entries[:lines]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"has {lines} lines instead of 30522") as caught:
        WordPiece(vocab=path, entries=30522).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\na\n##b\n", "has no \\[UNK\\] among its 3 lines"),
        (b"[UNK]\na\n##b\n", "has no \\[PAD\\] among its 3 lines"),
        (b"", "has no \\[PAD\\]"),
        (b"[PAD]\n[UNK]\na\nb\na\n", "holds 'a' twice"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        WordPiece(vocab=path).load()


def test_a_missing_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read \(No such file"):
        WordPiece(vocab=tmp_path / "nowhere.txt").load()


# ------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab=str(BERT)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without special tokens and without padding, as GPT-2's."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([case["caption"] for case in CAPTIONS], trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("separator", [True, False])
def test_hugging_face_ids_equal_transformers(
    class_token: bool, separator: bool, bert_folder: Path
) -> None:
    from transformers import AutoTokenizer

    # what is written in a caption is never a special token
    reference = AutoTokenizer.from_pretrained(bert_folder, split_special_tokens=True)
    config = HuggingFace(name=str(bert_folder), class_token=class_token, separator=separator)
    tokenizer = config.load()
    for text in [case["caption"] for case in CAPTIONS] + ["a dog " * 30]:
        expected = reference(text, truncation=True, max_length=17)["input_ids"]
        # without a special token its place is free for content
        length = 17 - (not class_token) - (not separator)
        expected = expected[not class_token : len(expected) - (not separator)]
        assert tokenizer.assemble(tokenizer.encode(text), length) == expected
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (30522, 0)
    assert tokenizer.end_id == (102 if separator else None)


def old_folder(folder: Path, **files: dict) -> Path:
    """A folder as older versions of transformers wrote it, its vocabulary in ``vocab.txt``."""
    folder.mkdir()
    shutil.copy(BERT, folder / "vocab.txt")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["saved now", "tokenizer_config", "config"])
def test_hugging_face_equals_tensorflow_text_where_plain_bert_does(
    kind: str, bert_folder: Path, tmp_path: Path
) -> None:
    described = {
        "tokenizer_config": {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
        "config": {"model_type": "bert"},
    }
    folder = bert_folder
    if kind in described:
        folder = old_folder(tmp_path / "bert", **{kind: described[kind]})
    tokenizer = HuggingFace(name=str(folder), class_token=False, separator=False).load()
    for case in CAPTIONS:
        ids = tokenizer.assemble(tokenizer.encode(case["caption"]), case["max_len"])
        assert (ids == case["ids"]) == case["plain_hf_agrees"], case["caption"]


@pytest.mark.parametrize("kind", ["saved now", "old"])
def test_word_pieces_take_their_vocabulary_from_a_hugging_face_folder(
    kind: str, bert_folder: Path, tmp_path: Path
) -> None:
    folder = old_folder(tmp_path / "bert") if kind == "old" else bert_folder
    tokenizer = WordPiece(vocab=folder, entries=30522).load()
    for case in CAPTIONS:
        ids = tokenizer.assemble(tokenizer.encode(case["caption"]), case["max_len"])
        assert ids == case["ids"]


def test_a_folder_without_word_pieces_is_refused(byte_level_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json does not hold a WordPiece vocabulary"):
        WordPiece(vocab=byte_level_folder).load()
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read \(No such file"):
        WordPiece(vocab=tmp_path).load()
    for content in ("{", "[]", '{"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "a": 2}}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match="does not hold a WordPiece vocabulary"):
            WordPiece(vocab=tmp_path).load()


def test_a_tokenizer_whose_vocabulary_was_ignored_is_refused(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    # transformers 5 swallows the old name of the argument: every word becomes [UNK]
    trapped = BertTokenizer(vocab_file=str(BERT))
    assert set(trapped("a photo of a dog", add_special_tokens=False)["input_ids"]) == {
        trapped.unk_token_id
    }
    trapped.save_pretrained(tmp_path / "trapped")
    lost = old_folder(tmp_path / "lost", tokenizer_config={"tokenizer_class": "BertTokenizer"})
    (lost / "vocab.txt").unlink()
    for folder in (tmp_path / "trapped", lost):
        with pytest.raises(InputError, match=f"{folder} knows no words") as caught:
            HuggingFace(name=str(folder)).load()
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_special_tokens_has_none(byte_level_folder: Path) -> None:
    tokenizer = HuggingFace(name=str(byte_level_folder)).load()
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.pad_id) == ((), (), 0)
    assert tokenizer.decode(tokenizer.encode("A Photo \u4f60")) == "A Photo \u4f60"


def test_a_hub_name_fails_with_one_sentence_without_the_hub() -> None:
    code = (
        "from frugal.common.data.tokenizers import HuggingFace, WordPiece\n"
        "from frugal.common.errors import InputError\n"
        "for config in (HuggingFace(name='some/tokenizer'), WordPiece()):\n"
        "    try:\n"
        "        config.load()\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    done = run_code(code, HF_HUB_OFFLINE="1", HF_HOME=os.devnull + "/none")
    done.check_returncode()
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert said[0].startswith("no tokenizer could be loaded from the Hugging Face hub's 'some/tok")
    assert said[1].startswith("BERT's uncased vocabulary could not be fetched")
    assert said[1].endswith("give the file as the tokenizer's vocab")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"the folder {tmp_path} holds no tokenizer .*; copy its files there"
    ):
        HuggingFace(name=str(tmp_path)).load()
    with pytest.raises(InputError, match="there is no folder"):
        HuggingFace(name=str(tmp_path / "missing")).load()


# ------------------------------------------------------------------------------------------------
# Saved with the run


def every_tokenizer(bert: Path, byte_level: Path) -> dict[str, Tokenizer]:
    return {
        "clip": ClipBpe().load(),
        "word_piece": WordPiece(vocab=BERT, class_token=True).load(),
        "bert": HuggingFace(name=str(bert), separator=False).load(),
        "byte_level": HuggingFace(name=str(byte_level)).load(),
    }


@pytest.mark.parametrize("name", ["clip", "word_piece", "bert", "byte_level"])
def test_a_saved_or_pickled_tokenizer_behaves_the_same(
    name: str, bert_folder: Path, byte_level_folder: Path, tmp_path: Path
) -> None:
    tokenizer = every_tokenizer(bert_folder, byte_level_folder)[name]
    tokenizer.save(tmp_path / "saved" / "here")
    restored = [
        load_tokenizer(tmp_path / "saved" / "here"),
        SavedTokenizer(folder=tmp_path / "saved" / "here").load(),
        pickle.loads(pickle.dumps(tokenizer)),
    ]
    for other in restored:
        for text in ODD_TEXTS + random_texts(3, 200):
            ids = tokenizer.encode(text)
            assert other.encode(text) == ids
            assert other.assemble(ids, 9) == tokenizer.assemble(ids, 9)
            assert other.decode(ids) == tokenizer.decode(ids)
        for attribute in ("vocab_size", "pad_id", "end_id"):
            assert getattr(other, attribute) == getattr(tokenizer, attribute)


def test_a_missing_or_damaged_saved_tokenizer_is_refused(tmp_path: Path, clip: Tokenizer) -> None:
    with pytest.raises(InputError, match=f"no complete tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)
    clip.save(tmp_path)
    merges = tmp_path / "merges.txt"
    merges.write_text("\n".join(merges.read_text().split("\n")[:-5]) + "\n")
    with pytest.raises(InputError, match="has 49404 entries instead of the 49408"):
        load_tokenizer(tmp_path)
    merges.unlink()
    with pytest.raises(InputError, match=r"merges\.txt: No such file"):
        load_tokenizer(tmp_path)
    description = tmp_path / "tokenizer_description.json"
    for damaged in ('{"kind": "other"}', "{", "[]"):
        description.write_text(damaged)
        with pytest.raises(InputError, match="does not describe a tokenizer"):
            load_tokenizer(tmp_path)


def test_forgetting_cached_words_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, word_piece: Tokenizer
) -> None:
    monkeypatch.setattr(vocabularies, "_CACHED_WORDS", 3)
    forgetful = WordPiece(vocab=BERT).load()
    for case in CAPTIONS:
        assert forgetful.encode(case["caption"]) == word_piece.encode(case["caption"])


def test_texts_without_a_token_have_a_slot_all_the_same() -> None:
    tokenizer = WordPiece(vocab=BERT).load()
    texts = [tokenizer.assemble(tokenizer.encode(text), 8) for text in ("", " ")]
    assert texts == [[], []]
    token_ids, lengths = padded(texts, tokenizer)
    assert token_ids.tolist() == [[0], [0]] and lengths.tolist() == [0, 0]
