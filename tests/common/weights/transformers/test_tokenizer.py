"""Our tokenizers as tokenizers of transformers: the same ids for the same captions."""

import json
from pathlib import Path

import open_clip
import pytest
from transformers import AutoTokenizer, BertTokenizer

from frugal.common.data.tokenizers import ClipBpe, HuggingFace, Tokenizer, WordPiece
from frugal.common.weights.transformers.tokenizer import as_transformers, save

GOLDEN = Path(__file__).parents[3] / "golden" / "flip"
LENGTH = 24


def reloaded(tokenizer: Tokenizer, folder: Path):
    save(as_transformers(tokenizer, length=LENGTH), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_clip_s_byte_pairs_agree_with_open_clip_on_imagenet_s_prompts(tmp_path) -> None:
    theirs = reloaded(ClipBpe().load(), tmp_path)
    names = open_clip.IMAGENET_CLASSNAMES[::7]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = [templates[i % len(templates)](name) for i, name in enumerate(names)]
    prompts += ["THE same,\nin  capitals & more: 3½ crème brûlées", "x " * 50, ""]
    expected = open_clip.get_tokenizer("ViT-B-32", context_length=LENGTH)(prompts)
    ids = theirs(prompts, truncation=True)["input_ids"]
    for mine, row in zip(ids, expected.tolist(), strict=True):
        assert mine == row[: len(mine)]
        assert not any(row[len(mine) :])


def test_word_pieces_agree_with_tensorflow_on_recorded_captions(tmp_path) -> None:
    tokenizer = WordPiece(vocab=GOLDEN / "bert_uncased_vocab.txt").load()
    theirs = reloaded(tokenizer, tmp_path)
    cases = json.loads((GOLDEN / "tokenizer.json").read_text())["cases"]
    assert len(cases) >= 30
    for case in cases:
        ids = theirs(case["caption"], truncation=True, max_length=case["max_len"])["input_ids"]
        assert ids == case["ids"][: case["n_valid"]], case["caption"]


@pytest.mark.parametrize(
    ("class_token", "separator"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_special_tokens_stand_where_ours_put_them(class_token, separator, bert, tmp_path) -> None:
    config = HuggingFace(name=str(bert), class_token=class_token, separator=separator)
    tokenizer = config.load()
    theirs = reloaded(tokenizer, tmp_path)
    for caption in ("a photo of a dog", "dog " * 40, "Dogs!"):
        expected = tokenizer.assemble(tokenizer.encode(caption), LENGTH)
        assert theirs(caption, truncation=True)["input_ids"] == expected
        padded = theirs(caption, truncation=True, padding="max_length")["input_ids"]
        assert padded == expected + [tokenizer.pad_id] * (LENGTH - len(expected))


def test_a_tokenizer_that_pads_and_cuts_on_the_left_does_not_do_so_here(bert, tmp_path) -> None:
    other = BertTokenizer.from_pretrained(bert, padding_side="left", truncation_side="left")
    other.save_pretrained(tmp_path / "other")
    tokenizer = HuggingFace(name=str(tmp_path / "other")).load()
    theirs = reloaded(tokenizer, tmp_path / "out")
    long = "photo of a dog " * 20
    expected = tokenizer.assemble(tokenizer.encode(long), LENGTH)
    assert theirs(long, truncation=True)["input_ids"] == expected
    assert theirs("dog", padding="max_length")["input_ids"][-1] == tokenizer.pad_id


def test_older_versions_know_the_class_too(bert, tmp_path) -> None:
    reloaded(HuggingFace(name=str(bert)).load(), tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
