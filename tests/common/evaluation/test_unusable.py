"""Models and data sets that have no number are refused or told, in every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated import multi_label_tars, recipe, telling
from PIL import Image
from torch import Tensor, nn

from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of


class Spoiled(nn.Module):
    """A model some of whose embeddings are replaced."""

    def __init__(self, model: nn.Module, *, side: str, value: float) -> None:
        super().__init__()
        self.model, self.side, self.value = model, side, value

    def _spoil(self, features: Tensor, side: str) -> Tensor:
        if side != self.side:
            return features
        features = features.clone()
        if self.value == 0:
            features[0] = 0.0
        else:
            features[0, 1] = self.value
        return features

    def encode_image(self, *arguments: Tensor) -> Tensor:
        return self._spoil(self.model.encode_image(*arguments), "image")

    def encode_text(self, *arguments: Tensor) -> Tensor:
        return self._spoil(self.model.encode_text(*arguments), "text")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    return multi_label_tars(tmp_path_factory.mktemp("several") / "voc", targets)


def multi_label(**options) -> ZeroShot:
    return ZeroShot(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize(
    ("kind", "side", "count"),
    [
        (ZeroShot, "image", "2 of 128 images"),  # one of each 64
        (ZeroShot, "text", "texts"),
        (multi_label, "image", "1 of 3 images"),
        (Retrieval, "image", "1 of 40 images"),
        (Retrieval, "text", "1 of 4[01] texts"),
        (Compositional, "image", "2 of 70 images"),
        (Compositional, "text", "texts"),
        (LinearProbe, "image", "2 of 112 images"),
    ],
)
def test_embeddings_that_are_not_finite_or_zero_are_counted_and_refused(
    kind: Callable, side: str, count: str, value: float, scenes: Path, several: Path, run: Run
) -> None:
    plan = recipe()
    model = Spoiled(telling(plan), side=side, value=value)
    task = kind(data=several if kind is multi_label else scenes)
    with pytest.raises(InputError, match=count) as caught:
        task.evaluate(bundle_of(model, plan), run)
    assert "are not finite or are zero" in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_that_cancel_each_other_are_no_class() -> None:
    class Opposite(nn.Module):
        def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
            sign = torch.where(torch.arange(len(ids)) % 2 == 0, 1.0, -1.0)
            return sign[:, None] * torch.ones(len(ids), 5)

    tokens = recipe().data.caption_tokenizer.load()
    embedder = Embedder(Opposite(), tokens, context_length=9, device=torch.device("cpu"))
    with pytest.raises(InputError, match="class 'dog'"):
        class_embeddings(embedder, ["dog", "cat"], ["a {c}", "no {c}"], ranks=Ranks())


def test_the_class_whose_missing_images_leave_no_area_under_the_curve_is_named(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(0)
    for number in range(3):
        (tmp_path / "data" / "cat").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "cat" / f"{number}.png")
    (tmp_path / "data" / "dog").mkdir()
    (tmp_path / "data" / "classnames.txt").write_text("cat\ndog\n")
    plan, outcomes = recipe(), []
    numbers = ZeroShot(data=tmp_path / "data").evaluate(
        bundle_of(telling(plan), plan), run, keep=outcomes.append
    )
    assert np.isnan(numbers["zero_shot_roc_auc"])
    assert numbers["zero_shot_classes_without_images"] == 1
    assert outcomes[0].facts["classes_without_images"] == ["dog"]
    assert "dog" in caplog.text


def test_classes_of_several_labels_without_images_are_named(
    several: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    plan, outcomes = recipe(), []
    numbers = ZeroShot(data=several).evaluate(
        bundle_of(telling(plan), plan), run, keep=outcomes.append
    )
    assert outcomes[0].facts["classes_without_images"] == ["kite"]
    assert numbers["zero_shot_classes_without_images"] == 1
    assert "no image of 1 classes: kite" in caplog.text
    assert "precision of 0" in caplog.text


def test_a_single_class_measures_nothing_and_says_so(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "cat" / "0.png")
    plan = recipe()
    numbers = ZeroShot(data=tmp_path / "data").evaluate(bundle_of(telling(plan), plan), run)
    assert numbers["zero_shot_classes"] == 1
    assert "there is one class only" in caplog.text
