"""The 26 tasks: their lists, their metrics, and how their folders are found and asked about."""

from __future__ import annotations

import ast
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
from evaluated import multi_label_tars, recipe, telling
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo

from frugal.common.data.labeled import LabeledImages, MultiLabeledImages
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.cli import Options, ZeroShotOptions, chosen_tasks
from frugal.common.evaluation.embed import Embedder, evaluating
from frugal.common.evaluation.metrics import average_precision, ranked_classes, roc_auc
from frugal.common.evaluation.predictions import Predictions
from frugal.common.evaluation.prompts import class_embeddings, named_templates, prompts
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.suites import SUITES, listed, metric_of
from frugal.common.evaluation.task_labels import TASKS, task_labels
from frugal.common.evaluation.zero_shot import ZeroShot, open_dataset
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of
from support import described, described_with_tasks

GOLDEN = Path(__file__).parents[2] / "golden" / "cit"

# name: classes, templates, metric; as published for CiT and SLIP
PUBLISHED = {
    "food101": (101, 1, "top1"), "cifar10": (10, 18, "top1"), "cifar100": (100, 18, "top1"),
    "cub200": (200, 1, "top1"), "sun397": (397, 2, "top1"), "cars": (196, 8, "top1"),
    "aircraft": (100, 2, "mean_per_class_recall"), "dtd": (47, 8, "top1"),
    "pets": (37, 1, "mean_per_class_recall"), "caltech101": (102, 34, "mean_per_class_recall"),
    "flowers": (102, 1, "mean_per_class_recall"), "mnist": (10, 1, "top1"),
    "fer2013": (7, 6, "top1"), "stl10": (10, 2, "top1"), "eurosat": (10, 3, "top1"),
    "resisc45": (45, 18, "top1"), "gtsrb": (43, 3, "top1"), "kitti_distance": (4, 1, "top1"),
    "country211": (211, 5, "top1"), "patch_camelyon": (2, 1, "top1"),
    "ucf101_frames": (101, 48, "top1"), "kinetics700_frames": (700, 28, "mean_top1_top5"),
    "clevr_counts": (8, 1, "top1"), "hateful_memes": (2, 1, "roc_auc"),
    "rendered_sst2": (2, 1, "top1"), "imagenet": (1000, 7, "top1"),
}  # fmt: skip


def test_the_26_tasks_have_the_published_counts_and_metrics() -> None:
    found = {}
    for name in SUITES["clip-26"]:
        labels = task_labels(name)
        found[name] = (len(labels.classes), len(labels.templates), metric_of(name))
    assert found == PUBLISHED
    assert set(listed()) - set(TASKS) == {"birdsnap", "voc2007"}
    assert any(len(words) > 1 for words in task_labels("fer2013").classes)
    assert all("{c}" in text for name in listed() for text in named_templates(name))


def test_nine_prompts_of_imagenet_are_the_seven_and_two_more() -> None:
    seven, nine = named_templates("imagenet_7"), named_templates("imagenet_9")
    assert nine == [*seven, "A photo of a {c}", "{c}"]
    assert seven == named_templates("imagenet")  # SLIP's list is OpenAI's


# Metrics, against recorded numbers and other libraries.


@pytest.mark.parametrize("case", ["metric_10", "metric_2"])
def test_metrics_are_those_that_were_recorded(case: str) -> None:
    expected = json.loads((GOLDEN / f"{case}.json").read_text())
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    logits, labels = tensors["logits"], tensors["targets"].long()
    margin = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else None
    answers = Predictions(labels, logits.argmax(1), ranked_classes(logits), logits.shape[1], margin)
    numbers = answers.numbers()
    names = {"mean_per_class_recall": "mean_per_class", "top1": "top1", "top5": "top5"}
    for ours, theirs in (*names.items(), ("roc_auc", "roc_auc")):
        if theirs in expected:
            assert 100 * numbers[ours] == pytest.approx(expected[theirs], abs=1e-3)
    if "mean_top1_top5" in expected:
        score = answers.numbers("mean_top1_top5")["score"]
        assert 100 * score == pytest.approx(expected["mean_top1_top5"], abs=1e-3)


