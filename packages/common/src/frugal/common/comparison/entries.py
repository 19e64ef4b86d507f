"""What is compared: a JSON file of entries, each of one training stage or several.

The file holds ``groups`` and ``entries``. A group has ``flags``, which go to every stage of its
entries, ``measured_by``, the number of an evaluation by which they are told apart, and ``equal``,
the budgets that they are compared under. An entry has a ``name``, a ``group`` and ``stages``; a
stage has a ``recipe`` (PROGRAM:NAME), ``flags`` and its ``share`` of the budget of the entry. Each
stage but the first starts from the one before. An entry may have a ``probe``, a run of ``samples``
that starts from its last stage, is measured in its place and costs nothing of the budget; and
modules with their words that run ``before`` its first stage and ``after`` its last one, which cost
nothing either. In flags and words ``{run:NAME}`` is the last run of an earlier entry, ``{run}``
that of the entry itself, and ``{here}`` the folder that its runs lie in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from frugal.common.cli import overridden
from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.programs import recipe_named
from frugal.common.recipe import Recipe

KINDS = ("time", "flops")
"""Budgets that entries are compared under."""
_PLACE = re.compile(r"\{(?:run:([^{}]+)|run|here)\}")
_DECIDED = (
    "--run.dir", "--run.seed", "--run.evaluate-every", "--run.log-every", "--run.save-every",
    "--run.keep", "--schedule.samples", "--schedule.warmup-samples",
)  # fmt: skip
"""Flags that a comparison sets for each run."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of an entry."""

    recipe: str
    """PROGRAM:NAME, such as flip:demo or milan.pretrain:demo."""
    flags: tuple[str, ...]
    """Those of the group, and then its own."""
    share: float = 1.0
    """Of the budget of the entry."""
    samples: int | None = None
    """Of a probe, which has no share."""

    @property
    def module(self) -> str:
        """The entry script that trains it."""
        program = self.recipe.partition(":")[0]
        return f"frugal.{program}" if "." in program else f"frugal.{program}.train"

    @property
    def recipe_name(self) -> str:
        """What the entry script calls the recipe."""
        return self.recipe.partition(":")[2]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the comparison."""

    name: str
    group: str
    stages: tuple[Stage, ...]
    measured_by: str
    """A number of the evaluations, such as zero_shot_top1."""
    equal: tuple[str, ...] = KINDS
    before: tuple[tuple[str, ...], ...] = ()
    """Modules, each with its words."""
    after: tuple[tuple[str, ...], ...] = ()
    probe: Stage | None = None

    @property
    def slug(self) -> str:
        """The name as that of a folder."""
        return slug_of(self.name)

    @property
    def runs(self) -> tuple[Stage, ...]:
        """The stages, and the probe behind them."""
        return self.stages if self.probe is None else (*self.stages, self.probe)

    def needs(self) -> set[str]:
        """Names of the entries whose runs it speaks of."""
        words = [*(word for stage in self.runs for word in stage.flags)]
        words += [word for command in (*self.before, *self.after) for word in command]
        return {name for word in words for name in _PLACE.findall(word) if name}


def slug_of(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def filled(words: Sequence[str], *, runs: dict[str, Path], run: Path, here: Path) -> list[str]:
    """Words with paths in the places that stand for them.

    Args:
        words: flags, or a command.
        runs: the last run of each entry, by its name.
        run: the last run of the entry itself.
        here: the folder of the entry.
    """

    def place(found: re.Match[str]) -> str:
        if found[1]:
            return str(runs[found[1]])
        return str(here if found[0] == "{here}" else run)

    return [_PLACE.sub(place, word) for word in words]


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The entries of a file; the first is the one that others are compared with.

    Raises:
        InputError: if it describes no comparison.
    """
    content = read_json_object(path)
    _check_keys(content, ("groups", "entries"), (), str(path))
    groups = _object(content["groups"], f"groups of {path}")
    for name, group in groups.items():
        where = f"the group {name!r} of {path}"
        _check_keys(_object(group, where), ("flags", "measured_by"), ("equal",), where)
        _words(group["flags"], f"flags of {where}")
        _text(group["measured_by"], f"measured_by of {where}")
    found = [_entry(item, groups, path) for item in _list(content["entries"], f"entries of {path}")]
    _check_together(found, path)
    return tuple(found)


def _entry(item: Any, groups: dict[str, Any], path: Path) -> Entry:
    where = f"an entry of {path}"
    _check_keys(
        _object(item, where), ("name", "group", "stages"), ("before", "after", "probe"), where
    )
    name = _text(item["name"], f"name of {where}")
    where = f"the entry {name!r} of {path}"
    if not slug_of(name):
        raise InputError(f"{where} has no letter or digit in its name; give it one")
    group = groups.get(_text(item["group"], f"group of {where}"))
    if group is None:
        raise InputError(f"{where} is of the group {item['group']!r}; choose from {_names(groups)}")
    flags = tuple(group["flags"])
    stages = tuple(
        _stage(stage, flags, f"stage {number} of {where}")
        for number, stage in enumerate(_list(item["stages"], f"stages of {where}"), start=1)
    )
    total = sum(stage.share for stage in stages)
    if abs(total - 1) > 1e-6:
        raise InputError(f"the shares of {where} add up to {total:g}; make them add up to 1")
    return Entry(
        name=name,
        group=item["group"],
        stages=stages,
        measured_by=group["measured_by"],
        equal=_kinds(group.get("equal", list(KINDS)), f"the group {item['group']!r} of {path}"),
        before=_commands(item.get("before", []), f"before of {where}"),
        after=_commands(item.get("after", []), f"after of {where}"),
        probe=_probe(item["probe"], f"the probe of {where}") if "probe" in item else None,
    )


