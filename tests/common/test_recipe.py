"""A recipe as a command line, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from frugal.clipa.grid_masking import GridMasking
from frugal.common.cli import read_command_line
from frugal.common.data.tokenizers import HuggingFace, WordPiece
from frugal.common.errors import InputError
from frugal.common.optim.optimizers import LARS
from frugal.common.optim.schedules import WarmupLinear
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import from_json, to_json
from frugal.flip.recipes import RECIPES, demo
from frugal.flip.text_masking import TextMasking


def read(*words: str) -> Recipe:
    return read_command_line(RECIPES, program="test", arguments=list(words))[1]


def test_flags_override_any_field() -> None:
    recipe = read(
        "demo", "--run.dir", "runs/x", "--reduction.image.mask-ratio", "0.75", "--batch-size",
        "64", "--data.train", "a.tar", "b.tar", "--model.image.depth", "2",
        "--evaluation.0.data", "scenes", "--engine.deepspeed-config", "zero1.json",
    )  # fmt: skip
    assert recipe.run.dir == Path("runs/x")
    assert recipe.reduction.image.mask_ratio == 0.75
    assert recipe.batch_size == 64
    assert recipe.data.train == ("a.tar", "b.tar")
    assert recipe.model.image.depth == 2
    assert recipe.evaluation[0].data == Path("scenes")
    assert recipe.engine.deepspeed_config == Path("zero1.json")


def test_a_strategy_of_any_method_takes_the_place_of_the_recipes() -> None:
    recipe = read(
        "demo", "--reduction.image", "frugal.clipa.grid_masking.GridMasking",
        "--reduction.text=frugal.flip.text_masking.TextMasking",
        "--reduction.text.mask-ratio", "0.25", "--reduction.image.window", "4",
    )  # fmt: skip
    assert recipe.reduction.image == GridMasking(window=4)
    assert recipe.reduction.text == TextMasking(mask_ratio=0.25)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--reduction.image=os.path"], "import path of one of Frugal's classes"),
        (["--reduction.image", "frugal.clipa.GridMasking"], "which is not installed"),
        (["--reduction.image=frugal.flip.text_masking.TextMasking"], "which is no ImageReduction"),
        (["--reduction.text"], "needs the import path"),
    ],
)
def test_what_is_no_strategy_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read("demo", *words)


@pytest.mark.parametrize("given", ["--local_rank=1", "--local-rank=1"])
def test_the_rank_that_launchers_add_is_ignored(given: str) -> None:
    assert read(given, "demo") == demo()
    assert read("--local_rank", "1", "demo") == demo()


def test_a_saved_recipe_is_a_first_word(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    saved = replace(demo(), batch_size=32)
    path.write_text(json.dumps(to_json(saved)))
    assert read(str(path)) == saved
    assert read(str(path), "--run.seed", "3").run.seed == 3


def test_an_unknown_recipe_is_named_with_the_choice() -> None:
    with pytest.raises(InputError, match=r"there is no recipe 'demmo'; choose from demo"):
        read("demmo")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        (
            "--mask-ration=0.5",
            "did you mean --reduction.image.mask-ratio or "
            + " or ".join(f"--evaluation.{number}.mask-ratio" for number in range(3))
            + "?",
        ),
        ("--engine.precison=float32", "did you mean --engine.precision?"),
        ("--seed=7", "did you mean --run.seed?"),
        ("--run.sede=7", "did you mean --run.seed?"),
        ("--evaluation.9.name=a", "did you mean --evaluation.2.name?"),
        ("--zzz=1", "--help lists those that there are"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_that_there_is(
    given: str, nearest: str
) -> None:
    with pytest.raises(InputError) as refused:
        read("demo", given)
    assert str(refused.value) == f"there is no {given.partition('=')[0]} in this recipe; {nearest}"


def test_a_value_of_the_wrong_kind_ends_with_code_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        read("demo", "--batch-size", "many")
    assert stopped.value.code == 2
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "frugal.common.reduction.image.ImageReduction", "frugal.common.recipe.Recipe",
        "frugal.common.cli.overridden", "frugal.common.cli.re",
    ],
)  # fmt: skip
def test_what_is_no_reduction_is_refused_and_never_called(name: str) -> None:
    with pytest.raises(InputError, match="is no ImageReduction to train with; give one such as"):
        read("demo", f"--reduction.image={name}")


def test_a_tokenizer_is_chosen_by_its_class_and_its_fields_by_flags() -> None:
    name = "frugal.common.data.tokenizers.HuggingFace"
    recipe = read("demo", f"--data.tokenizer={name}", "--data.tokenizer.name", "some/folder")
    assert recipe.data.tokenizer == HuggingFace(name="some/folder")
    whole = read("demo", "--data.tokenizer", "frugal.common.data.tokenizers.WordPiece")
    assert whole.data.tokenizer == WordPiece()
    with pytest.raises(InputError, match="which is no tokenizer to train with; give one such as"):
        read("demo", "--data.tokenizer=frugal.common.data.tokenizers.Tokenizer")


def test_optimizer_and_schedule_are_chosen_by_their_classes_too() -> None:
    given = ("--schedule", "frugal.common.optim.schedules.WarmupLinear", "--schedule.floor=1e-5")
    schedule = read("demo", *given).schedule
    assert isinstance(schedule, WarmupLinear) and schedule.floor == 1e-5
    assert schedule.samples == demo().schedule.samples  # which has no default
    kind = "frugal.common.optim.schedules.WarmupConstantCooldown"
    words = ("--schedule", kind, "--schedule.cooldown-from=40", "--schedule.warmup-samples=64")
    recipe = read("demo", *words)
    assert recipe.steps == 50  # forty, and a fifth of all
    assert from_json(to_json(recipe), source="recipe.json") == recipe
    lars = read("demo", "--optimizer=frugal.common.optim.optimizers.LARS").optimizer
    assert isinstance(lars, LARS) and lars.learning_rate == demo().optimizer.learning_rate
    with pytest.raises(InputError, match="which is no Schedule to train with; give one such as"):
        read("demo", "--schedule=frugal.common.optim.optimizers.LARS")


def test_what_a_tokenizer_lacks_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        read("demo", "--data.tokenizer=frugal.common.data.tokenizers.HuggingFace")
    assert stopped.value.code == 2
    assert "--data.tokenizer.name" in capsys.readouterr().err


def test_two_evaluations_of_one_name_are_refused() -> None:
    recipe = demo()
    with pytest.raises(InputError, match="two evaluations of this recipe are called"):
        replace(recipe, evaluation=(*recipe.evaluation, recipe.evaluation[0]))


def test_a_batch_that_accumulation_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="does not divide into"):
        replace(demo(), engine=replace(demo().engine, accumulate=3))


def test_a_batch_that_processes_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="among 3 processes"):
        demo().local_batch(3)
