"""A ``state.json`` of other kinds than are written is refused before anything relies on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frugal.common.checkpoint.state import refuse_strange
from frugal.common.checkpoint.store import Checkpoint
from frugal.common.errors import InputError
from frugal.common.recipe_json import to_json
from frugal.flip.recipes import RECIPES

FILES = [{"name": "t.safetensors", "tensors": ["weight/a"], "bytes": 3, "crc32": 4}]
STATE: dict[str, Any] = {
    "step": 5, "samples": 120, "updates": 5, "skipped_steps": 0, "skipped_in_row": 0,
    "damage": {"read": 9, "kinds": {"image": 2}, "trained_of": {"0": 7}}, "stream": [{}, {"a": 1}],
    "loss_scale": {"scale": 2.0}, "seconds": 1.5, "engine": "accelerate", "world_size": 2,
    "recipe": {"type": "a"},
}  # fmt: skip
STRANGE = (None, "x", -1, 1.5, True, 2**70, [], {}, [[1]], [1], {"a": "b"}, {"a": None})
FITS = {
    "seconds": (1.5,), "engine": ("x",), "stream": ([],), "recipe": ({}, {"a": "b"}, {"a": None}),
    "damage": ({},), "loss_scale": ({},),
}  # fmt: skip


def test_what_is_written_is_taken_and_so_is_less() -> None:
    refuse_strange(STATE, FILES)
    refuse_strange({"step": 0, "weights_only": True}, FILES)


@pytest.mark.parametrize("name", STATE)
def test_every_part_of_another_kind_is_refused_by_name(name: str) -> None:
    for value in STRANGE:
        if any(value is fit or repr(value) == repr(fit) for fit in FITS.get(name, ())):
            refuse_strange(STATE | {name: value}, FILES)
        else:
            with pytest.raises(ValueError, match=f"its {name} is"):
                refuse_strange(STATE | {name: value}, FILES)


@pytest.mark.parametrize(
    "damage", [{"read": "x"}, {"kinds": 3.0}, {"kinds": {"image": -1}}, {"trained_of": {"a": 1}}]
)
def test_counts_of_damage_are_counts(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="its damage is"):
        refuse_strange(STATE | {"damage": damage}, FILES)


@pytest.mark.parametrize("recipe", [None, {}, {"a": 1}, to_json(RECIPES["demo"]().run)])
def test_what_is_no_recipe_is_a_sentence(recipe: Any) -> None:
    with pytest.raises(InputError, match=r"state\.json does not hold a recipe"):
        Checkpoint(Path("x"), {"step": 1, "recipe": recipe}).recipe()
    found = Checkpoint(Path("x"), {"step": 1, "recipe": to_json(RECIPES["demo"]())}).recipe()
    assert found == RECIPES["demo"]()


@pytest.mark.parametrize("name", ["updates", "loss_scale", "recipe"])
def test_without_what_a_run_goes_on_with_it_is_named(name: str) -> None:
    Checkpoint(Path("x"), STATE).refuse_to_continue()
    state = {key: value for key, value in STATE.items() if key != name}
    with pytest.raises(InputError, match=f"has no {name}, without which no run can go on"):
        Checkpoint(Path("x"), state).refuse_to_continue()
