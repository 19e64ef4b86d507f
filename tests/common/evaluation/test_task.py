"""The evaluations of a recipe on files: scenes, class folders, clip_benchmark's layout, photos."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from evaluated import OpenClipLike, recipe, tokenizer
from open_clip import zero_shot_metadata
from PIL import Image

from frugal.common.data.labeled import CaptionedImages, LabeledImages
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.embed import Embedder, evaluating
from frugal.common.evaluation.prompts import named_templates
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot, open_dataset
from frugal.common.recipe_json import from_json, to_json
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of
from support import described, run_code


def samples(folder: Path, target: str) -> list[tuple[torch.Tensor, str]]:
    """A folder in clip_benchmark's layout, read with webdataset alone."""
    shards = int((folder / "test" / "nshards.txt").read_text())
    urls = [str(folder / "test" / f"{number}.tar") for number in range(shards)]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", target)
    return [(torch.from_numpy(np.array(image)).permute(2, 0, 1), value) for image, value in data]


def batched(pairs: list, size: int):
    for start in range(0, len(pairs), size):
        images, targets = zip(*pairs[start : start + size], strict=True)
        yield torch.stack(images), targets


def test_zero_shot_on_scenes_equals_clip_benchmark_on_the_same_files(
    scenes: Path, run: Run
) -> None:
    plan = recipe()
    model = plan.model.build()
    ours = ZeroShot(data=scenes, batch_size=50).evaluate(bundle_of(model, plan), run)

    folder = scenes / "zero_shot"
    names = (folder / "classnames.txt").read_text().splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    batches = [(x, torch.tensor(y)) for x, y in batched(samples(folder, "cls"), 64)]
    theirs = OpenClipLike(model).eval()
    with torch.no_grad():
        classes = zeroshot_classification.zero_shot_classifier(
            theirs, tokenizer(), names, templates, "cpu", amp=False
        )
        logits, labels = zeroshot_classification.run_classification(
            theirs, classes, batches, "cpu", amp=False
        )
    right = logits.argmax(1) == labels
    assert ours["zero_shot_top1"] == float(right.double().mean())
    top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert ours["zero_shot_top5"] == float(top5.double().mean())
    held_out = torch.isin(
        labels, torch.tensor(json.loads((scenes / "scenes.json").read_text())["held_out"])
    )
    assert ours["zero_shot_top1_held_out"] == float(right[held_out].double().mean())
    per_class = [float(right[labels == c].double().mean()) for c in range(64)]
    assert ours["zero_shot_mean_per_class_recall"] == pytest.approx(sum(per_class) / 64)
    assert all(type(value) in (int, float) for value in ours.values())
    assert json.loads(json.dumps(ours)) == ours


def test_retrieval_on_scenes_equals_clip_benchmark_on_the_same_files(
    scenes: Path, run: Run
) -> None:
    plan = recipe()
    model = plan.model.build()
    ours = Retrieval(data=scenes, batch_size=7).evaluate(bundle_of(model, plan), run)
    pairs = [(x, text.splitlines()) for x, text in samples(scenes / "retrieval", "txt")]
    theirs = zeroshot_retrieval.evaluate(
        OpenClipLike(model).eval(), batched(pairs, 16), tokenizer(), "cpu", amp=False,
        recall_k_list=[1, 5, 10],
    )  # fmt: skip
    for way in ("image", "text"):
        for k in (1, 5, 10):
            name = f"{way}_retrieval_recall_at_{k}"
            assert ours[name] == pytest.approx(theirs[f"{way}_retrieval_recall@{k}"], abs=1e-6)
    assert ours["retrieval_candidates"] == ours["retrieval_captions"] == 40


def test_the_part_of_a_scenes_folder_may_be_given_itself(scenes: Path, run: Run) -> None:
    plan = recipe()
    model = plan.model.build()
    for kind, part in (
        (ZeroShot, "zero_shot"), (Retrieval, "retrieval"), (Compositional, "compositional")
    ):  # fmt: skip
        whole = kind(data=scenes).evaluate(bundle_of(model, plan), run)
        assert kind(data=scenes / part).evaluate(bundle_of(model, plan), run) == whole


