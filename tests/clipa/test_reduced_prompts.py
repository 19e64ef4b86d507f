"""Prompts that are shortened as captions are in training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frugal.clipa.part_of_speech import load_tagger
from frugal.clipa.recipes import RECIPES
from frugal.clipa.syntax_masking import SyntaxMasking
from frugal.clipa.text_masking import BlockTextMasking, RandomTextMasking
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.recipe import Recipe
from frugal.common.reduction.text import TextReduction, Truncate
from frugal.common.run import Run, make_logger
from frugal.flip.text_masking import TextMasking as MaskingInPlace
from support import described

PROMPT = "a bad photo of the big green lizard on a very old wall"
RUN = Run(Path("runs/x"), 0, 1, 0, torch.device("cpu"), make_logger(0))


def with_text(reduction: TextReduction) -> Recipe:
    recipe = RECIPES["demo"]()
    model = replace(recipe.model, text=replace(recipe.model.text, length=8))
    return replace(recipe, model=model, reduction=replace(recipe.reduction, text=reduction))


def ids(reduction: TextReduction, *, reduce_prompts: bool = True) -> tuple[int, ...]:
    task = ZeroShot(reduce_prompts=reduce_prompts)
    return Embedder.of(described(with_text(reduction)), RUN, task).token_ids(PROMPT)


@pytest.mark.parametrize("reduction", [RandomTextMasking(), BlockTextMasking()])
def test_prompts_are_cut_unless_the_task_reduces_them(reduction: TextReduction) -> None:
    whole = ClipBpe().load().encode(PROMPT)
    cut = ids(reduction, reduce_prompts=False)
    assert cut == ids(Truncate()) and list(cut[1:-1]) == whole[:6]
    reduced = ids(reduction)
    assert reduced != cut and len(reduced) == 8
    assert set(reduced[1:-1]) <= set(whole)
    assert reduced == ids(reduction)  # a prompt is shortened in the same way every time


def test_tokens_that_keep_their_slots_are_refused() -> None:
    with pytest.raises(InputError, match="TextMasking leaves tokens in their slots"):
        ids(MaskingInPlace(mask_ratio=0.5))


def test_syntax_masking_reads_the_tagger_before_any_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    load_tagger.cache_clear()
    with pytest.raises(InputError, match=r"frugal\.clipa\.nltk_data"):
        task = ZeroShot(reduce_prompts=True)
        Embedder.of(described(with_text(SyntaxMasking())), RUN, task)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_reduce_prompts_where_the_published_evaluations_do(name: str) -> None:
    recipe = RECIPES[name]()
    (task,) = (task for task in recipe.evaluation if isinstance(task, ZeroShot))
    assert task.reduce_prompts == isinstance(recipe.reduction.text, SyntaxMasking)
