"""``python -m frugal.common.evaluate``: what a run's recipe says, and what the words change."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frugal.common.contracts import EvaluationTask
from frugal.common.data.labeled import CaptionedImages
from frugal.common.data.tokenizers import HuggingFace
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluate import evaluate
from frugal.common.evaluation.bootstrap import load_sample_results
from frugal.common.evaluation.cli import (
    CompositionalOptions,
    LinearProbeOptions,
    Options,
    ZeroShotOptions,
    chosen_tasks,
)
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.measure import measure
from frugal.common.evaluation.provenance import weights_digest
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import ModelConfig, ModelInputs, ObjectiveConfig, Recipe
from frugal.common.recipe_json import from_json, load_recipe, to_json
from frugal.common.run import open_run
from frugal.common.weights.load import load_model
from support import ALONE, ROOT, command, described_with_tasks, environment, train

OWN = CenterCrop(order="crop_first", interpolation="bilinear")
PUBLISHED = CenterCrop(order="crop_first", interpolation="tf1_bicubic")


@pytest.fixture(scope="module")
def trained_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 16-pixel images whose recipe evaluates in a way of its own, without data."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(
        ALONE, run, f"--data.train={scenes / 'train'}", "--model.image.image-size=16",
        "--schedule.samples=24", "--schedule.warmup-samples=0",
    )  # fmt: skip
    recipe = load_recipe(run / "recipe.json")
    tasks = (
        ZeroShot(crop=OWN, published_crop=PUBLISHED, templates="name"),
        Retrieval(crop=OWN, mask_ratio=0.5, views=2),
    )
    write_recipe(run, replace(recipe, evaluation=tasks))
    return run


COCO = CompositionalOptions(images=Path("coco"))
SGD = LinearProbeOptions(solver="sgd", features=Path("kept"))


def write_recipe(run: Path, recipe: Recipe) -> None:
    (run / "recipe.json").write_text(json.dumps(to_json(recipe)))


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def measured(run: Path, file: str, **words) -> dict:
    """The numbers and settings that the command writes."""
    evaluate(Options(checkpoint=run, workers=0, device="cpu", out=run / "out", **words))
    return json.loads((run / "out" / f"{file}.json").read_text())


def directly(run: Path, task) -> dict:
    """The same task, asked for in Python."""
    with torch.inference_mode():
        return task.evaluate(load_model(run), open_run(run, "cpu"))


def assert_holds(content: dict, numbers: dict) -> None:
    assert {name: content[name] for name in numbers} == numbers


def test_a_recipe_says_how_its_run_is_evaluated(run: Path, scenes: Path) -> None:
    own = directly(run, ZeroShot(data=scenes, crop=OWN, templates="name"))
    assert_holds(measured(run, "zero_shot", data=scenes), own)
    assert own != directly(run, ZeroShot(data=scenes))
    masked = directly(run, Retrieval(data=scenes, crop=OWN, mask_ratio=0.5, views=2))
    content = json.loads((run / "out" / "retrieval.json").read_text())
    assert_holds(content, masked)
    assert masked != directly(run, Retrieval(data=scenes, crop=OWN))


def test_words_change_what_the_recipe_says(run: Path, scenes: Path) -> None:
    words = {
        "zero_shot": ZeroShotOptions(templates="data"), "mask_ratio": 0.75, "views": 4,
        "tasks": ("zero-shot",),
    }  # fmt: skip
    expected = ZeroShot(data=scenes, crop=OWN, mask_ratio=0.75, views=4, name="mine")
    content = measured(run, "mine", data=scenes, name="mine", **words)
    assert_holds(content, directly(run, expected))
    assert content["mine_settings"]["crop"]["interpolation"] == "bilinear"


def test_published_takes_the_published_crop(run: Path, scenes: Path) -> None:
    words = {"data": scenes, "tasks": ("zero-shot",), "published": True}
    expected = directly(run, ZeroShot(data=scenes, crop=PUBLISHED, templates="name"))
    content = measured(run, "zero_shot", **words)
    assert_holds(content, expected)
    assert content["zero_shot_settings"]["crop"] == to_json(PUBLISHED)
    trained = load_model(run)
    assert trained.transform == OWN


def test_data_may_come_from_the_recipe(run: Path, scenes: Path) -> None:
    recipe = load_recipe(run / "recipe.json")
    tasks = (replace(recipe.evaluation[0], data=scenes), ZeroShot(name="second", data=scenes))
    write_recipe(run, replace(recipe, evaluation=(*tasks, Retrieval())))
    evaluate(Options(checkpoint=run, workers=0, device="cpu"))
    written = {path.stem for path in (run / "evaluation").glob("*.json")}
    assert written == {"zero_shot", "second"}


def test_the_tokenizer_of_the_run_is_enough(run: Path, scenes: Path) -> None:
    recipe = load_recipe(run / "recipe.json")
    before = measured(run, "zero_shot", data=scenes)
    lost = replace(recipe.data, tokenizer=HuggingFace(name="/nowhere/at/all"))
    embedder = Embedder.of(load_model(run), open_run(run, "cpu"))
    expected = recipe.data.tokenizer.load().encode("a red ring")
    assert embedder.tokenizer.encode("a red ring") == expected
    write_recipe(run, replace(recipe, data=lost))
    assert measured(run, "zero_shot", data=scenes) == before


def test_the_command_runs_as_users_and_launchers_call_it(
    trained_run: Path, scenes: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "frugal.common.evaluate", "--local_rank=0",
        "--checkpoint", str(trained_run), "--data", str(scenes), "--tasks", "zero-shot",
        "--published", "--out", str(tmp_path), "--workers", "1",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert result.returncode == 0, result.stderr
    assert "zero_shot_top1" in result.stdout
    assert json.loads((tmp_path / "zero_shot.json").read_text())["zero_shot_images"] == 128


# What is asked for, without a model.


@pytest.fixture
def recipe(trained_run: Path) -> Recipe:
    return load_recipe(trained_run / "recipe.json")


def refused(recipe: Recipe, **words) -> str:
    with pytest.raises(InputError) as caught:
        chosen_tasks(
            Options(checkpoint=Path("runs/x"), **words),
            *described_with_tasks(recipe),
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_without_a_published_crop_is_one_sentence(recipe: Recipe) -> None:
    said = refused(recipe, data=Path("d"), published=True)
    assert "runs/x does not say how images were prepared for published numbers of retri" in said


def test_without_data_there_is_nothing_to_measure(recipe: Recipe) -> None:
    said = refused(recipe)
    assert "names no data for zero-shot or retrieval or compositional or linear-probe; " in said
    assert "--tasks is empty" in refused(recipe, data=Path("d"), tasks=())


def test_a_name_for_two_evaluations_is_refused(recipe: Recipe) -> None:
    assert "--name a is for one evaluation, but there are 2" in refused(
        recipe, data=Path("d"), name="a"
    )


@pytest.mark.parametrize("words", [{"templates": "name"}, {"class_names": "imagenet"}])
def test_prompts_of_a_retrieval_are_refused(recipe: Recipe, words: dict) -> None:
    said = refused(recipe, data=Path("d"), tasks=("retrieval",), zero_shot=ZeroShotOptions(**words))
    (flag,) = (f"--zero-shot.{name.replace('_', '-')}" for name in words)
    assert f"{flag}: no task that is measured reads it; add zero-shot to --tasks" in said


def test_a_folder_of_images_for_other_tasks_is_refused(recipe: Recipe) -> None:
    said = refused(recipe, data=Path("d"), tasks=("retrieval",), compositional=COCO)
    assert "--compositional.images: no task that is measured reads it; add compositional to" in said


def test_compositional_is_measured_where_the_data_has_files_for_it(
    recipe: Recipe, scenes: Path
) -> None:
    kinds = [ZeroShot, Retrieval, Compositional]
    for data, expected in (
        (scenes, kinds), (scenes / "compositional", kinds), (scenes / "retrieval", [Retrieval])
    ):  # fmt: skip
        tasks = chosen_tasks(
            Options(checkpoint=Path("runs/x"), data=data),
            *described_with_tasks(recipe),
        )
        assert [type(task) for task in tasks] == expected
        asked = Options(checkpoint=Path("runs/x"), data=data, tasks=("compositional",))
        assert chosen_tasks(asked, *described_with_tasks(recipe)) == [
            Compositional(data=data, batch_size=256, workers=2)
        ]


def test_what_a_folder_says_it_is_for_is_measured(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("folders/red", "folders/blue", "names/test", "captions/test", "labels/test"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("names", "captions", "labels"):
        (tmp_path / name / "test" / "0.tar").touch()
    (tmp_path / "names" / "classnames.txt").write_text("red\nblue\n")
    (tmp_path / "captions" / "dataset_type.txt").write_text("retrieval\n")
    (tmp_path / "labels" / "dataset_type.txt").write_text("multilabel\n")
    for name in ("folders", "names", "captions", "labels"):
        tasks = chosen_tasks(
            Options(checkpoint=Path("x"), data=tmp_path / name),
            *described_with_tasks(recipe),
        )
        kind = Retrieval if name == "captions" else ZeroShot
        assert [type(task) for task in tasks] == [kind], name


def test_retrieval_among_class_folders_is_refused(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), name).save(tmp_path / name / "0.png")
    with pytest.raises(InputError, match="all images of a class have the same caption"):
        CaptionedImages(tmp_path, size=(8, 8))


def test_compositional_data_and_images_are_passed_on(recipe: Recipe) -> None:
    words = {"tasks": ("compositional",), "compositional": COCO, "name": "sugar_crepe"}
    options = Options(checkpoint=Path("runs/x"), data=Path("d"), **words)
    assert chosen_tasks(options, *described_with_tasks(recipe)) == [
        Compositional(
            data=Path("d"), images=Path("coco"), name="sugar_crepe", batch_size=256, workers=2
        )
    ]


def test_views_without_a_mask_are_refused(recipe: Recipe) -> None:
    assert "without a mask_ratio all views are the same" in refused(
        recipe, data=Path("d"), tasks=("zero-shot",), views=2
    )


def test_a_recipe_that_evaluates_nothing_is_evaluated_with_defaults(recipe: Recipe) -> None:
    bare = replace(recipe, evaluation=())
    options = Options(checkpoint=Path("runs/x"), data=Path("d"), batch_size=8, workers=0)
    assert chosen_tasks(options, *described_with_tasks(bare)) == [
        ZeroShot(data=Path("d"), batch_size=8),
        Retrieval(data=Path("d"), batch_size=8),
    ]


# Through the command, to its files.


def test_a_file_says_everything_that_is_needed_to_measure_again(run: Path, scenes: Path) -> None:
    content = measured(run, "zero_shot", data=scenes, tasks=("zero-shot",))
    facts = content["zero_shot_measured"]
    trained = load_model(run)
    assert facts["weights_sha256"] == weights_digest(trained.model)
    assert (facts["checkpoint"], facts["library"]) == (str(run), "frugal")
    assert len(facts["class_names"]) == 64 and facts["templates"] == ["{c}"]
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert from_json(content["zero_shot_settings"]).crop == OWN
    outcomes = load_sample_results(run / "out" / "zero_shot.outcomes.safetensors")
    assert outcomes.facts["data_sha256"] == facts["data_sha256"]
    assert float(outcomes.number("zero_shot_top1")) == content["zero_shot_top1"]


def test_results_of_other_data_or_weights_are_not_replaced(
    run: Path, scenes: Path, tmp_path: Path
) -> None:
    words = {"tasks": ("zero-shot",)}
    first = measured(run, "zero_shot", data=scenes, **words)
    assert measured(run, "zero_shot", data=scenes, **words) == first  # the same may be repeated
    copied = Path(shutil.copytree(scenes / "zero_shot", tmp_path / "copied"))
    with pytest.raises(InputError, match=r"zero_shot\.json holds what was measured on .*scenes"):
        measured(run, "zero_shot", data=copied, **words)
    other = measured(run, "copied", data=copied, name="copied", **words)
    assert other["copied_top1"] == first["zero_shot_top1"]
    recipe = load_recipe(run / "recipe.json")
    model = replace(recipe.model, image=replace(recipe.model.image, activation="quick_gelu"))
    write_recipe(run, replace(recipe, model=model))
    with pytest.raises(InputError, match="with the other weights of"):
        measured(run, "zero_shot", data=scenes, **words)
    assert json.loads((run / "out" / "zero_shot.json").read_text()) == first


def test_files_that_a_task_writes_go_where_its_numbers_go(run: Path, tmp_path: Path) -> None:
    class Writing(EvaluationTask):
        name = "mine"

        def folder(self) -> None:
            """None."""

        def evaluate(self, bundle, run, *, show=None, keep=None) -> dict[str, float]:
            (run.dir / "evaluation").mkdir(parents=True)
            (run.dir / "evaluation" / "mine_classes.csv").write_text("new")
            return {"mine_number": 0.5}

    (run / "evaluation").mkdir()
    (run / "evaluation" / "mine_classes.csv").write_text("of training")
    process = open_run(run, "cpu")
    found = measure(Writing(), load_model(run), process, tmp_path / "out")
    assert found == ({"mine_number": 0.5}, None)
    assert (tmp_path / "out" / "mine_classes.csv").read_text() == "new"
    assert (run / "evaluation" / "mine_classes.csv").read_text() == "of training"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine_classes.csv"]


def test_the_table_grows_by_a_row_for_every_task(run: Path, scenes: Path) -> None:
    for _ in range(2):
        measured(run, "retrieval", data=scenes)
    with (run / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = ["zeroshot_classification", "zeroshot_retrieval", *["image_caption_selection"] * 7]
    assert [row["task"] for row in rows] == 2 * kinds
    assert rows[2]["dataset"] == f"{scenes}/replace_obj" and rows[2]["text_acc"]
    (run / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"other\.csv has other columns than model, pretrained"):
        measured(run, "retrieval", data=scenes, csv=run / "other.csv")
    assert (run / "other.csv").read_text() == "a,b\n1,2\n"


def test_a_suite_is_measured_and_summed_up(run: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for task, count in (("mnist", 10), ("hateful_memes", 2)):
        for label in range(count):
            folder = tmp_path / "data" / task / "test" / str(label)
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    out = measured(run, "clip_26", data=tmp_path / "data", tasks=("clip-26",))
    one, two = (
        json.loads((run / "out" / f"{task}.json").read_text())[f"{task}_{number}"]
        for task, number in (("mnist", "top1"), ("hateful_memes", "roc_auc"))
    )
    assert out["clip_26_scores"] == {"mnist": one, "hateful_memes": two}
    assert out["clip_26_mean"] == (one + two) / 2
    assert (out["clip_26_tasks"], len(out["clip_26_missing"])) == (2, 24)


def test_a_linear_probe_is_asked_for_and_keeps_its_embeddings(run: Path, scenes: Path) -> None:
    words = {
        "data": scenes, "tasks": ("linear-probe",),
        "linear_probe": LinearProbeOptions(solver="sgd", weight_decay=0.01),
    }  # fmt: skip
    content = measured(run, "linear_probe", **words)
    assert content["linear_probe_images"] == 112
    assert from_json(content["linear_probe_settings"]).crop == OWN  # as its recipe evaluates
    assert len(list((run / "out" / "features").glob("*.safetensors"))) == 2


def test_a_mistake_is_one_sentence_and_exit_code_2(trained_run: Path, scenes: Path) -> None:
    words = ("--checkpoint", trained_run, "--data", scenes, "--tasks", "zeroshot")
    result = command("frugal.common.evaluate", *words, expect=2)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert "there is no task 'zeroshot'; choose from zero-shot, retrieval" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "ViT-B-16"}, "--model ViT-B-16 is for a file of weights of another library"),
        (
            {"zero_shot": ZeroShotOptions(class_names="flowers5")},
            "class_names is 'flowers5'; choose data",
        ),
        ({"data": Path("nowhere")}, "nowhere does not exist; check the path"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    words: dict, message: str, run: Path, scenes: Path
) -> None:
    with pytest.raises(InputError, match=message):
        measured(run, "zero_shot", **{"data": scenes, "tasks": ("zero-shot",), **words})
    assert not (run / "out").exists()


@dataclass(frozen=True)
class Counting(EvaluationTask):
    """An evaluation of a method of its own."""

    name: str = "counting"
    data: Path | None = None

    def folder(self) -> Path | None:
        return self.data

    def evaluate(self, bundle, run, *, show=None, keep=None):
        return {"counting_weights": sum(w.numel() for w in bundle.model.parameters())}


def test_evaluations_of_a_method_are_taken_where_they_have_data(
    recipe: Recipe, tmp_path: Path
) -> None:
    plan = replace(recipe, evaluation=(*recipe.evaluation, Counting(data=tmp_path)))
    options = Options(checkpoint=Path("runs/x"))
    assert chosen_tasks(options, *described_with_tasks(plan)) == [Counting(data=tmp_path)]
    assert chosen_tasks(replace(options, tasks=("counting",)), *described_with_tasks(plan)) == [
        Counting(data=tmp_path)
    ]
    without = replace(recipe, evaluation=(Counting(),))
    assert "names no data for" in refused(without, tasks=("counting",))
    assert "the evaluation 'counting' of runs/x takes no --data" in refused(
        plan, tasks=("counting",), data=tmp_path
    )
    with_data = chosen_tasks(replace(options, data=tmp_path), *described_with_tasks(plan))
    assert [type(task) for task in with_data] == [ZeroShot, Retrieval]


def test_a_model_without_captions_is_measured_by_its_own_evaluations(recipe: Recipe) -> None:
    @dataclass(frozen=True)
    class TowerAlone(ModelConfig):
        image: ImageTower

        def inputs(self) -> ModelInputs:
            return ModelInputs(height_width=self.image.height_width)

    bare = replace(
        recipe, model=TowerAlone(recipe.model.image), evaluation=(), objective=ObjectiveOfNothing()
    )
    said = refused(bare, data=Path("d"))
    assert "runs/x holds a model without a text tower, which zero-shot" in said
    assert "measured by --tasks linear-probe --data DATA (or milan-finetune, " in said
    own = replace(bare, evaluation=(Counting(),))
    said = refused(own, tasks=("zero-shot",), data=Path("d"))
    assert "measured by its own --tasks counting, or by --tasks linear-probe" in said


class ObjectiveOfNothing(ObjectiveConfig):
    def build(self, recipe: Recipe) -> None: ...


def test_flags_of_linear_probes_are_for_them(recipe: Recipe) -> None:
    said = refused(recipe, data=Path("d"), tasks=("retrieval",), linear_probe=SGD)
    assert "--linear-probe.solver and --linear-probe.features: no task that is measured" in said
    assert "reads them; add linear-probe to --tasks, or leave them out" in said
