"""Evaluations give the same numbers on any number of processes and at any batch size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluated import multi_label_tars
from PIL import Image

from frugal.common.data.labeled import LabeledImages
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import CenterCrop
from frugal.common.distributed import Ranks
from frugal.common.evaluation.compositional import Compositional, choose, open_contrasts
from frugal.common.evaluation.embed import Embedder, evaluating
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.metrics import recall_at, similarity
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.retrieval import Retrieval, embed, open_captioned
from frugal.common.evaluation.sugarcrepe import CATEGORIES
from frugal.common.evaluation.zero_shot import ZeroShot, open_dataset, predict
from frugal.common.models.named import clip_encoder
from frugal.common.recipe import EngineOptions
from frugal.common.run import Run, make_logger
from frugal.common.weights.runs import bundle_of
from support import described, start_ranks

SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
COUNTS = (1, 10, 134)
BATCH_SIZES = (3, 64, 100)


def write_images(folder: Path) -> None:
    """Class folders of 1, 10 and 134 noisy images over 3 classes, of several shapes."""
    generator = np.random.default_rng(0)
    for count in COUNTS:
        for number in range(count):
            path = folder / str(count) / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = generator.integers(20, 40, 2)
            pixels = generator.integers(0, 40, (height, width, 3), dtype=np.uint8)
            pixels += generator.integers(0, 200, 3, dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    for number in range(70):  # two classes, whose scores have an order
        path = folder / "two" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    targets = (generator.random((70, 3)) < 0.4).astype(np.int64)
    multi_label_tars(folder / "several", targets)
    templates = folder / "zeroshot_classification_templates.txt"
    templates.write_text("a photo of {c}\nthe {c}\n{c}, {c} and {c}\n")
    contrasts = folder / "contrasts"
    contrasts.mkdir()
    for place, category in enumerate(CATEGORIES):  # 70 items each, several of them to an image
        items = {
            str(2 * number): {
                "filename": f"{'abc'[image % 3]}/{image}.png",
                "caption": f"{number} and {place}",
                "negative_caption": f"{place} and {number % 3} and {number}",
            }
            for number in range(70)
            for image in [(7 * number + 19 * place) % 134]
        }
        (contrasts / f"{category}.json").write_text(json.dumps(items))


def recipe() -> SimpleNamespace:
    """What evaluations read of a recipe, with towers for 16 x 32 images."""
    model = clip_encoder("S/8", image_size=(16, 32), text_length=10)
    model = replace(
        model,
        image=replace(model.image, **SMALL),
        text=replace(model.text, **SMALL),
        embed_dim=8,
    )
    tokenizer = ClipBpe().load()
    data = SimpleNamespace(caption_tokenizer=SimpleNamespace(load=lambda: tokenizer))
    return SimpleNamespace(
        model=model,
        data=data,
        engine=EngineOptions(precision="bfloat16"),
        run=SimpleNamespace(seed=3, dir=None),
        evaluation=(),
        reduction=SimpleNamespace(text=None),
    )


CONTRASTS = Compositional(mask_ratio=0.5, views=2)
VIEWS = Retrieval(mask_ratio=0.5, views=3)
PUBLISHED = CenterCrop(order="crop_first", interpolation="tf1_bicubic")


class Captioned:
    """Labeled images with captions, some of them the same."""

    def __init__(self, images: LabeledImages) -> None:
        self.images = images
        self.captions = [[f"picture {n % 97}", f"{n} of {n % 5}"] for n in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, *share):
        for images, _, places in self.images.batches(*share):
            yield images, places


def bits(folder: Path, model, plan, run: Run) -> dict[str, list]:
    """Embeddings that have to agree to the last bit."""
    ranks, results = Ranks.current(), {}
    source = Embedder.of(bundle_of(model, plan), run)
    views = Embedder.of(bundle_of(model, plan), run, VIEWS)
    pixels = LabeledImages(folder / "134", size=plan.model.image.height_width)
    floats = LabeledImages(folder / "134", size=plan.model.image.height_width, crop=PUBLISHED)
    with evaluating(model):
        for size in BATCH_SIZES:
            for kind, embedder, images in (
                ("whole", source, pixels), ("masked", views, pixels), ("published", source, floats)
            ):  # fmt: skip
                embedded = embed(embedder, Captioned(images), batch_size=size, ranks=ranks)
                results[f"{kind} embedded by {size}"] = [
                    embedded.images.double().sum(1).tolist(),
                    embedded.texts.double().sum(1).tolist(),
                ]
            compared = replace(CONTRASTS, images=folder / "134")
            contrasts = open_contrasts(compared, folder / "contrasts", described(plan))
            verdicts = choose(
                Embedder.of(bundle_of(model, plan), run, compared),
                contrasts,
                batch_size=size,
                ranks=ranks,
            )
            results[f"cosines by {size}"] = verdicts.cosines.tolist()
        names = [f"thing {number}" for number in range(300)]
        classes = class_embeddings(source, names, ["{c}", "a {c}"], ranks=ranks)
    return results | {"classes": classes.double().sum(1).tolist()}


def answers(scenes: Path, model, plan, run: Run) -> dict[str, dict]:
    """What was said about every single image, and what was nearest to it."""
    ranks, results = Ranks.current(), {}
    for size in BATCH_SIZES:
        source = Embedder.of(bundle_of(model, plan), run)
        with evaluating(model):
            task = ZeroShot(templates="name", batch_size=size)
            question = open_dataset(task, scenes / "zero_shot", described(plan))
            said = predict(task, question, source, ranks=ranks)
            captioned = open_captioned(Retrieval(), scenes / "retrieval", described(plan))
            embedded = embed(source, captioned, batch_size=size, ranks=ranks)
        nearest = similarity(embedded.images, embedded.texts).topk(5).indices
        results[f"answers by {size}"] = {
            "said": said.ranked.tolist(),
            "labels": said.labels.tolist(),
            "nearest": nearest.tolist(),
        }
    return results


def kept(folder: Path, scenes: Path, model, plan, run: Run) -> dict[str, list]:
    """Numbers of probes and of two classes, with what was found image by image."""
    results = {}
    for size in BATCH_SIZES:
        for task in (
            LinearProbe(
                data=scenes, batch_size=size, weight_decay=1e-3, solver="adamw",
                features=folder / f"features of {run.world_size}" / str(size),
            ),
            ZeroShot(name="two", data=folder / "two", batch_size=size, metric="roc_auc"),
            ZeroShot(name="several", data=folder / "several", batch_size=size),
        ):  # fmt: skip
            found = []
            numbers = task.evaluate(bundle_of(model, plan), run, keep=found.append)
            tables = {name: table.tolist() for name, table in found[0].tables.items()}
            results[f"{task.name} kept by {size}"] = [numbers, tables, found[0].facts]
    return results


def numbers(folder: Path, scenes: Path, rank: int, world_size: int) -> dict[str, dict]:
    """Every case on this process."""
    plan = recipe()
    model = plan.model.build().eval()
    with torch.no_grad():
        for weight in model.image.parameters():
            weight.mul_(6)  # fresh towers see hardly a difference between images
    run = Run(folder, rank, world_size, rank, torch.device("cpu"), make_logger(rank))
    results = {}
    for size in BATCH_SIZES:
        for count in COUNTS:
            task = ZeroShot(data=folder / str(count), batch_size=size)
            results[f"{count} images by {size}"] = task.evaluate(bundle_of(model, plan), run)
        contrasts = Compositional(data=folder / "contrasts", images=folder / "134", batch_size=size)
        results[f"contrasts by {size}"] = contrasts.evaluate(bundle_of(model, plan), run)
    for size in BATCH_SIZES[1:]:
        for scene_task in (
            Retrieval(data=scenes, batch_size=size),
            Compositional(data=scenes, batch_size=size),
            ZeroShot(data=scenes, templates="name", batch_size=size),
            ZeroShot(data=scenes, templates="name", name="masked", mask_ratio=0.5, batch_size=size),
        ):
            results[f"{scene_task.name} by {size}"] = scene_task.evaluate(
                bundle_of(model, plan), run
            )
    results |= kept(folder, scenes, model, plan, run)
    results |= answers(scenes, model, plan, run) | bits(folder, model, plan, run)
    for size in BATCH_SIZES:
        generator = torch.Generator().manual_seed(size)
        image_of_text = torch.randint(7, (20,), generator=generator)
        images = torch.randint(-1, 2, (7, 3), generator=generator).float()  # many ties
        texts = torch.randint(-1, 2, (20, 3), generator=generator).float()
        recall = recall_at(
            images, texts, image_of_text, at=(1, 2), ranks=Ranks.current(), scores_at_once=30
        )
        results[f"ties {size}"] = [recall.image_retrieval, recall.text_retrieval]
    return json.loads(json.dumps(results))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labeled")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def alone(images: Path, scenes: Path) -> dict[str, dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes below
    found = numbers(images, scenes, 0, 1)
    torch.set_num_threads(threads)
    return found


def test_the_batch_size_changes_nothing(alone: dict[str, dict]) -> None:
    for name, result in alone.items():
        kind, by, size = name.partition(" by ")
        if by:
            assert result == alone[f"{kind} by {BATCH_SIZES[-1]}"], size


def test_the_model_under_test_tells_images_apart(alone: dict[str, dict]) -> None:
    found = alone["answers by 64"]
    assert len({row[0] for row in found["said"]}) > 5
    assert len({row[0] for row in found["nearest"]}) > 3
    assert len(set(found["labels"])) == 64
    # every item compares another pair, and both answers occur
    cosines = alone["cosines by 64"]
    assert len({tuple(pair) for pair in cosines}) == 7 * 70
    assert 20 < sum(true > false for true, false in cosines) < 7 * 70 - 20


def test_masked_and_published_images_are_other_images(alone: dict[str, dict]) -> None:
    found = [alone[f"{kind} embedded by 64"][0] for kind in ("whole", "masked", "published")]
    assert all(len(embeddings) == 134 for embeddings in found)
    for other in found[1:]:
        # the class token of some images attends to itself alone
        assert sum(one != two for one, two in zip(found[0], other, strict=True)) > 60


def test_every_image_is_counted_once(alone: dict[str, dict]) -> None:
    for count in COUNTS:
        assert alone[f"{count} images by 3"]["zero_shot_images"] == count
    scenes = alone["zero_shot by 64"]
    assert (scenes["zero_shot_images"], scenes["zero_shot_classes"]) == (128, 64)
    assert scenes["zero_shot_images_held_out"] == 128 * 8 // 64
    assert alone["retrieval by 64"]["retrieval_candidates"] == 40
    probe, _, facts = alone["linear_probe kept by 3"]
    assert (probe["linear_probe_images"], facts["train_images"]) == (128 - 16, 112)
    _, tables, facts = alone["two kept by 3"]
    assert facts["images"] == len(tables["margin"]) == 70 and len(set(tables["margin"])) > 50
    several, tables, facts = alone["several kept by 64"]
    assert facts["images"] == len(tables["scores"]) == 70
    assert len({tuple(row) for row in tables["scores"]}) > 50
    assert 0.3 < several["several_mean_average_precision"] < 0.9
    assert [alone[f"several kept by {size}"] for size in BATCH_SIZES] == [
        [several, tables, facts]
    ] * 3
    contrasts = alone["contrasts by 3"]
    assert contrasts["compositional_items"] == 7 * 70
    assert all(contrasts[f"compositional_{name}_items"] == 70 for name in CATEGORIES)
    assert contrasts["compositional_images"] == 134
    assert alone["compositional by 64"]["compositional_items"] == 7 * 10
    assert alone["compositional by 64"]["compositional_images"] == 7 * 10


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_changes_nothing(
    world_size: int, images: Path, scenes: Path, alone: dict[str, dict], tmp_path: Path
) -> None:
    processes = start_ranks(__file__, world_size, tmp_path, images, scenes, world_size)
    assert processes.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    for rank in range(world_size):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


if __name__ == "__main__":
    out, image_folder, scene_folder = (Path(word) for word in sys.argv[2:5])
    number, size = int(sys.argv[1]), int(sys.argv[5])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meeting", rank=number, world_size=size
    )
    found = numbers(image_folder, scene_folder, number, size)
    (out / f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
