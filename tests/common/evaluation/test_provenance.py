"""What is kept or compared is known by its bytes, and a model by how it computes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated import multi_label_tars, recipe, telling
from PIL import Image

from frugal.common.data.labeled import CaptionedImages, LabeledImages, MultiLabeledImages
from frugal.common.data.writing import NewSample, write_tars
from frugal.common.distributed import require_same
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Measure, SampleResults
from frugal.common.evaluation.compositional import Contrasts
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.provenance import config_digest, weights_digest
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.report.compare import Measured, compare_models, refusals
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of

WORDS = ["one", "two", "three", "four", "five", "six"]


def draw(path: Path, generator: np.random.Generator, *, brighter: int = 0) -> None:
    """A picture whose file has the same size whatever it shows."""
    pixels = generator.integers(0, 180, (32, 32, 3), dtype=np.uint8) + np.uint8(brighter)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=0)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """``train`` and ``test`` whose files have the same names and sizes."""
    generator = np.random.default_rng(3)
    for part in ("train", "test"):
        for number, name in enumerate("abc"):
            for place in range(8):
                brighter = 40 * (number == 0)
                draw(tmp_path / "data" / part / name / f"{place}.png", generator, brighter=brighter)
    return tmp_path / "data"


def replaced(path: Path) -> None:
    """Another picture under the name, size and times of a file, as ``cp -p`` leaves it."""
    before = path.stat()
    draw(path, np.random.default_rng(99))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_probe_is_measured_on_its_own_test_images_where_features_are_kept(
    parts: Path, run: Run, tmp_path: Path
) -> None:
    plan = recipe()
    model = telling(plan)
    task = LinearProbe(data=parts, weight_decay=1e-3)
    keeping = replace(task, features=tmp_path / "features")
    wanted = task.evaluate(bundle_of(model, plan), run)
    assert wanted["linear_probe_top1"] < 0.8  # 1.0 on the images that it was trained on
    assert keeping.evaluate(bundle_of(model, plan), run) == wanted
    assert keeping.evaluate(bundle_of(model, plan), run) == wanted
    for name in "abc":
        for place in range(8):
            replaced(parts / "test" / name / f"{place}.png")
    wanted = task.evaluate(bundle_of(model, plan), run)
    assert keeping.evaluate(bundle_of(model, plan), run) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"activation": "quick_gelu"},
        {"heads": 4},
        {"norm_epsilon": 1e-2},
        {"pooling": "mean"},
        {"positions": "sincos"},
        {"mean": (0.1, 0.5, 0.9)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_features_of_a_model_that_computes_otherwise_are_its_own(
    change: dict, parts: Path, run: Run, tmp_path: Path
) -> None:
    plan = recipe()
    model = telling(plan)
    task = LinearProbe(data=parts, weight_decay=1e-3, features=tmp_path / "features")
    task.evaluate(bundle_of(model, plan), run)
    other = recipe()
    other.model = replace(plan.model, image=replace(plan.model.image, **change))
    twin = other.model.build()
    twin.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n in twin.state_dict()}, strict=False
    )
    assert config_digest(bundle_of(twin, other)) != config_digest(bundle_of(model, plan))
    if "positions" not in change:
        assert weights_digest(twin) == weights_digest(model)
    kept = task.evaluate(bundle_of(twin.eval(), other), run)
    assert kept == replace(task, features=None).evaluate(bundle_of(twin, other), run)
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_how_a_module_computes_is_known_without_a_recipe_that_says_it() -> None:
    plan = recipe()
    model = telling(plan)
    before = config_digest(bundle_of(model, plan))
    assert config_digest(bundle_of(telling(plan), plan)) == before
    model.image.blocks[0].mlp.activation = "relu"
    assert config_digest(bundle_of(model, plan)) != before


def labeled(folder: Path) -> LabeledImages:
    return LabeledImages(folder, size=(8, 8))


def sample(picture: Path, word: str, label: int) -> NewSample:
    return NewSample(image=picture.read_bytes(), extension="png", about={}, text=word, label=label)


def write_pairs(folder: Path, colors: list[int], words: list[str]) -> Path:
    """One tar of pictures of one size with captions."""

    def samples():
        for place, (color, word) in enumerate(zip(colors, words, strict=True)):
            path = folder / "picture.png"
            draw(path, np.random.default_rng(color))
            yield sample(path, word, place % 2)
            path.unlink()

    folder.mkdir(parents=True)
    write_tars(folder, samples(), samples_per_shard=100)
    return folder


def test_a_digest_changes_with_any_byte_of_any_store(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        draw(tmp_path / "folder" / name, generator)
    shutil.copytree(tmp_path / "folder", tmp_path / "copy")
    folder = labeled(tmp_path / "folder").digest()
    assert labeled(tmp_path / "copy").digest() == folder
    replaced(tmp_path / "copy" / "b" / "0.png")
    assert labeled(tmp_path / "copy").digest() != folder
    shutil.copy(tmp_path / "folder" / "b" / "0.png", tmp_path / "copy" / "b" / "0.png")
    assert labeled(tmp_path / "copy").digest() == folder
    (tmp_path / "copy" / "a" / "1.png").rename(tmp_path / "copy" / "b" / "1.png")
    assert labeled(tmp_path / "copy").digest() != folder  # another label

    tars = {
        "first": ([1, 2, 3], WORDS[:3]),
        "same": ([1, 2, 3], WORDS[:3]),
        "picture": ([1, 2, 4], WORDS[:3]),
        "caption": ([1, 2, 3], ["one", "two", "seven"]),
    }
    captioned = {
        name: CaptionedImages(write_pairs(tmp_path / name, *content), size=(8, 8)).digest()
        for name, content in tars.items()
    }
    assert captioned["first"] == captioned["same"]
    assert len(set(captioned.values())) == 3

    targets = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]])
    several = [
        MultiLabeledImages(multi_label_tars(tmp_path / str(n), marks), size=(8, 8)).digest()
        for n, marks in enumerate((targets, targets, targets[::-1].copy()))
    ]
    assert several[0] == several[1] != several[2]


def test_a_tar_replaced_behind_its_index_is_refused_and_not_taken_for_the_old_one(
    run: Run, tmp_path: Path
) -> None:
    colors = [place % 4 for place in range(24)]
    for part in ("train", "test"):
        write_pairs(tmp_path / "data" / part, colors, [WORDS[c] for c in colors])
    plan, task = recipe(), LinearProbe(data=tmp_path / "data", weight_decay=0.1)
    task = replace(task, features=tmp_path / "features")
    model = telling(plan)
    task.evaluate(bundle_of(model, plan), run)
    other = write_pairs(tmp_path / "other", [c + 40 for c in colors], [WORDS[c] for c in colors])
    shard = next((tmp_path / "data" / "test").glob("*.tar"))
    new = next(other.glob("*.tar"))
    assert new.stat().st_size == shard.stat().st_size
    shutil.copy(new, shard)
    with pytest.raises(InputError, match=r"cannot be evaluated \(checksum"):
        task.evaluate(bundle_of(model, plan), run)


def test_what_was_handed_out_need_not_be_read_again(parts: Path) -> None:
    fresh, used = labeled(parts / "test"), labeled(parts / "test")
    list(used.batches(0, 1, 5))
    shutil.rmtree(parts / "test")
    digest = used.digest()
    with pytest.raises(InputError, match=r"cannot be evaluated \(unreadable"):
        fresh.digest()
    assert len(digest) == 64


def test_test_images_that_were_trained_on_and_repeated_ones_are_counted(
    parts: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        shutil.copy(
            parts / "train" / "a" / f"{number}.png", parts / "test" / "a" / f"t{number}.png"
        )
    shutil.copy(parts / "test" / "b" / "1.png", parts / "test" / "c" / "again.png")
    plan, outcomes = recipe(), []
    model = telling(plan)
    task = LinearProbe(data=parts, weight_decay=1e-3)
    numbers = task.evaluate(bundle_of(model, plan), run, keep=outcomes.append)
    assert numbers["linear_probe_images_trained_on"] == 3
    assert outcomes[0].facts["repeated_images"] == 1
    assert "linear_probe: 3 of the 28 images of" in caplog.text
    assert "1 of the 28 images are there already under another name" in caplog.text
    ZeroShot(data=parts / "test").evaluate(bundle_of(model, plan), run, keep=outcomes.append)
    assert outcomes[1].facts["repeated_images"] == 1
    assert outcomes[1].facts["data_sha256"] == outcomes[0].facts["data_sha256"]


def test_test_images_of_classes_that_were_never_trained_are_told_and_counted(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pairs(tmp_path / "data" / "test", [5, 6, 7, 8], ["x"] * 4)  # labels 0, 1, 0, 1
    draw(tmp_path / "p.png", np.random.default_rng(0))
    gap = (sample(tmp_path / "p.png", "x", label) for label in [0, 2] * 12)
    (tmp_path / "data" / "train").mkdir()
    write_tars(tmp_path / "data" / "train", gap, samples_per_shard=100)
    plan = recipe()
    task = LinearProbe(data=tmp_path / "data", weight_decay=0.1)
    numbers = task.evaluate(bundle_of(telling(plan), plan), run)
    assert numbers["linear_probe_images_of_untrained_classes"] == 2
    assert "2 of the 4 images" in caplog.text and "nothing was trained on" in caplog.text


def measured(name: str, digest: str, num_images: int = 4) -> Measured:
    right = torch.tensor([1, 0, 1, 1], dtype=torch.uint8)[:num_images]
    outcomes = SampleResults(
        {"data_sha256": digest}, num_images, {"right": right}, {"top1": Measure("mean", "right")}
    )
    return Measured(name, {"zero_shot": outcomes}, {"zero_shot": {}})


def test_models_that_were_measured_on_other_images_are_named() -> None:
    models = [measured("a", "x"), measured("b", "x"), measured("c", "y")]
    (row,) = compare_models(models, times=20, confidence=0.9, seed=0)
    assert [entry.difference is None for entry in row.entries] == [True, False, True]
    assert [entry.other_images for entry in row.entries] == [False, False, True]


def test_models_of_which_one_was_measured_before_data_were_told_by_bytes_are_not_compared() -> None:
    old = {"zero_shot": {"weights_sha256": "f"}}
    new = {"zero_shot": {"weights_sha256": "f", "config_digest": "c"}}
    first, second, third = (
        replace(measured(name, "x"), facts=facts)
        for name, facts in (("a", new), ("b", old), ("c", new))
    )
    rows = compare_models([first, second, third], times=20, confidence=0.9, seed=0)
    assert [entry.earlier for entry in rows[0].entries] == [False, True, False]
    assert [entry.difference is None for entry in rows[0].entries] == [True, True, False]
    (line,) = refusals(rows)
    assert line.startswith("zero_shot: it cannot be told whether b and a were measured on the same")


@pytest.mark.parametrize(
    "make",
    [
        lambda root: LabeledImages(root, size=(8, 8)),
        lambda root: CaptionedImages(root.with_name(f"{root.name} tars"), size=(8, 8)),
    ],
    ids=["folder", "tars"],
)
def test_processes_notice_copies_that_differ_in_one_picture(
    make: Callable[[Path], LabeledImages], tmp_path: Path
) -> None:
    listings = []
    for place, last in (("one", 1), ("two", 1), ("three", 2)):
        for name in ("a/0.png", "b/0.png"):
            draw(tmp_path / place / name, np.random.default_rng(last * (name[0] == "b")))
        write_pairs(tmp_path / f"{place} tars", [0, last], WORDS[:2])
        listings.append(make(tmp_path / place).listing())
    assert listings[0] == listings[1] != listings[2]


def test_a_process_that_sees_other_data_is_named_in_one_sentence() -> None:
    seen = ["x", "x", "y", "x", "z"]
    with pytest.raises(InputError) as caught:
        require_same(
            "x",
            "data of the evaluation 'zero_shot'",
            gather=lambda own: [(value, *own[1:]) for value in seen],
        )
    assert "process 2, 4 of 5 see another copy than process 0" in str(caught.value)
    require_same("x", "data", gather=lambda value: [value] * 3)


def test_contrasts_are_known_by_their_pictures_and_captions(tmp_path: Path) -> None:
    for place in ("one", "two"):
        draw(tmp_path / place / "a.png", np.random.default_rng(1))
        (tmp_path / place / "add_obj.json").write_text(
            '{"1": {"filename": "a.png", "caption": "a cat", "negative_caption": "a dog"}}'
        )
    one, two = (Contrasts(tmp_path / place, size=(8, 8)) for place in ("one", "two"))

    def digest(contrasts: Contrasts) -> bytes:
        return contrasts.contents().numpy().tobytes()

    assert digest(one) == digest(two)
    assert one.listing() == two.listing()
    replaced(tmp_path / "two" / "a.png")
    two = Contrasts(tmp_path / "two", size=(8, 8))
    assert digest(one) != digest(two)
    assert one.listing() != two.listing()