def test_class_features_are_those_that_were_recorded() -> None:
    case = json.loads((GOLDEN / "classifier_synonyms.json").read_text())
    tensors = load_file(GOLDEN / "classifier_synonyms.safetensors")
    rows = dict(zip(case["prompts"], tensors["prompt_embeds"], strict=True))

    class Recorded:
        width, device = 12, torch.device("cpu")
        tokenizer, context_length, shorten = None, 77, str  # what stays of a text is its own matter

        def texts(self, texts):
            return torch.nn.functional.normalize(torch.stack([rows[t] for t in texts]), dim=1)

    templates = [template.replace("{}", "{c}") for template in case["templates"]]
    made = class_embeddings(Recorded(), case["labels"], templates, ranks=Ranks())
    assert (made - tensors["class_features"]).abs().max() < 1e-6
    assert {text for name in case["labels"] for text in prompts(name, templates)} == rows.keys()


def test_the_area_under_the_curve_counts_ties_half() -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (60,), generator=generator).float()
    positive = torch.rand(60, generator=generator) < 0.3
    expected = roc_auc_score(positive, scores)
    assert float(roc_auc(scores, positive)) == pytest.approx(expected, abs=1e-12)
    weights = torch.randint(4, (3, 60), generator=generator)
    for row, found in zip(weights, roc_auc(scores, positive, weights), strict=True):
        again = roc_auc_score(positive, scores, sample_weight=row)
        assert float(found) == pytest.approx(again, abs=1e-12)
    rounded = torch.rand(60, 4, generator=generator)
    targets = torch.rand(60, 4, generator=generator) < 0.2
    found = average_precision(rounded, targets)[0]
    assert found.tolist() == pytest.approx(
        average_precision_per_class(rounded, targets).tolist(), abs=1e-6
    )
    theirs = [average_precision_score(targets[:, c], rounded[:, c]) for c in range(4)]
    assert found.tolist() == pytest.approx(theirs, abs=1e-9)


def test_a_metric_of_two_classes_needs_two() -> None:
    labels = torch.tensor([0, 1, 2])
    answers = Predictions(labels, labels, labels[:, None], 3)
    with pytest.raises(InputError, match="roc_auc is of two classes, but there are 3"):
        answers.numbers("roc_auc")


# Folders.


