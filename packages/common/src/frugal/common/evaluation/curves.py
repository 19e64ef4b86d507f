"""Line charts as inline SVG that follows the colors of the page around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 44
_MOST_POINTS = 300


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


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers in [low, high], near ``about`` of them, in steps of 1, 2 or 5."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


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


def _range(values: list[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    room = 0.04 * (high - low)
    return (low if from_zero else low - room), high + room


def _path(points: Sequence[tuple[float, float]], at: Callable[[float, float], str]) -> str:
    words, pen_up = [], True
    for x, y in points:
        if not math.isfinite(y):
            pen_up = True
            continue
        words.append(("M" if pen_up else "L") + at(x, y))
        pen_up = False
    return "".join(words)


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_name: str,
    description: str,
    from_zero: bool = False,
    smoothed: bool = False,
) -> str:
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
    finite = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(y)]
    if not finite:
        return '<p class="quiet">Nothing was logged.</p>'
    x_low, x_high = 0.0, max(x for x, _ in finite) or 1.0
    y_low, y_high = _range([y for _, y in finite], from_zero=from_zero)

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def at(x: float, y: float) -> str:
        return f"{across(x):.1f} {down(y):.1f}"

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}. {description}")}">'
    ]
    for y in ticks(y_low, y_high):
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(y):.1f}" '
            f'y2="{down(y):.1f}"/><text class="tick" x="{_LEFT - 8}" y="{down(y) + 4:.1f}" '
            f'text-anchor="end">{short_number(y)}</text>'
        )
    for x in ticks(x_low, x_high):
        parts.append(
            f'<text class="tick" x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 19}" '
            f'text-anchor="middle">{short_number(x)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" '
        f'text-anchor="end">{escape(x_name)}</text>'
    )
    for number, curve in enumerate(curves):
        color = f'style="stroke:var(--line-{number % 3 + 1})"'
        lines = [("line", curve.points)]
        if smoothed and len(curve.points) >= 20:
            running = smooth(curve.points, window=max(3, len(curve.points) // 20))
            lines = [("line pale", curve.points), ("line", tuple(running))]
        for kind, points in lines:
            path = _path(thin(points), at)
            if path.count("L"):
                parts.append(f'<path class="{kind}" {color} d="{path}"/>')
        if len(curve.points) == 1 and math.isfinite(curve.points[0][1]):
            x, y = curve.points[0]
            parts.append(
                f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" '
                f'style="fill:var(--line-{number % 3 + 1})"/>'
            )
    return "".join([*parts, "</svg>"])
