"""Linear probes: the optimum, clip_benchmark's own training and search, and kept embeddings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import linear_probe as theirs
from clip_benchmark.metrics import zeroshot_classification
from evaluated import number, recipe, telling
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation import features as features_module
from frugal.common.evaluation.features import Features, kept
from frugal.common.evaluation.linear_classifier import WEIGHT_DECAYS, batches, search
from frugal.common.evaluation.linear_probe import LinearProbe, fit, open_parts, probe
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of
from support import described

CPU = torch.device("cpu")


def blobs(count: int, *, seed: int, classes: int = 7, width: int = 9) -> Features:
    """Unit vectors around one direction per class, so near each other that some are wrong."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    vectors = centers[labels] + 1.3 * torch.randn(count, width, generator=generator)
    return Features(torch.nn.functional.normalize(vectors, dim=1), labels)


@pytest.mark.parametrize("weight_decay", [1e-4, 1e-2])
def test_lbfgs_finds_the_optimum_of_scikit_learn(weight_decay: float) -> None:
    train = blobs(200, seed=1)
    ours = fit(LinearProbe(), train, 7, weight_decay=weight_decay, device=CPU)
    model = LogisticRegression(C=1 / (weight_decay * len(train)), tol=1e-10, max_iter=5_000)
    model.fit(train.embeddings.double().numpy(), train.labels.numpy())
    weight = torch.from_numpy(model.coef_)
    assert (ours.weight - weight).abs().max() < 0.02 * weight.abs().max()
    test = blobs(300, seed=2)
    expected = model.predict_proba(test.embeddings.double().numpy())
    found = ours.scores(test.embeddings).softmax(1)
    assert (found - torch.from_numpy(expected)).abs().max() < 5e-3


class Loader:
    """Batches in the order in which we train, as clip_benchmark's loader hands them out."""

    def __init__(self, features: Features, task: LinearProbe) -> None:
        self.features = features
        rows = batches(len(features), size=task.probe_batch, epochs=task.epochs, seed=task.seed)
        self.rows = list(rows)
        self.count = len(self.rows) // task.epochs
        self.epoch = 0
        self.epochs = task.epochs

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        start = (self.epoch % self.epochs) * self.count
        self.epoch += 1
        for rows in self.rows[start : start + self.count]:
            yield self.features.embeddings[rows], self.features.labels[rows]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """clip_benchmark trains probes on CUDA alone, and counts with a NumPy before 2.4."""
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *_: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)
    monkeypatch.setattr(zeroshot_classification, "float", number, raising=False)


@pytest.mark.usefixtures("on_the_cpu")
def test_adamw_trains_the_classifier_that_clip_benchmark_trains(capsys) -> None:
    task = LinearProbe(solver="adamw", epochs=4, probe_batch=32, seed=5)
    train, test = blobs(210, seed=1), blobs(150, seed=2)
    ours = fit(task, train, 7, weight_decay=0.03, device=CPU)
    model = theirs.train(
        Loader(train, task), 9, 7, 0.03, task.learning_rate, task.epochs, False, "cpu", task.seed
    )
    linear = model.module
    assert (ours.weight - linear.weight).abs().max() < 1e-4 * linear.weight.abs().max()
    assert (ours.bias - linear.bias).abs().max() < 1e-4
    logits, target = theirs.infer(model, [(test.embeddings, test.labels)], False, "cpu")
    found = probe(replace(task, weight_decay=0.03), train, None, device=CPU).answers(test).numbers()
    acc1, acc5 = zeroshot_classification.accuracy(logits, target, topk=(1, 5))
    assert (found["top1"], found["top5"]) == (acc1, acc5)
    assert 0.2 < acc1 < 1
    expected = balanced_accuracy_score(target, logits.argmax(1))
    assert found["mean_per_class_recall"] == pytest.approx(expected)


