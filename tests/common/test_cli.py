"""What is done to the words of every command line before they are read."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from frugal.common.cli import command_words, read_command_line, read_options
from frugal.common.errors import InputError
from frugal.common.evaluation.cli import Options
from frugal.common.files import write_json
from frugal.common.recipe_json import to_json
from frugal.flip.recipes import RECIPES

PACKAGES = Path(__file__).parents[2] / "packages"


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_home_folder_is_meant_by_a_tilde_also_behind_a_flag(tmp_path: Path) -> None:
    words = ["demo", "--run.dir=~/runs", "--data.train", "~/a/{0..1}.tar", "~", "x~y", "--a=b=~"]
    assert command_words(words) == [
        "demo", f"--run.dir={tmp_path}/runs", "--data.train", f"{tmp_path}/a/{{0..1}}.tar",
        str(tmp_path), "x~y", "--a=b=~",
    ]  # fmt: skip
    assert command_words(["~nobody_is_called_so/x"]) == ["~nobody_is_called_so/x"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["demo", "--data.train", ""], "--data.train is empty"),
        (["demo", "--run.dir="], "--run.dir is empty"),
        (["--out", "x", "--compositional.images", " "], "--compositional.images is empty"),
        (["", "--to", "timm"], "a word of the command line is empty"),
    ],
)
def test_an_empty_word_is_refused_by_its_flag(words: list[str], named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        command_words(words)
    assert "\n" not in str(caught.value)


def test_recipes_are_read_from_such_words(tmp_path: Path) -> None:
    words = ["demo", "--run.dir=~/here", "--run.start-from", "~/there"]
    _, recipe = read_command_line(RECIPES, program="test", arguments=words)
    assert recipe.run.dir == tmp_path / "here"
    assert recipe.run.start_from == tmp_path / "there"
    with pytest.raises(InputError, match=r"--data\.train is empty"):
        read_command_line(RECIPES, program="test", arguments=["demo", "--data.train", ""])


def _commands() -> list[Path]:
    """Every module of ours that reads a command line by itself."""
    reads = re.compile(r"tyro\.(cli|extras\.subcommand_cli_from_dict|extras\.overridable)")
    return [
        path for path in sorted(PACKAGES.rglob("src/**/*.py")) if reads.search(path.read_text())
    ]


@pytest.mark.parametrize("path", _commands(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_command_reads_its_words_in_the_one_place(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert any(getattr(call.func, "id", "") == "command_words" for call in calls)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("--templates", "--zero-shot.templates"),
        ("--linear-probe.solvr", "--linear-probe.solver"),
        ("--checkpiont", "--checkpoint"),
    ],
)
def test_an_unknown_flag_of_any_command_is_a_sentence(
    given: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "--checkpoint", "x", given, "y"])
    with pytest.raises(InputError) as refused:
        read_options(Options, "evaluate")
    assert str(refused.value) == f"there is no {given} in this command; did you mean {nearest}?"


@pytest.mark.parametrize(
    "name", ["evaluate", "report.__main__", "report.compare", "export", "import_weights"]
)
def test_a_command_refuses_an_empty_path_in_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"frugal.common.{name}")
    monkeypatch.setattr("sys.argv", [name, "--out", ""])
    # run_politely ends the process; what it is given raises
    monkeypatch.setattr(module, "run_politely", lambda command, **_: command())
    with pytest.raises(InputError, match="--out is empty"):
        module.main()


def test_samples_beside_the_step_that_sets_them_are_refused(tmp_path: Path) -> None:
    cooled = [
        "demo", "--schedule=frugal.common.optim.schedules.WarmupConstantCooldown",
        "--schedule.cooldown-from=90", "--schedule.warmup-samples=0",
    ]  # fmt: skip
    _, recipe = read_command_line(RECIPES, program="train", arguments=cooled)
    assert recipe.schedule.samples > 90 * recipe.batch_size
    saved = tmp_path / "recipe.json"
    write_json(saved, to_json(recipe))
    for words in (cooled, [str(saved)]):
        with pytest.raises(InputError, match="cooldown_from is step 90, which sets"):
            read_command_line(
                RECIPES, program="train", arguments=[*words, "--schedule.samples", "9000"]
            )
    words = [str(saved), "--schedule.samples=9000", "--schedule.cooldown-from=None"]
    _, recipe = read_command_line(RECIPES, program="train", arguments=words)
    assert recipe.schedule.samples == 9000