def pictures(folder: Path, count: int = 1, *, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_class_folders_are_brought_together_with_the_names_of_their_task(tmp_path: Path) -> None:
    names = [words[0] for words in task_labels("eurosat").classes]
    for name in names:
        pictures(tmp_path / name.title().replace(" ", "_"))
    task = ZeroShot(class_names="eurosat", templates="eurosat")
    question = open_dataset(task, tmp_path, described(recipe()))
    folders = question.images.class_folders
    assert [name.lower().replace("_", " ") for name in folders] == question.labels
    assert sorted(question.labels) == sorted(names) and question.labels != names
    assert question.templates == named_templates("eurosat")


def test_folders_of_other_names_are_taken_in_their_order(tmp_path: Path) -> None:
    for number in range(10):
        pictures(tmp_path / f"class_{number}")
    question = open_dataset(ZeroShot(class_names="mnist"), tmp_path, described(recipe()))
    assert question.labels == [words[0] for words in task_labels("mnist").classes]


EUROSAT = [words[0] for words in task_labels("eurosat").classes]
AS_PUBLISHED = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip


@pytest.mark.parametrize("place", [0, 4, 9])
def test_a_misspelled_class_folder_of_a_task_is_refused_by_name(tmp_path: Path, place: int) -> None:
    for number, name in enumerate(EUROSAT):
        misspelled = name[:-1] + "x" if number == place else name
        pictures(tmp_path / misspelled.replace(" ", "_"))
    with pytest.raises(
        InputError, match=r"x' of .* is no class of eurosat \(did you mean"
    ) as caught:
        open_dataset(ZeroShot(class_names="eurosat"), tmp_path, described(recipe()))
    assert EUROSAT[place] in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_folder_of_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in EUROSAT[1:]:
        pictures(tmp_path / name)
    task = ZeroShot(class_names="eurosat")
    with pytest.raises(InputError, match=f"there is no folder of {EUROSAT[0]}"):
        open_dataset(task, tmp_path, described(recipe()))
    (tmp_path / EUROSAT[0]).mkdir()  # without images it is asked about all the same
    question = open_dataset(task, tmp_path, described(recipe()))
    folders = question.images.class_folders
    assert question.labels == [*folders, EUROSAT[0]]


def test_folders_called_otherwise_are_taken_in_their_order_where_that_is_sure(
    tmp_path: Path,
) -> None:
    for name in AS_PUBLISHED:  # two of which are called as CLIP calls them
        pictures(tmp_path / name)
    question = open_dataset(ZeroShot(class_names="eurosat"), tmp_path, described(recipe()))
    assert question.labels == EUROSAT
    (tmp_path / "Forest").rename(tmp_path / "Trees")
    with pytest.raises(InputError, match=r"'River' of .* does not stand at its place"):
        open_dataset(ZeroShot(class_names="eurosat"), tmp_path, described(recipe()))


def test_numbered_folders_of_a_task_are_not_taken_as_text(tmp_path: Path) -> None:
    for number in range(45):
        pictures(tmp_path / f"class{number}")
    with pytest.raises(InputError, match=r"another order as text \(class0, class1, class10"):
        open_dataset(ZeroShot(class_names="resisc45"), tmp_path, described(recipe()))
    for number in range(45):
        (tmp_path / f"class{number}").rename(tmp_path / f"{number}")
    question = open_dataset(ZeroShot(class_names="resisc45"), tmp_path, described(recipe()))
    assert question.images.class_folders == [str(number) for number in range(45)]
    assert question.labels == [words[0] for words in task_labels("resisc45").classes]


def test_labels_are_those_of_all_of_imagenet_where_its_names_are_chosen(
    tmp_path: Path, run: Run
) -> None:
    ids = ImageNetInfo("imagenet-1k").label_names()
    places = [3, 650, 998]
    for seed, place in enumerate(places):
        pictures(tmp_path / ids[place], 2, seed=seed)
    plan = recipe()
    task = ZeroShot(data=tmp_path, class_names="imagenet", templates="name")
    found: list = []
    numbers = task.evaluate(bundle_of(telling(plan), plan), run, keep=found.append)
    assert found[0].tables["labels"].tolist() == [3, 3, 650, 650, 998, 998]
    assert (numbers["zero_shot_classes"], numbers["zero_shot_images"]) == (1000, 6)
    assert numbers["zero_shot_classes_without_images"] == 997
    assert found[0].facts["incomplete"] == "3 of the 1,000 classes of ImageNet-1k"
    alone = ZeroShot(data=tmp_path, templates="name").evaluate(bundle_of(telling(plan), plan), run)
    assert alone["zero_shot_classes"] == 3
    assert alone["zero_shot_top1"] >= numbers["zero_shot_top1"]


def test_what_is_odd_about_the_data_is_told_and_kept(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("gray_seal", "gray seal", "kite"):
        pictures(tmp_path / name, 2)
    (tmp_path / "kite" / "notes.pdf").write_text("")
    plan = recipe()
    found: list = []
    task, own = ZeroShot(data=tmp_path), replace(run, log=logging.getLogger("told"))
    with caplog.at_level(logging.INFO, logger="told"):
        numbers = task.evaluate(bundle_of(telling(plan), plan), own, keep=found.append)
    assert (numbers["zero_shot_same_names"], numbers["zero_shot_passed_over"]) == (2, 1)
    assert found[0].facts["same_names"] == [[[0, "gray seal"], [1, "gray seal"]]]
    assert found[0].facts["passed_over"] == {"files that are no images (.pdf)": 1}
    assert "'gray seal' (0) = 'gray seal' (1)" in caplog.text


def test_names_of_equal_standing_are_averaged(tmp_path: Path, run: Run) -> None:
    for number in range(7):
        pictures(tmp_path / f"{number}", 2, seed=number)
    task = ZeroShot(data=tmp_path, class_names="fer2013", templates="fer2013")
    plan = recipe()
    numbers = task.evaluate(bundle_of(telling(plan), plan), run)
    assert (numbers["zero_shot_images"], numbers["zero_shot_classes"]) == (14, 7)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    for number in range(9):
        pictures(tmp_path / f"{number}")
    with pytest.raises(InputError, match="holds 9 classes, but eurosat has 10 names") as caught:
        open_dataset(ZeroShot(class_names="eurosat"), tmp_path, described(recipe()))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match="class_names is 'euro'; choose data, imagenet, imagenet_a"
    ):
        ZeroShot(class_names="euro")
    with pytest.raises(InputError, match="templates is 'no'; choose data, imagenet_7"):
        ZeroShot(templates="no")


def test_a_suite_is_asked_about_the_folders_that_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10):
        pictures(tmp_path / "MNIST" / "test" / str(number))
        pictures(tmp_path / "eurosat" / "val" / str(number))
    pictures(tmp_path / "hateful-memes" / "dev" / "0")
    pictures(tmp_path / "hateful-memes" / "dev" / "1")
    (tmp_path / "other").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    plan = recipe(evaluation=(ZeroShot(reduce_prompts=True),))
    options = Options(checkpoint=Path("x"), data=tmp_path, tasks=("clip-26",), workers=0)
    tasks = {task.name: task for task in chosen_tasks(options, *described_with_tasks(plan))}
    assert list(tasks) == ["mnist", "eurosat", "hateful_memes"]
    assert tasks["mnist"].data == tmp_path / "MNIST" / "test"
    assert tasks["hateful_memes"].metric == "roc_auc"
    assert all(task.reduce_prompts for task in tasks.values())
    assert {task.class_names for task in tasks.values()} == set(tasks)
    assert (
        f"1 passed over: folders that are no task of clip-26 ({tmp_path / 'other'})" in caplog.text
    )
    assert "__MACOSX" in caplog.text
    (tmp_path / "euro_sat").mkdir()
    with pytest.raises(InputError, match=r"are one task of clip-26; leave one of them out"):
        chosen_tasks(options, *described_with_tasks(plan))