def class_folders(folder: Path, names: list[str], images: int = 2) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(images):
            pixels = generator.integers(0, 256, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    return folder


def test_class_folders_are_read_in_sorted_order_with_their_names(tmp_path: Path, run: Run) -> None:
    folder = class_folders(tmp_path / "val", ["zebra", "apple_tree", "mole"])
    plan = recipe((16, 24))
    model = plan.model.build()
    numbers = ZeroShot(data=folder, name="mine", templates="name").evaluate(
        bundle_of(model, plan), run
    )
    assert (numbers["mine_images"], numbers["mine_classes"], numbers["mine_top5"]) == (6, 3, 1.0)
    data = LabeledImages(folder, size=(16, 24))
    pixels, labels, _ = next(data.batches(0, 1, 6))
    words = Embedder.of(bundle_of(model, plan), run)
    with evaluating(model):
        scores = words.images(pixels) @ words.texts(["apple tree", "mole", "zebra"]).T
    assert numbers["mine_top1"] == float((scores.argmax(1) == labels).double().mean())


def one_picture(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    Image.new("RGB", (30, 20), (number % 256, 0, 0)).save(folder / "a.png")


def test_imagenet_folders_are_asked_by_imagenets_names(tmp_path: Path, run: Run) -> None:
    for number, name in enumerate(all_imagenet_wordnet_ids):
        if number in (3, 650, 999):
            one_picture(tmp_path / "val" / name, number)
        else:
            (tmp_path / "val" / name).mkdir(parents=True)
    plan = recipe()
    numbers = ZeroShot(data=tmp_path / "val").evaluate(bundle_of(plan.model.build(), plan), run)
    assert (numbers["zero_shot_images"], numbers["zero_shot_classes"]) == (3, 1000)


def labels_and_names(folder: Path, **options) -> list[tuple[int, str]]:
    """The number of the class and the name that each picture is asked about, by its color."""
    plan = recipe()
    question = open_dataset(ZeroShot(data=folder, **options), folder, described(plan))
    found = {}
    for images, labels, _ in question.images.batches(0, 1, 50):
        for image, label in zip(images, labels.tolist(), strict=True):
            found[int(image[0, 0, 0])] = (label, question.labels[label])
    return [found[color] for color in sorted(found)]


def test_imagenet_v2_is_labeled_by_the_numbers_of_its_folders(tmp_path: Path) -> None:
    names = zero_shot_metadata.IMAGENET_CLASSNAMES
    for number in range(1000):
        (tmp_path / "v2" / str(number)).mkdir(parents=True)
    for number in (2, 10, 100, 199):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "v2" / str(number) / "a.jpeg")
    assert labels_and_names(tmp_path / "v2") == [(n, names[n]) for n in (2, 10, 100, 199)]


def test_imagenet_a_and_r_are_classified_among_their_own_classes(tmp_path: Path) -> None:
    places = [9, 17, 103, 111]
    for number, place in enumerate(places):
        one_picture(tmp_path / "a" / all_imagenet_wordnet_ids[place], number)
    (tmp_path / "a" / "README.txt").write_text("not a class")
    expected = [
        (number, zero_shot_metadata.IMAGENET_CLASSNAMES[place])
        for number, place in enumerate(places)
    ]
    assert labels_and_names(tmp_path / "a") == expected
    question = open_dataset(ZeroShot(templates="imagenet_80"), tmp_path / "a", described(recipe()))
    assert (len(question.names), len(question.templates)) == (4, 80)


@pytest.fixture
def objectnet(tmp_path: Path) -> Path:
    """ObjectNet's layout: folders named its own way, two of them of classes of ImageNet."""
    root = tmp_path / "objectnet-1.0"
    labels = {"air_freshener": "Air freshener", "banana": "Banana", "t_shirt": "T-shirt"}
    for number, name in enumerate(labels):
        one_picture(root / "images" / name, 10 * number)
    shared = {"Banana": "banana", "T-shirt": "jersey, T-shirt, tee shirt; sweatshirt"}
    (root / "mappings").mkdir()
    for name, content in (
        ("folder_to_objectnet_label", labels), ("objectnet_to_imagenet_1k", shared)
    ):  # fmt: skip
        (root / "mappings" / f"{name}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("part", ["", "images"])
def test_objectnet_is_asked_by_bare_names_about_the_classes_it_shares(
    part: str, objectnet: Path
) -> None:
    assert labels_and_names(objectnet / part) == [(0, "Banana"), (1, "T-shirt")]
    assert open_dataset(ZeroShot(), objectnet / part, described(recipe())).templates == ["{c}"]


def test_a_file_of_names_chooses_class_folders(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for number, name in enumerate(("x1", "x2", "x3")):
        one_picture(folder / name, number)
    names = folder / "classnames.json"
    names.write_text(json.dumps({"x3": "kite", "x1": "boat"}))
    assert labels_and_names(folder) == [(0, "boat"), (1, "kite")]
    assert open_dataset(ZeroShot(), folder, described(recipe())).templates == named_templates(
        "imagenet_7"
    )
    names.write_text(json.dumps({"x4": "kite"}))
    with pytest.raises(InputError, match=r"classnames\.json names the class folder 'x4', which"):
        open_dataset(ZeroShot(), folder, described(recipe()))
    for content in ("{", "[]", "{}", '{"x1": 3}'):
        names.write_text(content)
        with pytest.raises(InputError, match=r"classnames\.json (does not map|cannot be read)"):
            open_dataset(ZeroShot(), folder, described(recipe()))


@pytest.mark.parametrize("kind", [ZeroShot, Retrieval, Compositional])
def test_missing_data_is_one_sentence(kind, tmp_path: Path, run: Run) -> None:
    task = kind(data=tmp_path / "nowhere")
    with pytest.raises(InputError, match=rf"evaluation '{task.name}' is not there: .*nowhere does"):
        task.folder()
    plan = recipe()
    with pytest.raises(InputError, match="nowhere does not exist"):
        task.evaluate(bundle_of(None, plan), run)


@pytest.mark.parametrize("kind", [ZeroShot, Retrieval, Compositional])
def test_an_evaluation_without_data_is_skipped(kind, run: Run, caplog) -> None:
    logger = logging.getLogger("skipping")
    with caplog.at_level(logging.INFO, logger="skipping"):
        assert kind().evaluate(bundle_of(None, recipe()), replace(run, log=logger)) == {}
    assert f"the evaluation {kind().name} is skipped" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"name": "a/b"}, "the name of an evaluation is 'a/b'"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0, must be at least 0 and less than 1"),
        ({"mask_ratio": -0.1}, "mask_ratio is -0.1"),
        ({"mask_ratio": float("nan")}, "mask_ratio is nan"),
        ({"mask_ratio": 0.5, "views": 0}, "views is 0"),
        ({"views": 2}, "views is 2, but without a mask_ratio all views are the same"),
    ],
)
@pytest.mark.parametrize("kind", [ZeroShot, Retrieval, Compositional])
def test_impossible_settings_are_refused(kind, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**options)


