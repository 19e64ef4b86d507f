"""How often a classifier is right: exact, and refused where its classes are not the data's."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from frugal.common.data.labeled import LabeledImages
from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower
from frugal.common.run import Run
from frugal.common.transfer.accuracy import Accuracy
from frugal.common.transfer.classifier import ClassifierConfig, VisionClassifier
from frugal.common.weights.runs import bundle_of
from frugal.milan.transfer_recipes import FINE_TUNING

TOWER = ImageTower(width=16, depth=1, heads=2, mlp_width=16, patch_size=8, image_size=16)
CLASSES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 70 images of many shapes: more than one group of 64."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(70):
        target = root / f"class{number % CLASSES}"
        target.mkdir(exist_ok=True)
        shape = (*generator.integers(10, 50, 2), 3)
        Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(target / f"{number}.png")
    return root


def model(classes: int = CLASSES) -> VisionClassifier:
    config = ClassifierConfig(image=TOWER, num_classes=classes, head_init_std=1.0)
    return config.build(torch.Generator().manual_seed(0))


def measure(task: Accuracy, classifier: VisionClassifier) -> dict[str, float | int]:
    recipe = FINE_TUNING["demo"]()
    recipe = replace(recipe, model=classifier.config)
    run = Run(Path("unused"), 0, 1, 0, torch.device("cpu"), logging.getLogger("test"))
    return task.evaluate(bundle_of(classifier, recipe), run)


def test_every_image_counts_once_whatever_the_batch(folder: Path) -> None:
    classifier = model()
    found = measure(Accuracy(data=folder, batch_size=64), classifier)
    assert measure(Accuracy(data=folder, batch_size=9), classifier) == found
    data = LabeledImages(folder, size=(16, 16), crop=Accuracy().crop)
    right = among_five = 0
    losses = []
    for images, labels, _ in data.batches(0, 1, 1):
        scores = classifier(images)[0].double()
        order = scores.argsort(descending=True).tolist()
        right += order[0] == labels.item()
        among_five += labels.item() in order[:5]
        losses.append(F.cross_entropy(scores[None], labels).item())
    assert found == {
        "accuracy_top1": right / 70,
        "accuracy_top5": among_five / 70,
        "accuracy_loss": pytest.approx(sum(losses) / 70, rel=1e-6),
        "accuracy_images": 70,
        "accuracy_classes": CLASSES,
    }
    assert 0 < right < among_five < 70


def test_a_model_of_other_classes_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="has 7 classes, the model 9"):
        measure(Accuracy(data=folder), model(9))


def test_classes_that_training_does_not_have_are_left_out(scenes: Path) -> None:
    found = measure(Accuracy(data=scenes), model(64))
    assert found["accuracy_images"] == 128 - 2 * 8  # two images of each of the eight
    with pytest.raises(InputError, match="64 classes, the model 5"):
        measure(Accuracy(data=scenes), model(5))


def test_labels_beyond_the_models_classes_are_refused(scenes: Path, tmp_path: Path) -> None:
    for shard in (scenes / "zero_shot" / "test").glob("*.tar"):
        (tmp_path / shard.name).symlink_to(shard)
    with pytest.raises(InputError, match="an image has the label"):
        measure(Accuracy(data=tmp_path), model(5))


def test_scores_that_are_not_finite_are_counted_and_refused(folder: Path) -> None:
    classifier = model()
    seen = []

    def spoil(module: torch.nn.Module, arguments: tuple, scores: torch.Tensor) -> torch.Tensor:
        del module, arguments
        seen.append(len(scores))
        return torch.where(torch.arange(len(scores))[:, None] < 3, torch.inf, scores)

    classifier.register_forward_hook(spoil)
    count = 3 * 2  # three of the 64, three of the 6
    with pytest.raises(InputError, match=f"scores of {count} of 70 images are not finite"):
        measure(Accuracy(data=folder), classifier)
    assert seen == [64, 6]


def test_classes_without_an_image_are_told_and_counted(
    folder: Path, tmp_path: Path, caplog
) -> None:
    shutil.copytree(folder, tmp_path / "some")
    for file in (tmp_path / "some" / "class3").iterdir():
        file.unlink()
    names = "".join(f"{entry.name}\n" for entry in sorted((tmp_path / "some").iterdir()))
    (tmp_path / "some" / "classnames.txt").write_text(names)
    with caplog.at_level(logging.WARNING, "test"):
        found = measure(Accuracy(data=tmp_path / "some"), model())
    assert found["accuracy_classes_without_images"] == 1
    assert "no image of 1 classes: class 3" in caplog.text


def test_an_evaluation_without_data_is_skipped_and_a_wrong_path_refused() -> None:
    assert measure(Accuracy(), model()) == {}
    with pytest.raises(InputError, match="does not exist"):
        Accuracy(data=Path("/nowhere")).folder()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "top 1"}, "the name of an evaluation"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Accuracy(**options)