@pytest.mark.usefixtures("on_the_cpu")
def test_the_search_finds_the_weight_decay_that_clip_benchmark_finds(capsys) -> None:
    task = LinearProbe(solver="adamw", epochs=2, probe_batch=64)
    train, validation = blobs(120, seed=1), blobs(90, seed=2)

    def accuracy(weight_decay: float) -> float:
        found = fit(task, train, 7, weight_decay=weight_decay, device=CPU)
        return found.accuracy(validation)

    loader, checks = Loader(train, task), [(validation.embeddings, validation.labels)]
    options = (loader, checks, 9, 7, task.learning_rate, task.epochs, False, "cpu", False, 0)
    first = np.logspace(-6, 2, num=7).tolist()
    span, peak = 8, theirs.find_peak(
        WEIGHT_DECAYS, [n for n, v in enumerate(WEIGHT_DECAYS) if v in first], *options
    )  # fmt: skip
    while span > 0:
        left, right = max(peak - span, 0), min(peak + span, len(WEIGHT_DECAYS) - 1)
        peak = theirs.find_peak(WEIGHT_DECAYS, [left, peak, right], *options)
        span //= 2
    assert search(accuracy) == WEIGHT_DECAYS[peak]
    found = probe(task, train, validation, device=CPU)
    assert found.weight_decay == WEIGHT_DECAYS[peak]
    assert found.num_validation == 90
    whole = fit(task, train.joined(validation), 7, weight_decay=found.weight_decay, device=CPU)
    assert torch.equal(found.classifier.weight, whole.weight)


def test_the_search_closes_in_on_a_single_peak_and_asks_nothing_twice() -> None:
    for peak in (0, 3, 41, 96):
        asked: list[float] = []

        def accuracy(value: float, peak: int = peak, asked: list[float] = asked) -> float:
            asked.append(value)
            return -abs(WEIGHT_DECAYS.index(value) - peak)

        assert search(accuracy) == WEIGHT_DECAYS[peak]
        assert len(set(asked)) == len(asked) <= 15


def test_a_drawn_validation_part_depends_on_the_seed_alone() -> None:
    train = blobs(100, seed=1)
    task = LinearProbe(solver="sgd", epochs=1)
    first, again, other = (
        probe(replace(task, seed=seed), train, None, device=CPU) for seed in (0, 0, 1)
    )
    assert first.num_validation == 20
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


# On files.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders of colored noise: 30 images to train on, 12 to measure on."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("red", "green", "blue")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for place in range(count):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{place}.png")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_probe_on_folders_counts_every_image(folder: Path, run: Run) -> None:
    plan = recipe()
    numbers = LinearProbe(data=folder).evaluate(bundle_of(telling(plan), plan), run)
    assert numbers["linear_probe_top1"] > 0.8
    counts = {name: numbers[f"linear_probe_{name}"] for name in ("images", "train_images")}
    assert counts == {"images": 12, "train_images": 30}
    assert numbers["linear_probe_validation_images"] == 6
    assert all(type(value) in (int, float) for value in numbers.values())
    shutil.copytree(folder / "test", folder / "val")
    numbers = LinearProbe(data=folder).evaluate(bundle_of(telling(plan), plan), run)
    assert numbers["linear_probe_validation_images"] == 12
    shutil.rmtree(folder / "test")  # val/ is what is measured on then
    numbers = LinearProbe(data=folder, weight_decay=0.1).evaluate(
        bundle_of(telling(plan), plan), run
    )
    assert numbers["linear_probe_validation_images"] == 0
    assert (numbers["linear_probe_images"], numbers["linear_probe_weight_decay"]) == (12, 0.1)


def test_on_scenes_the_classes_that_training_never_saw_are_left_out(scenes: Path, run: Run) -> None:
    plan = recipe()
    task = LinearProbe(data=scenes, weight_decay=0.01)
    numbers = task.evaluate(bundle_of(telling(plan), plan), run)
    assert (numbers["linear_probe_images"], numbers["linear_probe_left_out"]) == (112, 16)
    assert numbers["linear_probe_train_images"] == 112