def test_tasks_survive_json() -> None:
    tasks = (
        ZeroShot(data=Path("a/b"), crop=CenterCrop(order="crop_first"), templates="imagenet_80"),
        Retrieval(name="coco", workers=3),
        Compositional(data=Path("sugar"), images=Path("coco/val2017")),
        Retrieval(
            mask_ratio=0.75,
            views=4,
            published_crop=CenterCrop(order="crop_first", interpolation="tf1_bicubic"),
        ),
    )
    for task in tasks:
        assert from_json(json.loads(json.dumps(to_json(task)))) == task


def test_naming_an_evaluation_needs_nothing_slower_than_torch() -> None:
    slow = {"deepspeed", "transformers", "timm", "open_clip", "matplotlib"}
    for module in ("evaluation.zero_shot", "evaluate"):
        check = f"import sys, frugal.common.{module}; sys.exit(bool({slow} & sys.modules.keys()))"
        assert run_code(check).returncode == 0


def test_photos_of_any_shape_pass_through(real_data: Path, run: Run) -> None:
    plan = recipe((24, 32))
    model = plan.model.build()
    folder = real_data / "coco_mini" / "val"
    numbers = Retrieval(data=folder, name="coco").evaluate(bundle_of(model, plan), run)
    captions = CaptionedImages(folder, size=(24, 32)).captions
    assert numbers["coco_candidates"] == len(captions) > 50
    assert numbers["coco_captions"] == sum(map(len, captions)) > 4 * len(captions)
    task = ZeroShot(
        data=real_data / "imagenet1k_sample" / "val", class_names="imagenet", templates="name"
    )
    numbers = task.evaluate(bundle_of(model, plan), run)
    assert (numbers["zero_shot_images"], numbers["zero_shot_classes"]) == (167, 1000)
