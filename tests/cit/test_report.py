"""The report of a run tells what was chosen and what was not."""

import re
from html import unescape
from pathlib import Path

from cit_runs import curations

from frugal.cit.curation_files import curations_of, read_about
from frugal.cit.report import sections_of
from frugal.common.report.collect import describe_data, find_stages


def test_captions_that_were_chosen_and_rejected_stand_with_class_and_cosine(
    undisturbed: Path, pool: Path
) -> None:
    ((title, html),) = describe_data(find_stages(undisturbed))
    assert title == "What it chose to learn from"
    for period in (0, 1, 3):
        assert f"Curation {period}:" in html
    facts, examples = read_about(curations_of(undisturbed)[0])
    names = (pool / "zero_shot" / "classnames.txt").read_text().splitlines()
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", html)
    shown = [(unescape(c), unescape(n), float(s)) for c, n, s in rows]
    for example in examples:
        assert example.nearest in names
        assert (example.caption, example.nearest, round(example.similarity, 3)) in shown
    assert {example.chosen for example in examples} == {True, False}
    # where the share decides, no rejected caption of a unit is nearer than a chosen one
    worst = min(example.similarity for example in examples if example.chosen)
    assert all(e.similarity <= worst for e in examples if not e.chosen)
    assert max(e.similarity for e in examples) <= facts.best + 1e-6


def test_a_chosen_example_is_a_pair_of_the_curation_and_a_rejected_one_is_not(
    undisturbed: Path,
) -> None:
    _, examples = read_about(curations_of(undisturbed)[0])
    table = curations(undisturbed)["000000.parquet"]
    found = {round(similarity, 5) for similarity in table["similarity"]}
    for example in examples:
        assert (round(example.similarity, 5) in found) == example.chosen


def test_a_run_that_has_not_curated_yet_shows_nothing(tmp_path: Path) -> None:
    assert sections_of(tmp_path) == []


def test_captions_are_escaped(undisturbed: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from frugal.cit.report import _curation

    facts, examples = read_about(curations_of(undisturbed)[0])
    html = _curation(facts, [replace(examples[0], caption="<script>", nearest="a&b")])
    assert "&lt;script&gt;" in html and "<script>" not in html and "a&amp;b" in html
    del tmp_path