def test_a_suite_without_a_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    options = {"checkpoint": Path("x"), "tasks": ("clip-26",)}
    for words, message in (
        ({"data": tmp_path}, "holds none of the tasks of clip-26"),
        ({}, "clip-26 needs --data"),
        ({"data": tmp_path / "no"}, "no is no folder"),
        (
            {"data": tmp_path, "zero_shot": ZeroShotOptions(class_names="mnist")},
            "--zero-shot.class-names is for one task",
        ),
    ):
        with pytest.raises(InputError, match=message):
            chosen_tasks(Options(**options, **words), *described_with_tasks(recipe()))


@pytest.mark.parametrize(("name", "classes"), [("imagenet_a", 200), ("imagenet_r", 200)])
def test_variants_of_imagenet_have_the_classes_that_clip_benchmark_gives_them(
    name: str, classes: int, tmp_path: Path
) -> None:
    from clip_benchmark.datasets import builder

    source = ast.parse(Path(builder.__file__).read_text())
    (ids,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(source)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"{name}_wnids"
    )
    everything = builder.all_imagenet_wordnet_ids
    for wordnet_id in ids:
        pictures(tmp_path / name / wordnet_id)
    options = Options(checkpoint=Path("x"), data=tmp_path, tasks=("imagenet-robustness",))
    (task,) = chosen_tasks(options, *described_with_tasks(recipe()))
    assert task.name == name
    question = open_dataset(task, task.data, described(recipe()))
    names = [words[0] for words in task_labels("imagenet").classes]
    mask = [wordnet_id in set(ids) for wordnet_id in everything]
    assert question.labels == [n for n, is_in in zip(names, mask, strict=True) if is_in]
    assert len(question.labels) == classes
    shutil.rmtree(tmp_path / name / sorted(ids)[5])
    with pytest.raises(InputError, match=rf"holds 199 classes, but {name} has 200: only one of"):
        open_dataset(task, task.data, described(recipe()))


