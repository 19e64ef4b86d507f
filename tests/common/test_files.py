"""Small files: one rule for what is read, whole or nothing for what is written."""

import errno
import json
import os
from pathlib import Path

import pytest

from frugal.common.data.damage import PassedOver
from frugal.common.errors import InputError
from frugal.common.files import (
    is_system_name,
    parse_json,
    read_json,
    read_lines,
    read_text,
    reason_of,
    write_file,
    write_json,
)


@pytest.mark.parametrize(
    ("stored", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb\r\n\r\n", ["a", "b"]),
        (b"\n\na\rb", ["a", "b"]),
        (b"a\n\nb\n \n", ["a", "", "b"]),
        ("a\u2028x\x0by\x85z\nb".encode(), ["a\u2028x\x0by\x85z", "b"]),
        (b"", []),
        (b"\n \n", []),
    ],
)
def test_only_line_feeds_and_carriage_returns_end_a_line(
    tmp_path: Path, stored: bytes, lines: list[str]
) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(stored)
    assert read_lines(path) == lines


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"0xe9 in line 3.*save it as UTF-8"):
        read_text(path)
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "none.txt")


@pytest.mark.parametrize("depth", [10, 200_000])
def test_json_of_any_depth_is_read_or_refused_in_words(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * depth + "]" * depth)
    if depth == 10:
        assert read_json(path) == json.loads(path.read_text())
        return
    with pytest.raises(InputError, match="nested too deeply"):
        read_json(path)


def test_json_may_begin_with_a_byte_order_mark() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="Exceeds the limit"):
        parse_json("9" * 5000)


def test_numbers_that_json_cannot_hold_are_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "n.json", {"x": [float("nan"), 1.5], "y": (float("inf"),)})
    assert json.loads((tmp_path / "a/n.json").read_text()) == {"x": [None, 1.5], "y": [None]}


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    write_file(path, "before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"kept\.json cannot be written \(No space.*MiB are free"):
        write_file(path, "after")
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.json"]


@pytest.mark.parametrize(
    ("name", "is_system"),
    [("__MACOSX", True), ("@eaDir", True), (".DS_Store", True), ("._a.jpg", True),
     ("Thumbs.db", True), ("lost+found", True), ("cat", False), ("__cat__", False)],
)  # fmt: skip
def test_names_of_systems_are_told_from_names_of_people(name: str, is_system: bool) -> None:
    assert is_system_name(name) is is_system


def test_what_is_passed_over_is_counted_by_reason_with_the_first_names() -> None:
    some, more = PassedOver(), PassedOver()
    for number in range(5):
        some.add("a system file", f".{number}")
    more.add("a system file", "._x", count=2)
    more.add("no image format: .pdf", "a.pdf")
    some.update(more)
    assert some.lines() == [
        "7 passed over: a system file (such as .0, .1, .2)",
        "1 passed over: no image format: .pdf (a.pdf)",
    ]
    assert not PassedOver()


ODD_ERRORS = {
    "no picture": ValueError("no picture <_io.BytesIO object at 0x7f1>"),
    "broken stream": OSError("broken stream at 0x7fd57e10"),
    "No such file or directory": FileNotFoundError(2, "No such file or directory", "/a/b"),
    "it has no 'model_cfg'": KeyError("model_cfg"),
    "there is not enough memory": MemoryError(),
    "something in it is of another kind than expected": TypeError("'int' object is not iterable"),
    "expected text, got nothing": ValueError("expected <class 'str'>, got <class 'NoneType'>"),
    "invalid load key": ValueError("_pickle.UnpicklingError: invalid load key."),
    "no reason is given": ValueError("  "),
}  # fmt: skip


@pytest.mark.parametrize(("words", "error"), ODD_ERRORS.items(), ids=ODD_ERRORS)
def test_a_reason_has_no_address_and_no_type_in_it(words: str, error: Exception) -> None:
    assert reason_of(error) == words


def test_a_reason_is_one_line_the_first_or_the_last() -> None:
    error = RuntimeError("Error(s) in loading state_dict for X:\n\tsize mismatch for norm.bias: 3.")
    assert reason_of(error) == "Error(s) in loading state_dict for X"
    assert reason_of(error, last_line=True) == "size mismatch for norm.bias: 3"
