"""One self-contained HTML page about a finished run, and the same numbers as JSON.

``python -m frugal.common.report runs/demo`` writes ``report.html`` and ``report.json`` there, or
into ``--out``, for a run directory or for a folder that holds the run directories of several
stages. The page needs no network and no script.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from frugal.common.cli import read_options, run_politely
from frugal.common.errors import InputError
from frugal.common.report.collect import (
    REQUIRED,
    collect_numbers,
    describe_data,
    describe_history,
    find_stages,
)
from frugal.common.report.examples_of_model import examples_of_stages
from frugal.common.report.page import Command, write_report
from frugal.common.run import make_logger


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write report.html and report.json about a finished run, or about the stages of one."""

    folder: tyro.conf.Positional[Path]
    """A run directory, or a folder that holds one per stage."""
    out: Path | None = None
    """Folder that the report goes to; by default the one that it is about."""
    next: tuple[str, ...] = ()
    """What to type next, each as 'purpose: command'."""
    examples: int = 12
    """Images of each kind on the page."""
    title: str | None = None
    """Of the page; by default the name of the folder."""


def report(options: Options) -> None:
    """Collect, write, and say where the page is."""
    if options.examples < 1:
        raise InputError(f"--examples is {options.examples}, must be at least 1")
    stages = find_stages(options.folder)
    numbers = collect_numbers(stages)
    commands = [Command(*entry.partition(": ")[::2]) for entry in options.next]
    path = write_report(
        options.out or options.folder,
        numbers=numbers,
        stages=stages,
        examples=examples_of_stages(stages, count=options.examples),
        about_data=[*describe_data(stages), *describe_history(stages)],
        commands=commands,
        title=options.title or f"Report of {options.folder.resolve().name}",
        summary=f"Stages of the training: {', then '.join(stages)}." if len(stages) > 1 else "",
    )
    write = sys.stdout.write
    log = make_logger(0)
    for name, reason in numbers.get("not_measured", {}).items():
        log.warning("the report has no numbers of %s: %s", name, reason)
    named = (*REQUIRED, "compositional_mean", "accuracy_top1", "segmentation_miou")
    shown = [name for name in named if numbers.get(name) is not None]
    for name in shown:
        value = numbers[name]
        write(
            f"{name:>28}  {value:.4g}\n" if isinstance(value, float) else f"{name:>28}  {value}\n"
        )
    write(f"\nThe report is {path}; open it in a browser.\n")
    for command in commands:
        write(f"\n{command.purpose}:\n    {command.line}\n")


def main() -> None:
    """The body of ``python -m frugal.common.report``."""
    run_politely(
        lambda: report(read_options(Options, "python -m frugal.common.report")),
        alone=True,
    )


if __name__ == "__main__":
    main()
