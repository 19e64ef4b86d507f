"""What a comparison found, for people: on a terminal, as Markdown with a picture, and as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from frugal.common.comparison.jobs import in_words
from frugal.common.comparison.options import Options
from frugal.common.comparison.outcomes import Point, mean_and_spread, table
from frugal.common.comparison.results import Result, machine, under
from frugal.common.files import write_file
from frugal.common.report.page import render
from frugal.common.report.plots import Curve, interval_chart, legend, line_chart, standalone

_NONE = "\N{EN DASH}"
_KINDS_OF_COMPOSITION = (
    "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att",
)  # fmt: skip
_SHARES = {
    "held out": "zero_shot_top1_held_out",
    "image R@1": "image_retrieval_recall_at_1",
    "text R@1": "text_retrieval_recall_at_1",
    "composition": "compositional_mean",
    "relevant": "curation_precision",
}
"""Columns of numbers that some entries have."""
_ABOUT = (
    "Seconds and FLOPs are those of training steps, read from each run; start, evaluations, "
    "checkpoints, probes and what an entry runs before its first stage are left out. FLOPs are the "
    "models' own arithmetic. Memory is the most that a process held. Numbers of several seeds are "
    "means with standard deviations. Minutes to an accuracy are those of training until the first "
    "evaluation at or above it."
)


@dataclass(frozen=True)
class Column:
    """One number of every entry."""

    name: str
    number: Callable[[Result], float | None]
    as_words: Callable[[float], str]
    missing: str = _NONE

    def cell(self, seeds: Sequence[Result]) -> str:
        """Mean and spread over the seeds; said to be missing where a seed has none."""
        found = [self.number(result) for result in seeds]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            return self.missing
        mean, spread = mean_and_spread(values)
        return self.as_words(mean) + (f" ± {self.as_words(spread)}" if len(values) > 1 else "")


def _percent(share: float) -> str:
    return f"{share:.1%}"


def columns(results: Sequence[Result], targets: Sequence[float]) -> list[Column]:
    """Costs and numbers, those that any of the results has."""
    found = [
        Column("samples", lambda r: r.samples, lambda x: f"{x:,.0f}"),
        Column("minutes", lambda r: r.seconds / 60, lambda x: f"{x:.2f}"),
        Column("TFLOPs", lambda r: r.flops / 1e12, lambda x: f"{x:,.2f}"),
        Column("MiB", lambda r: r.memory_bytes / 2**20, lambda x: f"{x:,.0f}"),
        Column("accuracy", lambda r: r.value, _percent),
    ]
    found += [_share(name, number) for name, number in _SHARES.items()]
    found += [_minutes(target) for target in targets]
    always = 5
    return found[:always] + [
        column
        for column in found[always:]
        if column.missing != _NONE or any(column.number(r) is not None for r in results)
    ]


def _share(name: str, number: str) -> Column:
    return Column(name, lambda result: result.numbers.get(number), _percent)


def _minutes(target: float) -> Column:
    return Column(
        f"minutes to {target:.0%}",
        lambda result: result.minutes_to(target),
        lambda x: f"{x:.2f}",
        "not reached",
    )


def composition(results: Sequence[Result]) -> list[Column]:
    """A column for each kind of caption that was made false."""
    found = [
        _share(kind.replace("_", " "), f"compositional_{kind}") for kind in _KINDS_OF_COMPOSITION
    ]
    return [column for column in found if any(column.number(r) is not None for r in results)]


Rows = tuple[list[str], list[list[str]]]
"""Names of the columns, and what stands in them."""


def rows_of(by_name: dict[str, list[Result]], chosen: Sequence[Column]) -> Rows:
    """An entry in each row, those without any of the numbers left out."""
    rows = [[name, *(column.cell(seeds) for column in chosen)] for name, seeds in by_name.items()]
    rows = [row for row in rows if any(cell != _NONE for cell in row[1:])]
    return ["", *(column.name for column in chosen)], rows


def write_pages(options: Options, results: Sequence[Result]) -> str:
    """Write ``compare.html``, ``compare.md`` and ``compare.svg``; what a terminal shows of them."""
    place = machine(results[0].place.last)
    where = (
        f"{place['date']}, {place['processor'] or place['device']}, {place['cores']} cores, commit "
        f"{(place['commit'] or 'unknown')[:7]}"
    )
    seeds = f"{options.seeds} seed{'s' if options.seeds > 1 else ''}"
    first = results[0].name
    summary = f"Budgets are those of {first} on {options.samples:,} samples; {seeds}; {where}."
    tables: dict[str, Rows] = {}
    sections: list[tuple[str, Markup]] = []
    for kind in options.equal:
        found = under(results, kind)
        title = in_words(kind).capitalize().replace("flops", "FLOPs")
        tables[title] = rows_of(found, columns(results, options.target))
        tables[f"{title}: composition"] = rows_of(found, composition(results))
        sections += _sections(title, found)
    tables = {title: rows for title, rows in tables.items() if rows[1]}
    sections += [(title, _html_table(rows)) for title, rows in tables.items()]
    page = render(
        "page.html.j2", title="Methods compared", summary=summary,
        sections=[*sections, ("How it was counted", Markup("<p>{}</p>").format(_ABOUT))],
    )  # fmt: skip
    write_file(options.out / "compare.html", page)
    write_file(options.out / "compare.md", _markdown(tables, summary))
    chart = _accuracies(in_words(options.equal[0]), under(results, options.equal[0]))
    write_file(options.out / "compare.svg", standalone(chart))
    shown = [f"{title}\n{table(*rows)}\n" for title, rows in tables.items()]
    return "\n".join([*shown, summary, f"The comparison is {options.out / 'compare.html'}."])


def _sections(title: str, found: dict[str, list[Result]]) -> list[tuple[str, Markup]]:
    """Charts of the results under one budget."""
    return [
        (f"{title}: accuracy", _accuracies(title, found)),
        (
            f"{title}: accuracy against minutes of training",
            _courses(found, "minutes", lambda p: p.seconds / 60),
        ),
        (f"{title}: accuracy against TFLOPs", _courses(found, "TFLOPs", lambda p: p.flops / 1e12)),
        (f"{title}: memory", _intervals("memory", found, lambda r: r.memory_bytes, _mebibytes)),
    ]


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _accuracies(title: str, found: dict[str, list[Result]]) -> Markup:
    return _intervals(f"accuracy, {title}", found, lambda result: result.value, _percent)


def _intervals(
    label: str,
    found: dict[str, list[Result]],
    number: Callable[[Result], float],
    as_words: Callable[[float], str],
) -> Markup:
    """A number of every entry, with one standard deviation over the seeds to either side."""
    intervals = []
    for name, seeds in found.items():
        mean, spread = mean_and_spread([number(result) for result in seeds])
        intervals.append((name, mean - spread, mean, mean + spread))
    return interval_chart(label, intervals, as_words=as_words)


def _courses(found: dict[str, list[Result]], x_name: str, x: Callable[[Point], float]) -> Markup:
    """A chart for each entry that was measured on the way, beside the first of its number."""
    drawn = Markup("")
    bars: dict[str, str] = {}
    for name, seeds in found.items():
        measured_by = seeds[0].place.entry.measured_by
        bar = bars.setdefault(measured_by, name)
        if bar == name:
            continue
        curves = [_curve(bar, found[bar][0], x), _curve(name, seeds[0], x)]
        chart = line_chart(
            f"{name} beside {bar}", curves, x_name=x_name, from_zero=True,
            description=f"{measured_by} in percent after each evaluation of the first seed",
        )  # fmt: skip
        drawn += Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(
            legend(curves), chart
        )
    return Markup('<div class="figures">{}</div>').format(drawn)


def _curve(name: str, result: Result, x: Callable[[Point], float]) -> Curve:
    return Curve(name, tuple((x(point), 100 * point.value) for point in result.course))


def _html_table(rows: Rows) -> Markup:
    def line(cells: Sequence[str], tag: str) -> Markup:
        inside = (Markup("<{0}>{1}</{0}>").format(Markup(tag), cell) for cell in cells)
        return Markup("<tr>{}</tr>").format(Markup("").join(inside))

    head, *body = line(rows[0], "th"), *(line(row, "td") for row in rows[1])
    return Markup('<div class="scroll"><table class="grid">{}{}</table></div>').format(
        head, Markup("").join(body)
    )


def _markdown(tables: dict[str, Rows], summary: str) -> str:
    """The tables for a README, with the picture above them."""
    parts = ["![Accuracy of every entry](compare.svg)", summary]
    for title, (header, rows) in tables.items():
        lines = [header, ["---"] * len(header), *rows]
        text = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
        parts.append(f"{title}:\n\n{text}")
    return "\n\n".join([*parts, _ABOUT]) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
