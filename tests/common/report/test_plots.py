"""The curves of the report."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from reported import log, steps, written

from frugal.common.report.plots import Curve, interval_chart, line_chart, short_number, smooth, thin


def test_each_stage_continues_where_the_one_before_ended(tmp_path: Path) -> None:
    stages = {name: log(tmp_path / name, steps(5, per_step=100)) for name in "abc"}
    page = written(tmp_path, stages=stages)
    assert len(page.all("svg")) == 4
    lines = [a["d"] for a in page.all("path") if "var(--line" in a["style"]][:3]
    across = [[float(p.split()[0]) for p in d[1:].split("L")] for d in lines]
    step = across[0][1] - across[0][0]
    for before, after in itertools.pairwise(across):
        assert after[0] - before[-1] == pytest.approx(step, abs=0.2)
    assert [len(places) for places in across] == [5, 5, 5]


def test_a_chart_is_drawn_for_what_was_logged_only(tmp_path: Path) -> None:
    lines = [{"step": 1, "samples": 8, "loss": 2.0}, {"step": 2, "samples": 16, "loss": 1.0}]
    page = written(tmp_path, stages={"a": log(tmp_path / "a", lines)})
    assert len(page.all("svg")) == 1


def lines_of(chart: str) -> list[str]:
    """The paths of a chart that are drawn in the color of a curve."""
    paths = ElementTree.fromstring(chart).iter("path")
    return [path.attrib["d"] for path in paths if "var(--line" in path.attrib["style"]]


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    values = [3.0, 2.0, math.nan, 1.0, math.inf, 0.5, 0.4]
    chart = line_chart("Loss", [Curve("a", tuple(enumerate(values)))], x_name="x", description="")
    (path,) = lines_of(chart)
    assert path.count("M") == 3
    assert "nan" not in chart
    assert "inf" not in chart
    empty = line_chart("L", [Curve("a", ((0, math.nan),))], x_name="x", description="")
    assert "Nothing was logged" in empty


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 1e9], [1e-9, 2e-9]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_any_values_stay_within_the_chart(values: list[float], from_zero: bool) -> None:
    points = tuple((float(x), y) for x, y in enumerate(values, start=1))
    chart = line_chart(
        "T", [Curve("a", points)], x_name="x", description="d", from_zero=from_zero, smoothed=True
    )
    root = ElementTree.fromstring(chart)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for path in root.iter("path"):
        for point in path.attrib["d"].replace("M", " ").replace("L", " ").split()[::2]:
            assert 0 <= float(point) <= width
        for point in path.attrib["d"].replace("M", " ").replace("L", " ").split()[1::2]:
            assert 0 <= float(point) <= height
    assert lines_of(chart)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 7.7), (1e-5, 2e-3), (-40, 1234567)])
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    curve = Curve("a", ((1.0, low), (2.0, high)))
    chart = line_chart("T", [curve], x_name="x", description="d")
    words = [
        text.text
        for text in ElementTree.fromstring(chart).iter("text")
        if "text-anchor: end" in text.attrib["style"] and text.text != "x"
    ]
    marks = [float(word.replace("k", "e3").replace("M", "e6")) for word in words]
    assert 2 <= len(marks) <= 7
    room = 0.05 * (high - low)
    assert all(low - room <= mark <= high + room for mark in marks)
    step = marks[1] - marks[0]
    digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - good) for good in (1, 2, 5, 10)) < 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (80_000, "80k"), (1_500_000, "1.5M"), (12.8e9, "12.8G"), (0.25, "0.25"),
        (2.5e-4, "2.5e-4"), (999.96, "1000"), (-3, "-3"), (426.54, "427"), (0.1 + 0.2, "0.3"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_long_curves_are_thinned_and_smoothed_around_each_point() -> None:
    points = [(float(x), float(x % 2)) for x in range(5000)]
    few = thin(points)
    assert len(few) == 300
    assert (few[0], few[-1]) == (points[0], points[-1])
    middle = smooth(points, window=101)[2500][1]
    assert middle == pytest.approx(0.5, abs=0.01)
    assert smooth([(0, 1.0), (1, math.nan), (2, 3.0)], window=3)[1] == (1, 2.0)
    assert smooth([(0, 1.0), (1, 5.0)], window=3)[0] == (0, 3.0)


def test_a_chart_brings_nothing_that_reaches_the_rest_of_the_page() -> None:
    curves = [Curve(f"$<{n}>$", ((1.0, float(n)), (2.0, 5.0))) for n in range(4)]
    chart, again = (
        line_chart("A & B", curves, x_name="$x$ <i>", description='"d"') for _ in range(2)
    )
    assert chart == again
    root = ElementTree.fromstring(chart)
    assert root.attrib["aria-label"] == 'A & B. "d"'
    assert {element.tag for element in root.iter()} == {"svg", "g", "path", "text"}
    assert not any({"id", "clip-path"} & element.attrib.keys() for element in root.iter())
    assert "$x$ <i>" in [text.text for text in root.iter("text")]
    colors = {part for style in _styles(root) for part in style.split("; ") if "#" in part}
    assert colors == set()  # every color is the page's, which changes with the reader's system
    assert "font-family" not in chart and "http" not in chart


def _styles(root: ElementTree.Element) -> list[str]:
    return [element.attrib.get("style", "") for element in root.iter()]


def test_intervals_of_models_are_lines_with_a_dot_and_a_name() -> None:
    intervals = [("$a$ & <b>", 0.1, 0.2, 0.3), ("gone", math.nan, 0.1, 0.2), ("c", 0.5, 0.5, 0.5)]
    chart = interval_chart("accuracy", intervals, as_words="{:.0%}".format)
    words = [text.text for text in ElementTree.fromstring(chart).iter("text")]
    assert sorted(words) == ["$a$ & <b>", "10%", "50%", "c"]
    lines = [[float(x) for x in path[1:].replace("L", " ").split()] for path in lines_of(chart)]
    (left, top, right, _), (dot, *_), (alone, *_), _ = lines
    assert left < dot < right < alone
    assert dot == pytest.approx((left + right) / 2, abs=0.1) and 0 < top < 26
    assert interval_chart("none", [], as_words=str) == ""
