"""Charts as inline SVG that follows the colors of the page around it, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from frugal.common.evaluation.pictures import Picture, to_pil

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 44
_MOST_POINTS = 300

_LINES = ("#000001", "#000002", "#000003")
_EDGE, _INK = "#000004", "#000005"
_IN_THE_PAGE = {
    _LINES[0]: "var(--line-1)",
    _LINES[1]: "var(--line-2)",
    _LINES[2]: "var(--line-3)",
    _EDGE: "var(--edge)",
    _INK: "currentColor",
}
"""What stands for the colors that matplotlib draws in: it knows none that change with the page."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(x, y), x ascending; points that are not finite leave a gap."""


def short_number(value: float) -> str:
    """A number as an axis or a headline shows it: 80000 -> 80k, 0.00025 -> 2.5e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{float(f'{value / limit:.3g}'):g}{unit}"
    if size >= 0.01:
        return f"{float(f'{value:.3g}'):g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 300 of the points, evenly chosen, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(place * last / (_MOST_POINTS - 1))] for place in range(_MOST_POINTS)]


def smooth(points: Sequence[tuple[float, float]], *, window: int) -> list[tuple[float, float]]:
    """Each value replaced by the mean of the ``window`` finite values around it."""
    values = [y for _, y in points]
    half = window // 2
    result = []
    for place, (x, _) in enumerate(points):
        near = [y for y in values[max(0, place - half) : place + half + 1] if math.isfinite(y)]
        result.append((x, sum(near) / len(near) if near else math.nan))
    return result


# What matplotlib draws.


@contextmanager
def _style() -> Iterator[None]:
    """The same style for every reader, whatever their matplotlibrc says; words stay text."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "frugal",
                "text.parse_math": False,  # a dollar in a name is a dollar
                "text.color": _INK,
                "font.size": 13,
                "xtick.color": _INK,
                "ytick.color": _INK,
                "axes.axisbelow": True,
                "grid.color": _EDGE,
                "grid.linewidth": 1,
                "lines.solid_capstyle": "round",
            }
        )
        yield


