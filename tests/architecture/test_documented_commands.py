"""Every command that a page shows is understood: its program, recipe and flags are there."""

import functools
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "CONTRIBUTING.md", "packages/*/README.md", "docs/*.md", "benchmarks/*/README.md",
)  # fmt: skip
_STARTS = re.compile(r"(?:\w+=\S+ )*(python|deepspeed|accelerate|torchrun|launch/\S+|make)\b")
_TWO_READINGS = ("frugal.common.plan", "frugal.common.branch", "frugal.common.find_learning_rate")
"""Programs that read words of their own, and then those of a recipe."""


class Understood(BaseException):
    """All words of a command were read; nothing else is to happen."""


def shown(page: str) -> Iterator[str]:
    """The commands of a page, continued lines joined, without remarks."""
    command = ""
    for line in page.splitlines():
        if line.startswith("    "):
            command += line.strip()
            if command.endswith("\\"):
                command = command[:-1]
                continue
            if _STARTS.match(command):
                yield command
        command = ""


def commands() -> list[tuple[str, str]]:
    return [
        (path.relative_to(ROOT).as_posix(), command)
        for pattern in PAGES
        for path in sorted(ROOT.glob(pattern))
        for command in shown(path.read_text())
    ]


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command starts in the end, and its words; "" where it is a script alone."""
    words = [word for place, word in enumerate(words) if place or "=" not in word]
    if words[0] == "launch/deepspeed.sh":
        return f"frugal.{words[1]}.train", words[2:]
    if found := re.fullmatch(r"launch/(\w+)_two_stage\.sh", words[0]):
        return f"frugal.{found[1]}.train", words[1:]
    for flag in ("-m", "--module"):
        if flag in words:
            place = words.index(flag)
            return words[place + 1], words[place + 2 :]
    return "", []


def stopped(function: Callable) -> Callable:
    """What takes the same words as a function, and does nothing."""

    @functools.wraps(function)
    def stop(*given: object, **named: object) -> None:
        raise Understood

    return stop


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_what_a_page_shows_is_understood(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command, comments=True)
    if words[-1] == "..." and not words[-2].startswith("--"):  # and so on
        words.pop()
    script = next(word for word in words if "=" not in word)
    if script.startswith("launch/"):
        assert (ROOT / script).is_file(), page
    if script == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), page
    if script.endswith(".py") or (words[1:] and words[1].endswith(".py")):
        assert (ROOT / words[1]).is_file(), page
    program, rest = program_of(words)
    if not program.startswith("frugal.") or (rest[:1] and rest[0].endswith(".json")):
        return
    read, choose = tyro.cli, tyro.extras.subcommand_cli_from_dict

    def read_only(kind: Any, **options: Any) -> Any:
        found = read(kind if inspect.isclass(kind) else stopped(kind), **options)
        is_first = program in _TWO_READINGS and kind.__name__ == "Options" and ":" in rest[0]
        if is_first:
            return found
        raise Understood

    def choose_only(functions: dict[str, Callable], **options: Any) -> Any:
        return choose({name: stopped(each) for name, each in functions.items()}, **options)

    # a mistake ends the process at once
    monkeypatch.setattr("frugal.common.cli._leave", sys.exit)
    monkeypatch.setattr(tyro, "cli", read_only)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", choose_only)
    monkeypatch.setattr(sys, "argv", [program, *rest])
    with pytest.raises(Understood):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            pytest.fail(f"{page}: {command}\nends with {end.code}: {capsys.readouterr().err}")


def test_pages_show_commands() -> None:
    assert len({page for page, _ in commands()}) >= 9 and len(commands()) > 60