def test_embeddings_are_kept_and_used_again(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe()
    model = telling(plan)
    task = LinearProbe(data=folder, features=tmp_path / "kept", weight_decay=0.1)
    numbers = task.evaluate(bundle_of(model, plan), run)
    files = sorted((tmp_path / "kept").glob("*"))
    assert len(files) == 2

    def never(*arguments, **options):
        raise AssertionError("embedded again")

    with monkeypatch.context() as patched:
        patched.setattr(features_module, "walk_images", never)
        assert task.evaluate(bundle_of(model, plan), run) == numbers
        files[0].write_bytes(files[0].read_bytes()[:-4])
        with pytest.raises(AssertionError, match="embedded again"):
            task.evaluate(bundle_of(model, plan), run)
    assert task.evaluate(bundle_of(model, plan), run) == numbers  # what was damaged was made again
    assert sorted((tmp_path / "kept").glob("*")) == files
    # other weights, another crop, other data: other files
    with torch.no_grad():
        model.image.patch_embed.weight.mul_(1.5)
    task.evaluate(bundle_of(model, plan), run)
    assert len(list((tmp_path / "kept").glob("*"))) == 4
    replace(task, crop=replace(task.crop, order="stretch")).evaluate(bundle_of(model, plan), run)
    assert len(list((tmp_path / "kept").glob("*"))) == 6
    Image.new("RGB", (32, 32)).save(folder / "test" / "red" / "0.png")
    task.evaluate(bundle_of(model, plan), run)
    assert len(list((tmp_path / "kept").glob("*"))) == 7


def test_a_folder_that_cannot_be_written_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cannot be kept in .*file.*choose another --linear-probe.features"
    ):
        kept(
            tmp_path / "file",
            {},
            lambda: blobs(3, seed=0),
            data=lambda: "0" * 64,
            ranks=Ranks(),
            run=run,
        )


def test_parts_that_do_not_belong_together_are_refused(folder: Path) -> None:
    plan = recipe()

    def refused(**options) -> str:
        with pytest.raises(InputError) as caught:
            open_parts(LinearProbe(**options), folder, described(plan))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no training/ for the evaluation 'linear_probe'" in refused(train="training")
    assert "one of them twice" in refused(train="test")
    (folder / "test" / "red").rename(folder / "test" / "rot")
    assert "has the class 'rot', which training in" in refused()


def test_labels_that_training_lacks_and_too_few_images_are_refused() -> None:
    train = blobs(50, seed=1)
    found = probe(LinearProbe(weight_decay=0.1), train, None, device=CPU)
    far = Features(train.embeddings[:1], torch.tensor([9]))
    with pytest.raises(InputError, match="a test image has the label 9"):
        found.answers(far)
    one = Features(train.embeddings, torch.zeros(50, dtype=torch.int64))
    with pytest.raises(InputError, match="all of one class"):
        probe(LinearProbe(weight_decay=0.1), one, None, device=CPU)
    few = train.rows(torch.tensor([0, 1]))
    few = Features(few.embeddings, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="2 training images are too few to set 10%"):
        probe(LinearProbe(validation_share=0.1), few, None, device=CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 1.0}, "validation_share is 1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearProbe(**options)


def test_scores_do_not_depend_on_how_many_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, test = blobs(80, seed=1), blobs(50, seed=2)
    task = LinearProbe(weight_decay=1e-3)
    whole: Tensor = probe(task, train, None, device=CPU).classifier.scores(test.embeddings)
    monkeypatch.setattr("frugal.common.evaluation.linear_classifier._ROWS_AT_ONCE", 7)
    parts = probe(task, train, None, device=CPU).classifier.scores(test.embeddings)
    assert (whole - parts).abs().max() < 1e-4
    assert json.dumps(whole.argmax(1).tolist()) == json.dumps(parts.argmax(1).tolist())
