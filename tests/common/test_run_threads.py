"""How many threads a process on a CPU takes."""

import os

import pytest

from frugal.common.run import _threads


@pytest.mark.parametrize(
    ("variable", "processes", "threads"),
    [("3", 1, 3), ("1", 2, 4), (None, 1, 8), (None, 3, 2), (None, 16, 1), ("", 1, 8), ("0", 1, 8)],
)
def test_a_lone_process_obeys_the_environment_and_others_share_the_cores(
    variable: str | None, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert _threads(processes) == threads
