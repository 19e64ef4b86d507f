"""The short version of ``benchmarks/fuzz.py``: some two hundred files with something wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzz

pytestmark = pytest.mark.slow

SHARE = 0.1


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_changed_file_is_read_refused_or_damaged_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    count = round(fuzz.COUNTS[kind] * SHARE)
    tally = fuzz.fuzz(kind, count, tmp_path, seed=1)
    assert sum(tally.endings.values()) == count and not tally.faults
