"""What the command line of a comparison takes."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from frugal.common.comparison.entries import KINDS
from frugal.common.errors import InputError
from frugal.common.ranges import Count, check_ranges

LINES_OF_TRIAL = 3
"""Log lines of a trial, the first of which warms up."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train methods under equal budgets, and write what each reached."""

    file: tyro.conf.Positional[Path] = Path("launch/compare.json")
    """What is compared; the first entry sets the budgets."""
    out: Path = Path("runs/compare")
    """Folder of all runs and pages; the same command goes on there."""
    samples: Count = 20_000
    """That the first entry trains on."""
    seeds: Count = 1
    """Runs of each entry under each budget."""
    equal: tuple[str, ...] = KINDS
    """Budgets: time, flops or both."""
    target: tuple[float, ...] = (0.7,)
    """Accuracies to which the minutes of training are told."""
    evaluations: Count = 4
    """Of each entry, the last one included, as far apart as one another."""
    trial_steps: Count = 45
    """Of the short trial of each stage."""
    launch: str | None = None
    """What starts an entry script, such as "torchrun --nproc_per_node 8 -m"; by default this Python
    in one process."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.equal or set(self.equal) - set(KINDS):
            raise InputError(f"--equal is {' '.join(self.equal)!r}; give time, flops or both")
        if not all(0 < target <= 1 for target in self.target):
            raise InputError("--target has a number that is no accuracy above 0; give such as 0.7")
        if self.trial_steps < 2 * LINES_OF_TRIAL:
            raise InputError(
                f"--trial-steps is {self.trial_steps}; give at least {2 * LINES_OF_TRIAL}"
            )

    @property
    def launcher(self) -> tuple[str, ...]:
        """The words that start a module."""
        return tuple(shlex.split(self.launch)) if self.launch else (sys.executable, "-m")