# Several classes to an image.


@pytest.mark.parametrize("batch_size", [2, 64])
def test_images_of_several_classes_have_clip_benchmarks_average_precision(
    batch_size: int, tmp_path: Path, run: Run
) -> None:
    targets = (np.random.default_rng(1).random((20, 3)) < 0.4).astype(np.int64)
    folder = multi_label_tars(tmp_path / "voc", targets)
    plan = recipe()
    model = telling(plan)
    kept = []
    task = ZeroShot(data=folder, batch_size=batch_size)
    numbers = task.evaluate(bundle_of(model, plan), run, keep=kept.append)
    data = MultiLabeledImages(folder, size=(32, 32))
    words = Embedder.of(bundle_of(model, plan), run)
    with evaluating(model):
        images = torch.cat([words.images(x) for x, _ in data.batches(0, 1, 64)])
        classes = words.texts([f"a photo of a {name}" for name in ("dog", "cat", "kite")])
    expected = average_precision_per_class(100.0 * images @ classes.T, torch.from_numpy(targets))
    assert numbers["zero_shot_mean_average_precision"] == pytest.approx(
        float(expected.mean()), abs=1e-6
    )
    counts = [numbers[f"zero_shot_{name}"] for name in ("images", "classes", "labels")]
    assert counts == [20, 3, int(targets.sum())]
    (outcomes,) = kept
    again = outcomes.number("zero_shot_mean_average_precision")
    assert float(again) == pytest.approx(numbers["zero_shot_mean_average_precision"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.zeros((4, 2), np.int64), "are marked for 2 classes, but there are names for 3"),
        (np.full((4, 3), 2), "s0000 does not say which classes it is of"),
        (np.zeros((4, 3, 1), np.int64), "needs an npy member with a row of zeros and ones"),
    ],
)
def test_marks_that_are_none_are_refused(
    targets: np.ndarray, message: str, tmp_path: Path, run: Run
) -> None:
    folder = multi_label_tars(tmp_path / "voc", targets)
    plan = recipe()
    with pytest.raises(InputError, match=message) as caught:
        ZeroShot(data=folder).evaluate(bundle_of(telling(plan), plan), run)
    assert "\n" not in str(caught.value)


def test_a_digest_tells_data_from_other_data_wherever_it_lies(tmp_path: Path) -> None:
    for place in ("a", "elsewhere/b"):
        pictures(tmp_path / place / "x", 3)
        pictures(tmp_path / place / "y", 2, seed=1)
    one, same = (LabeledImages(tmp_path / p, size=(8, 8)) for p in ("a", "elsewhere/b"))
    before = one.digest()
    assert before == same.digest()
    (tmp_path / "a" / "y" / "1.png").rename(tmp_path / "a" / "x" / "9.png")
    assert LabeledImages(tmp_path / "a", size=(8, 8)).digest() != before
    targets = np.eye(3, dtype=np.int64)
    tars = MultiLabeledImages(multi_label_tars(tmp_path / "t", targets), size=(8, 8))
    moved = MultiLabeledImages(multi_label_tars(tmp_path / "u", targets), size=(8, 8))
    other = MultiLabeledImages(multi_label_tars(tmp_path / "v", 1 - targets), size=(8, 8))
    assert tars.digest() == moved.digest() != other.digest()


def test_retrieval_tells_which_captions_and_images_were_found(scenes: Path, run: Run) -> None:
    plan, kept = recipe(), []
    numbers = Retrieval(data=scenes).evaluate(bundle_of(telling(plan), plan), run, keep=kept.append)
    (outcomes,) = kept
    for name in outcomes.measures:
        assert float(outcomes.number(name)) == pytest.approx(numbers[name])
    assert outcomes.facts["captions"] == 40 and len(outcomes.measures) == 6