def _stage(stage: Any, flags: tuple[str, ...], where: str) -> Stage:
    _check_keys(_object(stage, where), ("recipe",), ("flags", "share"), where)
    share = stage.get("share", 1.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"share of {where} is {share!r}; give a part of 1, such as 0.85")
    own = _words(stage.get("flags", []), f"flags of {where}")
    return Stage(recipe=_recipe_word(stage["recipe"], where), flags=flags + own, share=share)


def _probe(probe: Any, where: str) -> Stage:
    _check_keys(_object(probe, where), ("recipe", "samples"), ("flags",), where)
    samples = probe["samples"]
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(f"samples of {where} is {samples!r}; give a whole number of at least 1")
    own = _words(probe.get("flags", []), f"flags of {where}")
    return Stage(recipe=_recipe_word(probe["recipe"], where), flags=own, samples=samples)


def _recipe_word(word: Any, where: str) -> str:
    program, colon, name = _text(word, f"recipe of {where}").partition(":")
    if not (program and colon and name):
        raise InputError(
            f"recipe of {where} is {word!r}; give PROGRAM:NAME, such as flip:demo or "
            "milan.pretrain:demo"
        )
    return str(word)


def _kinds(kinds: Any, where: str) -> tuple[str, ...]:
    found = _words(kinds, f"equal of {where}")
    if not found or set(found) - set(KINDS):
        raise InputError(f"equal of {where} is {list(found)}; give some of {', '.join(KINDS)}")
    return found


def _commands(commands: Any, where: str) -> tuple[tuple[str, ...], ...]:
    found = [_words(command, where) for command in _list(commands, where, empty=True)]
    for command in found:
        if not command or not command[0].startswith("frugal."):
            raise InputError(
                f"{where} has {' '.join(command)!r}; begin each list with one of Frugal's modules, "
                "such as frugal.common.embed"
            )
    return tuple(found)


def _check_together(entries: Sequence[Entry], path: Path) -> None:
    """Refuse what is wrong between entries."""
    slugs: dict[str, str] = {}
    for number, entry in enumerate(entries):
        if (other := slugs.get(entry.slug)) is not None:
            raise InputError(
                f"{path} has the entries {other!r} and {entry.name!r}, whose runs would have one "
                "folder; name one otherwise"
            )
        slugs[entry.slug] = entry.name
        before = {other.name: other for other in entries[:number]}
        for name in sorted(entry.needs()):
            if name not in before:
                raise InputError(
                    f"the entry {entry.name!r} of {path} speaks of {{run:{name}}}; name an entry "
                    "above it"
                )
            if set(entry.equal) - set(before[name].equal):
                raise InputError(
                    f"the entry {entry.name!r} of {path} speaks of {{run:{name}}}, which has fewer "
                    "budgets; give both groups the same in equal"
                )
    if len(entries[0].stages) > 1 or entries[0].needs() or entries[0].probe is not None:
        raise InputError(
            f"the first entry of {path}, {entries[0].name!r}, is what the others are compared "
            "with; give it one stage and no probe"
        )


def check_recipes(entries: Sequence[Entry]) -> None:
    """Refuse recipes and flags that there are not, before anything is trained.

    Raises:
        InputError: naming the entry and the stage.
    """
    for entry in entries:
        for number, stage in enumerate(entry.runs, start=1):
            where = f"stage {number} of the entry {entry.name!r}"
            _refuse_decided(stage.flags, where, is_first=number == 1)
            try:
                recipe_of(stage)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None


@cache
def recipe_of(stage: Stage) -> Recipe:
    """The recipe of a stage with its flags.

    Raises:
        InputError: if there is no such recipe or flag.
    """
    recipe, _ = recipe_named(stage.recipe)
    somewhere = Path("RUN")  # a path is all that a recipe asks for
    names = {name: somewhere for word in stage.flags for name in _PLACE.findall(word)}
    words = filled(stage.flags, runs=names, run=somewhere, here=somewhere)
    return overridden(recipe, words, program=stage.recipe)


def _refuse_decided(flags: Sequence[str], where: str, *, is_first: bool) -> None:
    decided = _DECIDED if is_first else (*_DECIDED, "--run.start-from")
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if name in decided:
            raise InputError(f"{where} has {name}, which a comparison sets itself; leave it out")


# What a JSON file holds.


def _check_keys(
    content: dict[str, Any], required: Sequence[str], optional: Sequence[str], where: str
) -> None:
    for name in required:
        if name not in content:
            raise InputError(f"{where} has no {name!r}; add it")
    for name in content:
        if name not in (*required, *optional):
            raise InputError(
                f"{where} has {name!r}, which means nothing; choose from "
                f"{_names((*required, *optional))}"
            )


def _names(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(names)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object")
    return value


def _list(value: Any, where: str, *, empty: bool = False) -> Iterator[Any]:
    if not isinstance(value, list) or not (value or empty):
        raise InputError(f"{where} must be a list{'' if empty else ' with something in it'}")
    return iter(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} must be a text with something in it")
    return value


def _words(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
        raise InputError(f"{where} must be a list of words")
    return tuple(value)
