"""Language composition on SugarCrepe's layout, against clip_benchmark's reader and metric."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import evaluated
import numpy as np
import pytest
import torch
from clip_benchmark.datasets.sugar_crepe import SugarCrepe
from clip_benchmark.metrics import image_caption_selection
from evaluated import OpenClipLike, telling, tokenizer
from PIL import Image
from torch import Tensor

from frugal.common.data.labeled import grouped
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.compositional import CaptionChoices, Compositional, Contrasts, choose
from frugal.common.evaluation.embed import Embedder, evaluating
from frugal.common.evaluation.sugarcrepe import CATEGORIES, KINDS
from frugal.common.report.examples_of_model import examples_of_model
from frugal.common.run import Run
from frugal.common.scenes import compositional as scenes_compositional
from frugal.common.weights.runs import bundle_of

SIZE = (24, 32)
recipe = partial(evaluated.recipe, SIZE)


def clip_benchmarks(model, images: Path, file: Path) -> float:
    """The share that clip_benchmark finds for one category."""

    def transform(image: Image.Image) -> Tensor:
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        return torch.from_numpy(CenterCrop().decode(encoded.getvalue(), size=(24, 32)).copy())

    items = SugarCrepe(str(images), str(file), transform=transform)

    def batches() -> Iterator[tuple[Tensor, list[list[str]]]]:
        for start in range(0, len(items), 7):
            rows = [items[place] for place in range(start, min(start + 7, len(items)))]
            yield torch.stack([image for image, _ in rows]), [texts for _, texts in rows]

    theirs = image_caption_selection.evaluate(
        OpenClipLike(model).eval(), batches(), tokenizer(), "cpu", amp=False
    )
    return theirs["text_acc"]


def assert_as_clip_benchmark(numbers: dict, model, images: Path, files: Path) -> None:
    shares = {name: clip_benchmarks(model, images, files / f"{name}.json") for name in CATEGORIES}
    for name, share in shares.items():
        assert numbers[f"compositional_{name}"] == pytest.approx(share, abs=1e-6)  # float32 means
    assert len(set(shares.values())) > 2
    for kind in ("replace", "swap", "add"):
        own = [share for name, share in shares.items() if name.startswith(kind)]
        assert numbers[f"compositional_{kind}"] == pytest.approx(sum(own) / len(own), abs=1e-6)
    mean = sum(shares.values()) / 7
    assert numbers["compositional_mean"] == pytest.approx(mean, abs=1e-6)


def write_items(path: Path, items: list[tuple[str, str, str]] | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(items, list):
        names = ("filename", "caption", "negative_caption")
        # keys have gaps in SugarCrepe's own files
        items = {str(3 * n): dict(zip(names, item, strict=True)) for n, item in enumerate(items)}
    path.write_text(json.dumps(items))


def photos(folder: Path, count: int) -> list[str]:
    """Noisy images of several shapes; their file names."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:012d}.png" for number in range(count)]
    for name in names:
        height, width = generator.integers(24, 60, 2)
        base = generator.integers(0, 200, 3)
        pixels = base + generator.integers(0, 50, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return names


@pytest.fixture
def sugar(tmp_path: Path) -> Path:
    """All seven files, 30 to 36 items each, with 20 images that they share."""
    files = photos(tmp_path / "sugar" / "val2017", 20)
    generator = np.random.default_rng(1)
    words = ["dog", "red", "cat", "on", "table", "two", "men", "big", "under", "kite"]
    for place, category in enumerate(CATEGORIES):
        items = []
        for number in range(30 + place):
            right, wrong = (" ".join(generator.choice(words, 5)) for _ in range(2))
            items.append((files[(number * 3 + place) % 20], f"{right} {number}", wrong))
        write_items(tmp_path / "sugar" / f"{category}.json", items)
    return tmp_path / "sugar"


def test_categories_are_those_of_the_scenes() -> None:
    assert sorted(CATEGORIES) == sorted(scenes_compositional.KINDS)
    assert len(CATEGORIES) == 7 and set(KINDS) == {"replace", "swap", "add"}


@pytest.mark.parametrize("batch_size", [5, 64])
def test_shares_equal_clip_benchmark_on_the_same_files(
    sugar: Path, run: Run, batch_size: int
) -> None:
    plan = recipe()
    model = telling(plan)
    ours = Compositional(data=sugar, batch_size=batch_size).evaluate(bundle_of(model, plan), run)
    assert_as_clip_benchmark(ours, model, sugar / "val2017", sugar)
    assert ours["compositional_images"] == 20
    assert ours["compositional_items"] == sum(range(30, 37))
    assert [ours[f"compositional_{name}_items"] for name in CATEGORIES] == list(range(30, 37))
    assert json.loads(json.dumps(ours)) == ours


def test_scenes_equal_clip_benchmark_on_the_same_files(scenes: Path, run: Run) -> None:
    plan = recipe()
    model = telling(plan)
    ours = Compositional(data=scenes, batch_size=13).evaluate(bundle_of(model, plan), run)
    folder = scenes / "compositional"
    assert_as_clip_benchmark(ours, model, folder / "images", folder)
    assert ours["compositional_items"] == ours["compositional_images"] == 70


def coco(real_data: Path, out: Path) -> Path:
    """The images of COCO's val2017 that are here, under their names."""
    out.mkdir()
    for tar in (real_data / "coco_mini" / "val").glob("*.tar"):
        with tarfile.open(tar) as archive:
            for member in archive.getmembers():
                name = Path(member.name).name.removeprefix("coco_val2017_")
                if name.endswith(".jpg"):
                    (out / name).write_bytes(archive.extractfile(member).read())
    return out


def test_sugar_crepe_on_coco_equals_clip_benchmark(
    real_data: Path, tmp_path: Path, run: Run
) -> None:
    images = coco(real_data, tmp_path / "val2017")
    source = real_data / "sugarcrepe"
    available = json.loads((source / "available_items.json").read_text())["items"]
    for name in CATEGORIES:
        items = json.loads((source / f"{name}.json").read_text())
        write_items(tmp_path / "sugar" / f"{name}.json", {k: items[k] for k in available[name]})
    plan = recipe()
    model = telling(plan)
    task = Compositional(data=tmp_path / "sugar", images=images)
    ours = task.evaluate(bundle_of(model, plan), run)
    assert_as_clip_benchmark(ours, model, images, tmp_path / "sugar")
    assert {name: ours[f"compositional_{name}_items"] for name in CATEGORIES} == {
        "add_att": 8, "add_obj": 36, "replace_att": 9, "replace_obj": 25, "replace_rel": 28,
        "swap_att": 15, "swap_obj": 1,
    }  # fmt: skip
    assert ours["compositional_items"] == 122


def test_lacking_images_of_sugar_crepe_are_counted(real_data: Path, tmp_path: Path) -> None:
    images = coco(real_data, tmp_path / "val2017")
    with pytest.raises(InputError) as caught:
        Contrasts(real_data / "sugarcrepe", images, size=(24, 32))
    said = str(caught.value)
    assert "\n" not in said
    for name, of in (("add_att", "497"), ("swap_obj", "224"), ("replace_obj", "823")):
        assert f"of the {of} that {name}.json names" in said
    items = json.loads((real_data / "sugarcrepe" / "swap_obj.json").read_text()).values()
    lost = {item["filename"] for item in items if not (images / item["filename"]).exists()}
    assert f" {len(lost)} of the 224 that swap_obj.json names" in said


def test_a_tie_is_wrong(tmp_path: Path, run: Run, caplog) -> None:
    (name,) = photos(tmp_path / "images", 1)
    same = "a dog on a table under a tree"
    items = [(name, f"{same} {word}", f"{same} not {word}") for word in ("one", "two")]
    write_items(tmp_path / "swap_obj.json", [*items, (name, "A dog", "a  DOG"), (name, "a", "b")])
    plan = recipe(length=8)
    with caplog.at_level(logging.WARNING, logger="evaluating"):
        numbers = Compositional(data=tmp_path).evaluate(bundle_of(telling(plan), plan), run)
    assert numbers["compositional_swap_obj"] in (0, 0.25)
    assert "does not tell the captions of 3 of the 4 items apart" in caplog.text


def test_verdicts_are_counted_by_category() -> None:
    categories = ["add_obj", "swap_obj", "add_obj", "swap_att", "add_obj", "swap_att"]
    cosines = torch.tensor([[1, 0], [0, 1], [2, 1], [1, 1], [0, 1], [5, 4]]).float()
    assert CaptionChoices(categories, cosines, 4).numbers() == {
        "swap_obj": 0.0,
        "swap_att": 0.5,
        "add_obj": 2 / 3,
        "swap": 0.25,  # of two categories, whatever their items; add lacks one
        "swap_obj_items": 1,
        "swap_att_items": 2,
        "add_obj_items": 3,
        "items": 6,
        "images": 4,
    }


def test_files_that_are_not_there_leave_their_means_out_and_are_named(
    sugar: Path, run: Run, caplog
) -> None:
    plan = recipe()
    model = telling(plan)
    whole = Compositional(data=sugar).evaluate(bundle_of(model, plan), run)
    (sugar / "swap_att.json").unlink()
    (sugar / "add_obj.json").unlink()
    with caplog.at_level(logging.WARNING, logger="evaluating"):
        part = Compositional(data=sugar).evaluate(bundle_of(model, plan), run)
    assert "has no swap_att.json, add_obj.json; the means that need them" in caplog.text
    gone = {"swap_att", "add_obj", "swap_att_items", "add_obj_items", "swap", "add", "mean"}
    assert whole.keys() - part.keys() == {f"compositional_{name}" for name in gone}
    for name in ("replace", "replace_rel", "swap_obj", "add_att_items"):
        assert part[f"compositional_{name}"] == whole[f"compositional_{name}"]


@pytest.mark.parametrize("place", ["images", "val2017", "."])
def test_images_are_found_beside_the_files(place: str, tmp_path: Path) -> None:
    names = photos(tmp_path / place, 2)
    write_items(tmp_path / "add_att.json", [(name, "a", "b") for name in names])
    data = Contrasts(tmp_path, size=(24, 32))
    assert data.images([1, 0]).shape == (2, 3, 24, 32)


def test_given_images_are_taken(tmp_path: Path, run: Run) -> None:
    names = photos(tmp_path / "elsewhere", 2)
    photos(tmp_path / "images", 1)
    write_items(tmp_path / "add_att.json", [(name, "a", "b") for name in names])
    assert len(Contrasts(tmp_path, tmp_path / "elsewhere", size=(24, 32))) == 2
    task = Compositional(data=tmp_path, images=tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere is no folder; check the path"):
        task.folder()


def test_every_item_is_asked_of_its_own_image(sugar: Path) -> None:
    data = Contrasts(sugar, size=(24, 32))
    asked = set()
    for number, item in zip(data.image_of_item, data.items, strict=True):
        assert data.files[number] == item.file
        asked.add((item.category, item.file, item.caption, item.negative_caption))
    pairs = {
        (number, *own[place : place + 2])
        for number, own in enumerate(data.captions)
        for place in range(0, len(own), 2)
    }
    expected = set()
    for path in sugar.glob("*.json"):
        for value in json.loads(path.read_text()).values():
            expected.add((path.stem, *value.values()))
    assert asked == expected
    assert pairs == {(data.files.index(file), *texts) for _, file, *texts in expected}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [7, 64, 100])
def test_the_model_takes_the_same_images_at_a_time_on_any_number_of_processes(
    tmp_path: Path, world_size: int, batch_size: int
) -> None:
    names = photos(tmp_path / "images", 150)
    write_items(tmp_path / "add_att.json", [(name, "a", "b") for name in names])
    data = Contrasts(tmp_path, size=(8, 16))
    taken = [
        places.tolist()
        for rank in range(world_size)
        for _, places in grouped(data.batches(rank, world_size, batch_size))
    ]
    assert sorted(taken) == [part.tolist() for part in torch.arange(150).split(64)]


def test_loader_processes_change_nothing(sugar: Path, run: Run) -> None:
    plan = recipe()
    model = telling(plan)
    data = Contrasts(sugar, size=(24, 32))
    with evaluating(model):
        embedder = Embedder.of(bundle_of(model, plan), run)
        alone = choose(embedder, data, batch_size=4)
        helped = choose(embedder, data, batch_size=9, workers=2)
    assert torch.equal(alone.cosines, helped.cosines)
    assert 0 < int(alone.right.sum()) < len(data.items)


# What cannot be used.


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Contrasts(folder, size=(24, 32))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert "has none of the files replace_obj.json, replace_att.json" in refused(tmp_path)


ITEM = {"filename": "000000000000.png", "caption": "a", "negative_caption": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": {"filename": ', "cannot be read as JSON"),
        ("<html>404</html>", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "does not hold items by key"),
        (json.dumps([ITEM]), "does not hold items by key"),
        (json.dumps({"7": ITEM | {"caption": ""}}), "the item '7' of"),
        (json.dumps({"7": ITEM | {"negative_caption": 3}}), "has no negative_caption; every"),
        (json.dumps({"7": ["a", "b", "c"]}), "has no filename"),
        (json.dumps({"7": ITEM | {"caption": "b"}}), "has the same caption as true and as false"),
        (json.dumps({"7": ITEM, "9": ITEM}), "the items '7' and '9' of"),
        ('{"7": %s, "7": %s}' % ((json.dumps(ITEM),) * 2), "the key '7' occurs twice"),
        (json.dumps({"7": ITEM | {"filename": "gone.png"}}), "1 of the 1 that swap_att.json names"),
        (json.dumps({"7": ITEM | {"filename": "."}}), "the first is ."),
        (json.dumps({"7": ITEM | {"filename": "a\0b"}}), "1 of the 1"),
    ],
)
def test_odd_files_are_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    photos(tmp_path / "images", 1)
    (tmp_path / "swap_att.json").write_text(text)
    said = refused(tmp_path)
    assert message in said and "swap_att.json" in said


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "swap_att.json").write_bytes(b"\xff\xfe\x00{}")
    assert "swap_att.json cannot be read as JSON" in refused(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(sugar: Path, run: Run, workers: int) -> None:
    path = sugar / "val2017" / "000000000007.png"
    path.write_bytes(path.read_bytes()[:60])
    plan = recipe()
    with pytest.raises(InputError, match=r"000000000007\.png cannot be evaluated") as caught:
        Compositional(data=sugar, workers=workers).evaluate(bundle_of(telling(plan), plan), run)
    assert "\n" not in str(caught.value)


# Pictures.


def test_the_picture_holds_some_images(sugar: Path, run: Run) -> None:
    plan, shown = recipe(), {}
    numbers = Compositional(data=sugar).evaluate(
        bundle_of(telling(plan), plan), run, show=shown.__setitem__
    )
    picture = shown["compositional"]
    assert picture.dtype == np.uint8 and picture.shape[0] == 3
    assert len(np.unique(picture)) > 50
    assert numbers == Compositional(data=sugar).evaluate(bundle_of(telling(plan), plan), run)


@pytest.mark.parametrize("interpolation", ["bicubic", "tf1_bicubic"])
def test_examples_show_both_captions_the_nearer_one_first(
    sugar: Path, run: Run, interpolation: str
) -> None:
    task = Compositional(data=sugar, crop=CenterCrop(interpolation=interpolation))
    plan = recipe(evaluation=(task, Compositional()))
    model = telling(plan)
    gathered = examples_of_model(
        bundle_of(model, plan),
        plan.evaluation,
        run,
        count=24,
        reduction=plan.reduction.image,
    )
    assert len(gathered.contrasted) == len(gathered.masked) == 12
    data = Contrasts(sugar, size=(24, 32), crop=task.crop)
    with evaluating(model):
        verdicts = choose(Embedder.of(bundle_of(model, plan), run, task), data, batch_size=64)
    by_caption = {
        (item.file, item.caption, item.negative_caption): row
        for item, row in zip(data.items, verdicts.cosines.tolist(), strict=True)
    }
    firsts = set()
    for example in gathered.contrasted:
        assert example.image.dtype == np.uint8 and example.image.shape == (3, 24, 32)
        right = next(guess for guess in example.guesses if guess.right)
        wrong = next(guess for guess in example.guesses if not guess.right)
        assert example.truth == (right.text,)
        rows = [r for key, r in by_caption.items() if key[1:] == (right.text, wrong.text)]
        assert any(row == pytest.approx([right.score, wrong.score], abs=1e-5) for row in rows)
        assert example.guesses[0].score >= example.guesses[1].score
        assert example.question in {"replace, object", "replace, attribute", "replace, relation",
                                    "swap, object", "swap, attribute", "add, object",
                                    "add, attribute"}  # fmt: skip
        firsts.add(example.guesses[0].right)
    assert firsts == {True, False}
