"""The commands of the reproduction table exist, and its GPU-hours follow from its formula."""

import re
import shlex
from math import floor, log10
from pathlib import Path

import pytest
import tyro

from frugal.common.cli import read_command_line
from frugal.common.evaluate import Options
from frugal.common.evaluation.cli import chosen_tasks
from frugal.common.recipe import Recipe
from frugal.flip.recipes import RECIPES
from support import described_with_tasks

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "packages" / "flip" / "README.md"
TEXT = README.read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ")
]
COMMANDS = sorted(set(re.findall(r"`((?:train|two-stage|evaluate runs)\b[^`]*)`", TEXT)))
SHORTHANDS = dict(re.findall(r'^(L\w+)="(.*)"$', TEXT, re.MULTILINE))


def words_of(command: str) -> list[str]:
    for name, value in SHORTHANDS.items():
        command = command.replace(f"${name}", value)
    return shlex.split(command)[1:]


def read(words: list[str]) -> Recipe:
    return read_command_line(RECIPES, program="test", arguments=words)[1]


def stages(command: str, *, tuning: str | None = None) -> list[Recipe]:
    """The recipes that a command trains one after the other."""
    name, *flags = words_of(command)
    recipes = [read([name, *flags])]
    if command.startswith("two-stage"):
        recipes.append(read([tuning or f"{name}-tuning", *flags]))
    return recipes


def gpu_hours(recipe: Recipe) -> float:
    """The function of the README."""
    source = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert source is not None
    scope: dict = {}
    exec(source[1], scope)
    return scope["gpu_hours"](recipe)


def three_digits(number: float) -> float:
    return round(number, 2 - floor(log10(number)))


PRICED = [
    (match[1], row)
    for row in ROWS
    for cell in row
    if (match := re.match(r"`((?:train|two-stage) [^`]*)`", cell))
    and re.fullmatch(r"[\d,]+", row[-2])
]


def test_the_table_was_found() -> None:
    assert len(PRICED) >= 24
    assert len(COMMANDS) >= 30
    assert SHORTHANDS.keys() == {"L400M", "L2B"}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "row"), PRICED, ids=[command for command, _ in PRICED])
def test_gpu_hours_follow_from_the_formula(command: str, row: list[str]) -> None:
    given = re.search(r"`TUNING=([\w-]+)`", " ".join(row))
    recipes = stages(command, tuning=given[1] if given else None)
    hours = sum(map(gpu_hours, recipes))
    assert float(row[-2].replace(",", "")) == three_digits(hours)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("evaluate")])
def test_training_commands_are_understood(command: str) -> None:
    tuning = "large-tuning" if "ablation" in command else None
    for recipe in stages(command, tuning=tuning):
        assert recipe.data.train  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("evaluate") and "..." not in c]
)
def test_evaluation_commands_are_understood(command: str) -> None:
    options = tyro.cli(Options, args=["--published", "--checkpoint", *words_of(command)])
    (task,) = chosen_tasks(options, *described_with_tasks(RECIPES["large"]()))
    assert task.crop.interpolation == "tf1_bicubic"
    assert task.data is not None


def test_every_row_says_whether_it_was_run_here() -> None:
    table: list[str] = []
    for row in ROWS:
        if row[-1] == "run here":
            table = row
        elif set("".join(row)) <= set("-"):
            continue
        elif table and len(row) == len(table) and row[0] != "field":
            assert row[-1] == "no", row


def test_costs_of_masking_are_those_of_the_paper() -> None:
    whole, half, quarter = (
        gpu_hours(RECIPES[name]()) / RECIPES[name]().schedule.samples
        for name in ("ablation-mask0-16k", "ablation-mask50-32k", "ablation-mask75-64k")
    )
    assert half / whole == pytest.approx(0.52, abs=0.005)
    assert quarter / whole == pytest.approx(0.28, abs=0.005)
