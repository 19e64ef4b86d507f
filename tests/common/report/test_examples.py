"""Single images with what a trained model makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from evaluated import recipe

from frugal.common.data.labeled import CaptionedImages
from frugal.common.evaluation.predictions import Predictions
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.reduction.image import KeepAll
from frugal.common.report.examples import confusions, recall_by_class
from frugal.common.report.examples_of_model import examples_of_model
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of


def test_examples_show_the_model_at_work(scenes: Path, run: Run) -> None:
    plan = recipe(evaluation=(ZeroShot(data=scenes), Retrieval(data=scenes), ZeroShot()))
    model = plan.model.build().train()
    gathered = examples_of_model(
        bundle_of(model, plan), plan.evaluation, run, count=8, reduction=plan.reduction.image
    )
    assert model.training
    assert len(gathered.classified) == 8
    assert len(gathered.retrieved) == len(gathered.masked) == 4
    assert len({example.truth for example in gathered.classified}) > 4
    for example in gathered.classified:
        scores = [guess.score for guess in example.guesses]
        assert scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) <= 1 + 1e-6
        assert [g.right for g in example.guesses] == [
            g.text in example.truth for g in example.guesses
        ]
    captions = CaptionedImages(scenes / "retrieval", size=(32, 32)).captions
    for example in gathered.retrieved:
        assert list(example.truth) in captions
        assert [g.right for g in example.guesses] == [
            g.text in example.truth for g in example.guesses
        ]
    for example in gathered.masked:
        assert (example.kept, example.patches) == (8, 16)
        assert (example.image != example.masked).any()
    numbers = ZeroShot(data=scenes).evaluate(bundle_of(model, plan), run)
    right = sum(item.right for item in gathered.classes)
    assert right / 128 == numbers["zero_shot_top1"]
    assert sum(item.held_out for item in gathered.classes) == 8
    whole = examples_of_model(
        bundle_of(model, plan), plan.evaluation, run, reduction=KeepAll(), count=2
    )
    assert all(example.kept == example.patches for example in whole.masked)


def test_nothing_is_gathered_without_data(run: Run) -> None:
    plan = recipe(evaluation=(ZeroShot(), Retrieval()))
    assert (
        examples_of_model(
            bundle_of(plan.model.build(), plan),
            plan.evaluation,
            run,
            reduction=plan.reduction.image,
        ).masked
        == ()
    )


def test_classes_and_confusions_are_counted() -> None:
    labels = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    best = torch.tensor([0, 1, 1, 2, 0, 1, 0])
    answers = Predictions(labels, best, best[:, None], 3)
    names = ["a", "b", "c"]
    counted = [
        (c.name, c.right, c.images, c.held_out) for c in recall_by_class(answers, names, [2])
    ]
    assert counted == [("a", 1, 3, False), ("b", 0, 0, False), ("c", 1, 4, True)]
    found = [(c.truth, c.said, c.images) for c in confusions(answers, names)]
    assert found == [("a", "b", 2), ("c", "a", 2), ("c", "b", 1)]
    assert len(confusions(answers, names, count=1)) == 1
    none = Predictions(labels, labels, labels[:, None], 3)
    assert confusions(none, names) == []
