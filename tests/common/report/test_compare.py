"""Models compared: differences on the same drawn images, and the page of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluated import made

from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import SampleResults
from frugal.common.report.compare import Options, compare, compare_models, read_measured
from support import command


def leave(folder: Path, outcomes: SampleResults, task: str = "zero_shot") -> Path:
    """An evaluation folder with one task."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes.save(folder / f"{task}.outcomes.safetensors")
    facts = {
        "checkpoint": f"<{folder.name}>",
        "weights_sha256": "f" * 64,
        "config_sha256": "c" * 64,
    }
    (folder / f"{task}.json").write_text(json.dumps({f"{task}_measured": facts}))
    return folder


def better(outcomes: SampleResults, count: int) -> SampleResults:
    """The same with some more images right."""
    right = outcomes.tables["right"].clone()
    right[(right == 0).nonzero()[:count, 0]] = 1
    return replace(outcomes, tables=outcomes.tables | {"right": right})


def test_differences_are_taken_on_the_same_drawn_images(tmp_path: Path) -> None:
    one, other = made(200), better(made(200), 20)
    strange = replace(one, facts={"data_sha256": "other"})
    models = [
        read_measured(name, leave(tmp_path / name, outcomes))
        for name, outcomes in (("a", one), ("b", other), ("c", one), ("d", strange))
    ]
    rows = {r.number: r for r in compare_models(models, times=300, confidence=0.9, seed=4)}
    first, second, same, elsewhere = rows["mean"].entries
    assert first.difference is None and elsewhere.difference is None
    assert second.difference[0] == pytest.approx(0.1)
    # paired: an image that is right in both adds nothing, so that the interval is narrow
    assert second.difference[2] - second.difference[1] < 0.7 * (first.high - first.low)
    assert second.differs and second.difference[1] > 0
    assert same.difference == (0, 0, 0) and not same.differs
    assert (same.low, same.high) == (first.low, first.high)
    assert first.low < first.value < first.high


def test_the_command_writes_a_page_and_numbers(tmp_path: Path, capsys) -> None:
    for name, count in (("first", 0), ("second", 9)):
        leave(tmp_path / name / "evaluation", better(made(), count))
    leave(tmp_path / "second" / "evaluation", made(), task="retrieval")
    folders = (tmp_path / "first", tmp_path / "second" / "evaluation")
    path = compare(Options(folders=folders, out=tmp_path / "out", resamples=50))
    page = path.read_text()
    assert "first and second" in page and "&lt;evaluation&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {row["task"] for row in content["numbers"]} == {"zero_shot", "retrieval"}
    means = next(row for row in content["numbers"] if row["number"] == "mean")
    assert means["models"][1]["difference"][0] == pytest.approx(9 / 40)
    assert "mean (40 images)" in capsys.readouterr().out
    again = compare(Options(folders=folders, out=tmp_path / "again", resamples=50))
    assert again.read_text() == page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}"], "there is only one folder to compare"),
        (["{a}", "{a}"], "a folder is given twice"),
        (["{a}", "{empty}"], "holds nothing to compare"),
        (["{a}", "{b}", "--names", "x"], "--names has 1 names for 2 folders"),
        (["{a}", "{b}", "--resamples", "0"], "--resamples is 0"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    words: list[str], message: str, tmp_path: Path
) -> None:
    leave(tmp_path / "a", made())
    leave(tmp_path / "b", made())
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("a", "b", "empty")}
    given = [word.format(**places) for word in words]
    if len(words) == 2 and "empty" in words[1]:  # once as users call it
        result = command("frugal.common.compare", *given, cwd=tmp_path, expect=2)
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr
        return
    flags = dict(zip(given[2::2], given[3::2], strict=True))
    options = {"names": (flags["--names"],)} if "--names" in flags else {}
    options |= {"resamples": int(flags["--resamples"])} if "--resamples" in flags else {}
    folders = tuple(Path(word) for word in given[:2])
    with pytest.raises(InputError, match=message):
        compare(Options(folders=folders, out=tmp_path / "out", **options))
