"""A run's history is added to, whatever a crash has left of it."""

import json
from pathlib import Path

import pytest

from frugal.common.errors import InputError
from frugal.common.history import FILE, note, read_history, saved_step


def test_what_happened_is_read_in_its_order_and_a_cut_line_costs_itself_alone(
    tmp_path: Path,
) -> None:
    assert read_history(tmp_path) == []
    note(tmp_path, "began", step=0, loss=float("nan"))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "contin')
    note(tmp_path, "continued", step=7, changes=["1 new (a\u2028b.tar)"])
    first, second = read_history(tmp_path)
    assert (first["event"], first["step"], first["loss"]) == ("began", 0, None)
    assert second["changes"] == ["1 new (a\u2028b.tar)"]
    assert second["time"] >= first["time"] > 1.7e9


def test_a_history_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(InputError, match=r"history\.jsonl cannot be written"):
        note(tmp_path, "began", step=0)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"event": "rewind", "step": 2, "to": 1}, "None as left_out"),
        ({"event": "rewind", "step": 2, "to": 1, "left_out": 5}, "5 as left_out"),
        ({"event": "rewind", "step": 2, "to": 1, "left_out": [[1]]}, r"\[\[1\]\] as left_out"),
        ({"event": "rewind", "step": 2, "left_out": [2]}, "None as to"),
        ({"event": "data_changed", "step": 2, "changes": 5}, "5 as changes"),
        ({"event": "ended", "step": "2"}, "'2' as step"),
        ({"event": "saved", "stp": 2}, "None as step"),
        ({"event": "continued", "step": True}, "True as step"),
    ],
)
def test_a_line_that_was_altered_is_refused_by_what_it_lacks(
    line: dict, named: str, tmp_path: Path
) -> None:
    note(tmp_path, "began", step=0)
    with (tmp_path / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=f"was altered: its line of '{line['event']}' has {named}"):
        read_history(tmp_path)


def test_that_a_checkpoint_was_there_is_read_from_what_happened_since_the_run_began(
    tmp_path: Path,
) -> None:
    said = []
    for event, step, facts in (
        ("began", 0, {}), ("ended", 7, {}), ("checkpoint_lost", 8, {}), ("saved", 4, {}),
        ("continued", 9, {}), ("rewind", 20, {"to": 12, "left_out": [20]}), ("branched", 5, {}),
        ("began", 0, {}),
    ):  # fmt: skip
        note(tmp_path, event, step=step, **facts)
        said.append(saved_step(tmp_path))
    assert said == [0, 0, 0, 4, 9, 12, 5, 0]