def _empty_axes(width: int, height: int, *, left: int, right: int, top: int, bottom: int) -> Any:
    """Axes with words but without any line, on a figure without a background; sizes in pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # an SVG has 72 units per inch
    figure.patch.set_visible(False)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=8)
    return axes


def _as_svg(axes: Any, label: str) -> Markup:
    """The figure as an ``<svg>`` without a name space, a style sheet or an id of its own.

    Several stand on one page: their ids would meet, and a style sheet would reach all of the page.
    """
    file = io.StringIO()
    axes.figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for child in list(root):
        if child.tag.endswith(("}metadata", "}defs")):
            root.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in ("id", "clip-path"):  # nothing leaves the axes: their limits hold every point
            element.attrib.pop(name, None)
        element.text, element.tail = element.text and element.text.strip(), None
        if "style" in element.attrib:
            style = re.sub("font-family: [^;]*; ", "", element.attrib["style"])  # as in the page
            for color, name in _IN_THE_PAGE.items():
                style = style.replace(color, name)
            element.attrib["style"] = style
        if "d" in element.attrib:
            path = re.sub(r"(\.\d)\d+", r"\1", element.attrib["d"])  # a tenth of a pixel will do
            element.attrib["d"] = path.replace(" \n", "").replace("\n", "")
    root.attrib = {
        "class": "chart",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _range(values: list[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    room = 0.04 * (high - low)
    return (low if from_zero else low - room), high + room


def legend(curves: Sequence[Curve]) -> Markup:
    """The names of the lines of a chart, in their colors."""
    return Markup(", ").join(
        Markup('<span style="color:var(--line-{})">{}</span>').format(place % 3 + 1, curve.name)
        for place, curve in enumerate(curves)
    )


@_style()
def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_name: str,
    description: str,
    from_zero: bool = False,
    smoothed: bool = False,
) -> Markup:
    """An ``<svg>`` of the curves, each in the CSS color ``--line-1``, ``--line-2``, ...

    Args:
        title: what is drawn, for people who hear the page.
        curves: share both axes.
        x_name: written under the x axis.
        description: says in a sentence what there is to see.
        from_zero: the y axis starts at zero.
        smoothed: the values are pale, their running mean (5 % of the points) is strong.

    Returns:
        The SVG, or a sentence where there is no finite point.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    finite = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(y)]
    if not finite:
        return Markup('<p class="quiet">Nothing was logged.</p>')
    axes = _empty_axes(_WIDTH, _HEIGHT, left=_LEFT, right=_RIGHT, top=_TOP, bottom=_BOTTOM)
    axes.set_xlim(0.0, max(x for x, _ in finite) or 1.0)
    axes.set_ylim(*_range([y for _, y in finite], from_zero=from_zero))
    for axis in (axes.xaxis, axes.yaxis):
        span = max(map(abs, axis.get_view_interval()))
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(
            # a zero may be 1e-17 after the additions that led to it
            FuncFormatter(lambda y, _, span=span: short_number(y if abs(y) > 1e-9 * span else 0))
        )
    axes.yaxis.grid()
    axes.figure.text(1 - _RIGHT / _WIDTH, 3 / _HEIGHT, x_name, horizontalalignment="right")
    for number, curve in enumerate(curves):
        color = _LINES[number % len(_LINES)]
        lines = [(curve.points, 2.0, 1.0)]
        if len(curve.points) == 1:
            lines = [(curve.points * 2, 6.0, 1.0)]  # a line without length has round ends: a dot
        elif smoothed and len(curve.points) >= 20:
            running = tuple(smooth(curve.points, window=max(3, len(curve.points) // 20)))
            lines = [(curve.points, 1.0, 0.35), (running, 2.0, 1.0)]
        for points, width, alpha in lines:
            if sum(math.isfinite(y) for _, y in points) > 1:
                x, y = zip(*thin(points), strict=True)
                axes.plot(x, y, color=color, linewidth=width, alpha=alpha)
    return _as_svg(axes, f"{title}. {description}")


@_style()
def interval_chart(
    label: str,
    intervals: Sequence[tuple[str, float, float, float]],
    *,
    as_words: Callable[[float], str],
) -> Markup:
    """An ``<svg>`` with a line from one end of each interval to the other, and a dot at its number.

    Args:
        label: what is drawn, for people who hear the page.
        intervals: name, low end, number, high end; those that are not finite leave a gap.
        as_words: how a number is written under the axis.

    Returns:
        The SVG, or nothing where no number is finite.
    """
    width, line, names = 640, 26, 190
    finite = [end for _, *ends in intervals for end in ends if math.isfinite(end)]
    if not finite:
        return Markup("")
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low or max(abs(high), 1e-3))
    height = line * len(intervals) + 26
    axes = _empty_axes(width, height, left=names, right=10, top=0, bottom=26)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    ends = [low, high] if low < high else [low]
    axes.set_xticks(ends, [as_words(end) for end in ends])
    axes.set_yticks([])
    for place, (name, start, value, stop) in enumerate(intervals):
        if math.isfinite(start + value + stop):
            axes.text(
                -names / (width - names - 10), place, name, verticalalignment="center",
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
            axes.plot((start, stop), (place, place), color=_LINES[0], linewidth=3, alpha=0.45)
            axes.plot((value, value), (place, place), color=_LINES[0], linewidth=10)
    return _as_svg(axes, label)


_ALONE = {"line-1": "#0f766e", "line-2": "#d97706", "line-3": "#6d5bd0", "edge": "#e2e0d8"}
"""The colors of a chart in no page: those of a light one."""


def standalone(chart: Markup) -> str:
    """A chart as the text of an SVG file, which no page lends its colors and its font."""
    for name, color in _ALONE.items():
        chart = Markup(chart.replace(f"var(--{name})", color))
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" color="#66707a" '
        'font-family="system-ui, sans-serif"'
    )
    return str(chart).replace("<svg", head, 1)


# What the stages of a training logged.

_CHARTS = (
    ("loss", "Loss", True, False),
    ("accuracy", "Right within the batch", True, True),
    ("cosine_hidden", "Cosine of predicted and wanted features, hidden patches", True, True),
    ("importance_seen", "Share of the teacher's attention on seen patches", True, True),
    ("kept_ratio", "Share of the scanned captions that are kept", False, True),
    ("learning_rate", "Learning rate", False, True),
    ("samples_per_second", "Samples per second", False, True),
)
"""Key in ``metrics.jsonl``, title, whether smoothed, whether from zero."""


def learning_curves(
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[tuple[str, Markup]]:
    """Titles and charts of what the stages logged, one after the other along the samples.

    Args:
        stages: the lines of ``metrics.jsonl`` of each stage, in order.
    """
    charts = []
    for key, title, smoothed, from_zero in _CHARTS:
        curves = _curves(stages, key)
        if any(curve.points for curve in curves):
            chart = line_chart(
                title,
                curves,
                x_name="samples seen",
                description=_course(curves),
                from_zero=from_zero,
                smoothed=smoothed,
            )
            charts.append((title, chart))
    return charts


def _curves(stages: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> list[Curve]:
    """One curve per stage; each begins at the samples where the one before it ended."""
    curves, start = [], 0.0
    for name, logged in stages.items():
        points = [
            (start + line["samples"], float(line[key]))
            for line in logged
            if isinstance(line.get(key), (int, float))
        ]
        curves.append(Curve(name, tuple(points)))
        start += max((line["samples"] for line in logged), default=0)
    return curves


def _course(curves: Sequence[Curve]) -> str:
    """How each curve goes, in words."""
    words = [
        f"{curve.name}: from {short_number(curve.points[0][1])} to "
        f"{short_number(curve.points[-1][1])}"
        for curve in curves
        if curve.points and all(math.isfinite(curve.points[end][1]) for end in (0, -1))
    ]
    return "; ".join(words)


# Pictures.


def data_uri(picture: Picture, exact: bool = False) -> str:
    """A (3, H, W) picture as an address that holds it; small ones as PNG, photos as JPEG.

    Args:
        picture: uint8.
        exact: as PNG, however large it is.
    """
    kind = "png" if exact or max(picture.shape[1:]) <= 128 else "jpeg"
    file = io.BytesIO()
    to_pil(picture).save(file, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
