"""Recipes: what a user types the name of."""

from __future__ import annotations

from dataclasses import replace

from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import Recipe, Reductions, RunOptions, model_of
from frugal.superclass.data import WORDS, Squares
from frugal.superclass.evaluation import WordRecall
from frugal.superclass.model import WordModel, Words
from frugal.superclass.objective import PredictWords
from frugal.superclass.optim import Momentum, Trapezoid
from frugal.superclass.reductions import EveryOtherWord, LeftPart

_TOWER = ImageTower(width=64, depth=2, heads=2, mlp_width=128, patch_size=8, image_size=48)


def squares() -> Recipe:
    """Half a minute on one core: every part is of this package, data included."""
    return Recipe(
        model=WordModel(image=_TOWER, words=Words(vocabulary=len(WORDS), length=8)),
        data=Squares(),
        reduction=Reductions(image=LeftPart(columns=4), text=EveryOtherWord()),
        objective=PredictWords(),
        optimizer=Momentum(learning_rate=0.1, clip_norm=1.0),
        schedule=Trapezoid(samples=20_000),
        batch_size=64,
        run=RunOptions(log_every=20, save_every=100, picture_every=100),
        evaluation=(WordRecall(),),
    )


def pairs() -> Recipe:
    """The same objective and reductions on image-text shards."""
    recipe, tokenizer = squares(), ClipBpe()
    return replace(
        recipe,
        model=replace(model_of(WordModel, recipe.model), words=Words(vocabulary=49_408)),
        data=PairData(train=(), tokenizer=tokenizer),
        evaluation=(),
    )


RECIPES = {"squares": squares, "pairs": pairs}
