"""The page for users of open_clip names every flag that it has, and none that is not here."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from frugal.cit.recipes import RECIPES as CIT
from frugal.common.cli import _flags
from frugal.common.optim.schedules import WarmupConstantCooldown
from frugal.common.recipe_json import to_json
from frugal.flip.recipes import RECIPES as FLIP
from support import ROOT

PAGE = (ROOT / "docs" / "from-open-clip.md").read_text()
ROWS = [
    row.split(" | ") for row in PAGE.partition("## Every flag")[2].split("\n") if row[:3] == "| `"
]
OTHERS = {"--tasks", "--data"}
"""Of ``frugal.common.evaluate``."""
CLASSES = {"--optimizer", "--schedule", "--reduction.image"}


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z0-9][\w.-]*", text))


def test_every_flag_of_open_clip_stands_in_one_row() -> None:
    spec = find_spec("open_clip_train")
    assert spec is not None and spec.submodule_search_locations is not None
    source = (Path(spec.submodule_search_locations[0]) / "params.py").read_text()
    theirs = re.findall(r'"(--[a-z0-9-]+)"', source)
    named = [flag for row in ROWS for flag in sorted(flags_of(row[0]))]
    assert sorted(named) == sorted(theirs)


def test_every_flag_that_is_given_for_one_is_here() -> None:
    schedule = WarmupConstantCooldown(samples=10, warmup_samples=1)
    ours = {*_flags(to_json(FLIP["base"]())), *_flags(to_json(CIT["demo"]()))}
    ours |= {f"--schedule.{name.replace('_', '-')}" for name in vars(schedule)}
    given = {flag for row in ROWS for flag in flags_of(row[1])}
    assert len(given) > 40 and given <= ours | OTHERS | CLASSES
