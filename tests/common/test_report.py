"""The report: one offline page, its curves, and the numbers beside it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.errors import InputError
from frugal.common.evaluation.config import Compositional, Retrieval, ZeroShot
from frugal.common.evaluation.curves import Curve, line_chart, short_number, smooth, thin, ticks
from frugal.common.evaluation.examples import (
    ClassRecall,
    Confusion,
    Drawing,
    Example,
    Guess,
    masked_examples,
)
from frugal.common.evaluation.gathering import Gathered
from frugal.common.evaluation.sections import Command
from frugal.common.models.config import clip_encoder
from frugal.common.objectives.config import Contrastive
from frugal.common.recipe import AdamW, Recipe, Reductions, RunOptions, WarmupCosine, to_json
from frugal.common.reduction.image import KeepAll, Kept
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate
from frugal.common.report import REQUIRED, collect_numbers, find_stages, read_metrics, write_report
from frugal.common.run import Run, make_logger
from support import command

NUMBERS = {
    "zero_shot_top1": 0.8125,
    "zero_shot_top1_held_out": 0.5,
    "zero_shot_classes": 6,
    "zero_shot_classes_held_out": 1,
    "image_retrieval_recall_at_1": 0.25,
    "text_retrieval_recall_at_1": 0.375,
    "retrieval_candidates": 500,
    "samples_seen": 90_112,
    "train_seconds": 211.3,
    "samples_per_second": 426.5,
    "world_size": 2,
    "engine": "deepspeed",
}
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements in order; refuses tags that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def log(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def steps(count: int, per_step: int = 64, **extra) -> list[dict]:
    return [
        {
            "step": step,
            "samples": step * per_step,
            "loss": 4 / step,
            "accuracy": 1 - 1 / step,
            "learning_rate": 1e-3 / step,
            "samples_per_second": 400.0,
            **extra,
        }
        for step in range(1, count + 1)
    ]


def picture(height: int = 8, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def gathered() -> Gathered:
    images = torch.from_numpy(np.stack([picture(seed=n) for n in range(2)]))
    kept = Kept.packed(torch.tensor([0, 5, 1]), torch.tensor([2, 1]))
    wrong = "<script>alert('x')</script> & a \"moon\""
    example = Example(
        picture(), ("red ring",), (Guess("red ring", 0.75, True), Guess("blue ring", 0.125, False))
    )
    caption = Example(
        picture(300, 200), (wrong,), (Guess(wrong, 0.5, True), Guess("other", -0.25, False))
    )
    colors, shapes = ("red", "blue"), ("ring", "star", "moon")
    names = [f"{color} {shape}" for color in colors for shape in shapes]
    return Gathered(
        masked=tuple(masked_examples(images, kept, 4, [wrong, "plain"])),
        classified=(example,),
        retrieved=(caption,),
        classes=tuple(
            ClassRecall(name, place, 10 if place else 0, name == "blue star")
            for place, name in enumerate(names)
        ),
        confused=(Confusion("red ring", "blue ring", 7),),
    )


def written(folder: Path, **options) -> Page:
    given = {"numbers": NUMBERS, "stages": {}} | options
    return Page(write_report(folder, **given).read_text(encoding="utf-8"))


@pytest.fixture
def page(tmp_path: Path) -> Page:
    stages = {
        "masked": log(tmp_path / "masked", steps(30)),
        "unmasked": log(tmp_path / "unmasked", steps(4)),
    }
    commands = [Command("Look at <it>", "tensorboard --logdir 'runs' && echo")]
    return written(
        tmp_path / "out", stages=stages, gathered=gathered(), commands=commands, title="A & B"
    )


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    assert page.all("script") == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
        assert not any(name.startswith("on") for name in attributes)
    style = page.words[page.words.index(next(w for w in page.words if "--paper" in w))]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in " ".join(page.words)


def test_every_image_carries_its_pixels_and_a_description(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 2 * 2 + 1 + 1
    for attributes in images:
        kind, _, encoded = attributes["src"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.format == kind.rpartition("/")[2].upper()
            size = (int(attributes["width"]), int(attributes["height"]))
            assert image.size == size
            assert size in ((12, 8), (200, 300))
        assert attributes["alt"].strip()


def test_small_pictures_are_exact(tmp_path: Path) -> None:
    page = written(tmp_path, gathered=gathered())
    encoded = page.all("img")[0]["src"].partition(";base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert (np.asarray(image).transpose(2, 0, 1) == picture(seed=0)).all()


def test_words_from_the_data_stay_words(page: Page) -> None:
    assert "<script>alert('x')</script> & a \"moon\"" in page.text
    assert "A & B" in page.text
    assert "Look at <it>" in page.text
    assert "tensorboard --logdir 'runs' && echo" in page.text


def test_the_headline_compares_with_chance(page: Page) -> None:
    text = page.text.replace("\u2009", " ")
    for words in (
        "Zero-shot, top 1 81.2 %",
        "chance 16.7 % among 6 classes",
        "Never seen in training 50.0 %",
        "Text finds image 25.0 % chance 0.2 % among 500 images",
        "Image finds text 37.5 %",
        "Samples seen 90,112 in 3.5 minutes",
        "deepspeed, 2 processes",
    ):
        assert words in text


def test_the_right_answers_are_marked(page: Page) -> None:
    marks = [attributes["class"] for attributes in page.all("li") if "class" in attributes]
    assert marks == ["right", "wrong", "right", "wrong"]
    assert page.text.count("✓") == 2


def test_the_grid_has_a_cell_per_class_in_its_place(page: Page) -> None:
    cells = [attributes for attributes in page.all("td") if attributes.get("title")]
    assert [cell["title"] for cell in cells] == [
        "red star: 1 of 10", "red moon: 2 of 10",
        "blue ring: 3 of 10", "blue star: 4 of 10", "blue moon: 5 of 10",
    ]  # fmt: skip
    assert [cell["title"] for cell in cells if cell.get("class") == "held-out"] == [
        "blue star: 4 of 10"
    ]
    assert "red ring taken for blue ring \N{MULTIPLICATION SIGN} 7" in page.text.replace(
        "\xa0", " "
    )


@pytest.mark.parametrize(
    "names", [["cat", "dog"], ["red ring", "blue star"], ["red ring", "red star"], []]
)
def test_classes_that_are_no_grid_get_none(tmp_path: Path, names: list[str]) -> None:
    classes = tuple(ClassRecall(name, 1, 2) for name in names)
    assert written(tmp_path, gathered=Gathered(classes=classes)).all("td") == [{} for _ in NUMBERS]


def test_composition_is_a_grid_of_how_by_what(tmp_path: Path) -> None:
    example = Example(
        picture(),
        ("a red ring",),
        (Guess("a <blue> ring", 0.5, False), Guess("a red ring", 0.25, True)),
        question="replace, attribute",
    )
    numbers = {
        "compositional_replace_att": 0.625,
        "compositional_replace_rel": 0.5,
        "compositional_swap_obj": 0.25,
        "compositional_swap": 0.375,
    }
    page = written(tmp_path, numbers=NUMBERS | numbers, gathered=Gathered(contrasted=(example,)))
    text = page.text.replace("\u2009", " ")
    assert "object attribute relation mean replace \N{EN DASH} 62.5 50.0 \N{EN DASH}" in text
    assert "swap 25.0 \N{EN DASH} \N{EN DASH} 37.5 a <blue> ring" in text  # and no row for add
    assert "a <blue> ring 0.50 a red ring ✓ 0.25 replace, attribute" in text
    assert len(page.all("img")) == 1
    alone = written(tmp_path, numbers=NUMBERS | numbers)
    assert "swap 25.0" in alone.text and alone.all("img") == []
    assert "True captions" not in written(tmp_path, gathered=Gathered()).text


def test_what_a_reduction_draws_is_shown(tmp_path: Path) -> None:
    drawing = Drawing(picture(40, 100), "Own<Masking>")
    page = written(tmp_path, gathered=Gathered(drawn=drawing))
    assert "How patches are chosen" in page.text
    assert "Drawn by Own<Masking> itself." in page.text
    (attributes,) = page.all("img")
    assert (attributes["width"], attributes["height"]) == ("100", "40")
    assert "How patches are chosen" not in written(tmp_path, gathered=gathered()).text


def test_the_json_holds_every_number(tmp_path: Path) -> None:
    written(tmp_path, numbers=NUMBERS | {"zero_shot_top5": math.nan, "more": 3})
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == NUMBERS | {"zero_shot_top5": None, "more": 3}
    assert set(REQUIRED) <= set(saved)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_number_is_named(tmp_path: Path, name: str) -> None:
    numbers = {key: value for key, value in NUMBERS.items() if key != name}
    with pytest.raises(ValueError, match=f"a report needs {name}"):
        write_report(tmp_path, numbers=numbers, stages={})
    assert not (tmp_path / "report.html").exists()


def test_a_number_that_was_not_measured_shows_as_a_dash(tmp_path: Path) -> None:
    numbers = dict.fromkeys(REQUIRED) | {"world_size": 1, "engine": "accelerate"}
    assert (
        "Samples per second \N{EN DASH} accelerate, 1 process"
        in written(tmp_path, numbers=numbers).text
    )


def test_without_examples_and_curves_their_sections_are_left_out(tmp_path: Path) -> None:
    page = written(tmp_path, stages={"gone": tmp_path / "gone"}, gathered=Gathered())
    assert page.all("h2") == page.all("svg") == page.all("img") == []


# Curves.


def test_each_stage_continues_where_the_one_before_ended(tmp_path: Path) -> None:
    stages = {name: log(tmp_path / name, steps(5, per_step=100)) for name in "abc"}
    page = written(tmp_path, stages=stages)
    assert len(page.all("svg")) == 4
    lines = [a["d"] for a in page.all("path")][:3]
    across = [[float(p.split()[0]) for p in d[1:].split("L")] for d in lines]
    step = across[0][1] - across[0][0]
    for before, after in itertools.pairwise(across):
        assert after[0] - before[-1] == pytest.approx(step, abs=0.2)
    assert [len(places) for places in across] == [5, 5, 5]


def test_a_chart_is_drawn_for_what_was_logged_only(tmp_path: Path) -> None:
    lines = [{"step": 1, "samples": 8, "loss": 2.0}, {"step": 2, "samples": 16, "loss": 1.0}]
    page = written(tmp_path, stages={"a": log(tmp_path / "a", lines)})
    assert len(page.all("svg")) == 1


def test_broken_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"samples": 1}\n[3]\n{"step": 2}\n\xff\xfe\n{"samples": 2, "loss": NaN}\n{"sam'
    )
    assert [line["samples"] for line in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    values = [3.0, 2.0, math.nan, 1.0, math.inf, 0.5, 0.4]
    chart = line_chart("Loss", [Curve("a", tuple(enumerate(values)))], x_name="x", description="")
    path = ElementTree.fromstring(chart).find("path")
    assert path is not None
    assert path.attrib["d"].count("M") == 3
    assert "nan" not in chart
    assert "inf" not in chart
    empty = line_chart("L", [Curve("a", ((0, math.nan),))], x_name="x", description="")
    assert "Nothing was logged" in empty


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 1e9], [1e-9, 2e-9]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_any_values_stay_within_the_chart(values: list[float], from_zero: bool) -> None:
    points = tuple((float(x), y) for x, y in enumerate(values, start=1))
    chart = line_chart(
        "T", [Curve("a", points)], x_name="x", description="d", from_zero=from_zero, smoothed=True
    )
    root = ElementTree.fromstring(chart)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for path in root.iter("path"):
        for point in path.attrib["d"].replace("M", " ").replace("L", " ").split()[::2]:
            assert 0 <= float(point) <= width
        for point in path.attrib["d"].replace("M", " ").replace("L", " ").split()[1::2]:
            assert 0 <= float(point) <= height
    assert list(root.iter("path")) or list(root.iter("circle"))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 7.7), (1e-5, 2e-3), (-40, 1234567)])
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7
    assert all(low - 1e-9 * high <= mark <= high * (1 + 1e-9) for mark in marks)
    step = marks[1] - marks[0]
    digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - good) for good in (1, 2, 5, 10)) < 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (80_000, "80k"), (1_500_000, "1.5M"), (12.8e9, "12.8G"), (0.25, "0.25"),
        (2.5e-4, "2.5e-4"), (999.96, "1000"), (-3, "-3"), (426.54, "427"), (0.1 + 0.2, "0.3"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_long_curves_are_thinned_and_smoothed_around_each_point() -> None:
    points = [(float(x), float(x % 2)) for x in range(5000)]
    few = thin(points)
    assert len(few) == 300
    assert (few[0], few[-1]) == (points[0], points[-1])
    middle = smooth(points, window=101)[2500][1]
    assert middle == pytest.approx(0.5, abs=0.01)
    assert smooth([(0, 1.0), (1, math.nan), (2, 3.0)], window=3)[1] == (1, 2.0)
    assert smooth([(0, 1.0), (1, 5.0)], window=3)[0] == (0, 3.0)


# The command.


def small_recipe(scenes: Path) -> Recipe:
    model = clip_encoder("S/8", image_size=32, text_length=20)
    small = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
    return Recipe(
        model=replace(
            model,
            image=replace(model.image, **small),
            text=replace(model.text, **small),
            embed_dim=8,
        ),
        data=PairData(train=("nowhere",), tokenizer=ClipBpe()),
        reduction=Reductions(image=RandomMasking(mask_ratio=0.75), text=Truncate()),
        objective=Contrastive(),
        optimizer=AdamW(learning_rate=1e-3),
        schedule=WarmupCosine(samples=640),
        batch_size=64,
        evaluation=(ZeroShot(data=scenes), Retrieval(data=scenes), Compositional(data=scenes)),
    )


def finished_run(folder: Path, recipe: Recipe, *, seconds: float) -> Path:
    """A run directory as training leaves it, without the training."""
    log(folder, steps(10))
    run = Run(folder, 0, 1, 0, torch.device("cpu"), make_logger(0))
    weights = recipe.objective.build(recipe).state_dict()
    state = {
        "step": 10, "samples": 640, "seconds": seconds, "world_size": 2, "engine": "deepspeed",
        "recipe": to_json(recipe),
    }  # fmt: skip
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
    CheckpointStore(run, keep=1).save(tensors, state, gather=lambda value: [value])
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    return folder


REPORT = "frugal.common.report"


def test_the_command_reports_on_the_stages_of_a_run(scenes: Path, tmp_path: Path) -> None:
    masked = small_recipe(scenes)
    whole = replace(
        masked,
        reduction=Reductions(image=KeepAll(), text=Truncate()),
        run=RunOptions(start_from=tmp_path / "z_masked"),
    )
    finished_run(tmp_path / "z_masked", masked, seconds=3.0)
    last = finished_run(tmp_path / "a_whole", whole, seconds=1.0)
    assert list(find_stages(tmp_path)) == ["z_masked", "a_whole"]
    refused = command(REPORT, tmp_path, expect=2)
    assert "was not evaluated yet" in refused.stderr
    assert not (tmp_path / "report.html").exists()

    (last / "evaluation").mkdir()
    for name, numbers in {
        "zero_shot": {"zero_shot_top1": 0.7, "zero_shot_top1_held_out": 0.5},
        "retrieval": {
            "image_retrieval_recall_at_1": 0.3,
            "text_retrieval_recall_at_1": 0.2,
            "retrieval_candidates": 40,
        },
        "compositional": {"compositional_add_obj": 0.625, "compositional_mean": 0.75},
    }.items():
        content = {"step": 10, "samples": 640, **numbers}
        (last / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    words = ("--examples", "4", "--next", "Watch: tensorboard --logdir runs")
    result = command(REPORT, tmp_path, *words)
    assert "Watch:\n    tensorboard --logdir runs\n" in result.stdout
    assert "compositional_mean  0.75\n" in result.stdout
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == {
        "compositional_add_obj": 0.625,
        "compositional_mean": 0.75,
        "zero_shot_top1": 0.7,
        "zero_shot_top1_held_out": 0.5,
        "image_retrieval_recall_at_1": 0.3,
        "text_retrieval_recall_at_1": 0.2,
        "retrieval_candidates": 40,
        "samples_seen": 1280,
        "train_seconds": 4.0,
        "samples_per_second": pytest.approx(400.0),  # as logged; the seconds hold evaluations
        "world_size": 2,
        "engine": "deepspeed",
    }
    page = Page((tmp_path / "report.html").read_text())
    assert "25.0 % of the patches" in page.text.replace("\u2009", " ")  # the first stage's mask
    assert len(page.all("img")) == 2 * 2 + 4 + 2 + 2
    assert "add 62.5" in page.text
    assert "How patches are chosen" not in page.text  # its masking draws nothing
    assert len(page.all("svg")) == 4


def test_a_single_run_is_a_stage_of_its_own(scenes: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one", small_recipe(scenes), seconds=2.0)
    assert find_stages(run) == {"one": run}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "zero_shot.json").write_text('{"step": 10, "zero_shot_top1": 0.5}')
    numbers = collect_numbers({"one": run})
    assert numbers["zero_shot_top1"] == 0.5
    assert numbers["text_retrieval_recall_at_1"] is None
    assert "step" not in numbers


def test_samples_per_second_are_those_of_the_log_and_not_of_the_whole_time(
    scenes: Path, tmp_path: Path
) -> None:
    recipe = replace(small_recipe(scenes), evaluation=())
    runs = {
        name: finished_run(tmp_path / name, recipe, seconds=500.0) for name in ("first", "second")
    }
    log(runs["first"], [{"step": 4, "samples": 256, "samples_per_second": 128.0}])  # 2 s
    lines = [
        {"step": 2, "samples": 128, "samples_per_second": 32.0},  # 4 s
        {"step": 10, "samples": 640, "samples_per_second": 256.0},  # 2 s
        {"step": 11, "samples": 704, "samples_per_second": None},
    ]
    log(runs["second"], lines)
    numbers = collect_numbers(runs)
    assert numbers["samples_per_second"] == pytest.approx((256 + 640) / (2 + 4 + 2))
    assert numbers["train_seconds"] == 1000.0
    (runs["first"] / "metrics.jsonl").unlink()
    (runs["second"] / "metrics.jsonl").unlink()
    assert collect_numbers(runs)["samples_per_second"] is None


def test_a_run_that_was_given_no_data_to_measure_is_reported_on(
    scenes: Path, tmp_path: Path
) -> None:
    recipe = replace(small_recipe(scenes), evaluation=(ZeroShot(), Retrieval(name="coco")))
    run = finished_run(tmp_path / "one", recipe, seconds=2.0)
    result = command(REPORT, run)
    assert "the report has no numbers of zero_shot: it was given no data" in result.stderr
    saved = json.loads((run / "report.json").read_text())
    assert saved["not_measured"] == dict.fromkeys(("zero_shot", "coco"), "it was given no data")
    assert saved["zero_shot_top1"] is None
    assert "Not on this page: zero shot: it was given no data" in (run / "report.html").read_text()


def test_numbers_of_another_step_are_left_out_and_named(scenes: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one", small_recipe(scenes), seconds=2.0)
    (run / "evaluation").mkdir()
    for name, step in (("zero_shot", 5), ("retrieval", 10)):
        content = {"step": step, f"{name}_top1": 0.5}
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    numbers = collect_numbers({"one": run})
    assert numbers["retrieval_top1"] == 0.5
    assert numbers["zero_shot_top1"] is None
    assert numbers["not_measured"] == {
        "zero_shot": "measured after step 5, not 10",
        "compositional": "it was not measured",
    }


def test_what_was_damaged_or_passed_over_is_on_the_page(scenes: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one", replace(small_recipe(scenes), evaluation=()), seconds=2.0)
    read = {"read_samples": 700, "damaged": {"image": 41, "<checksum>": 19}}
    log(run, [*steps(9), {"step": 10, "samples": 640, "passed_over": {"no format": 7}, **read}])
    numbers = collect_numbers({"one": run})
    assert numbers["read_samples"] == 700
    assert numbers["damaged"] == {"image": 41, "<checksum>": 19}
    assert numbers["passed_over"] == {"no format": 7}
    path = write_report(tmp_path / "page", numbers=numbers, stages={"one": run})
    page = Page(path.read_text())
    assert "damaged image 41 of 700 read" in page.text
    assert "damaged <checksum> 19 of 700 read" in page.text
    assert "passed over no format 7" in page.text


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        find_stages(tmp_path)
    result = command(REPORT, tmp_path / "nowhere", expect=2)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
