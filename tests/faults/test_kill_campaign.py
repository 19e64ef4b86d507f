"""A run that is killed at random moments ends as an undisturbed one: the small form of a benchmark.

``benchmarks/kill_campaign.py`` does the same over all methods and engines, each with a Python that
imports everything anew; here they start at once.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from support import QUICK, ROOT, environment


@pytest.mark.slow
def test_five_kills_lose_nothing(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "kill_campaign.py"
    words = ["--kills=5", "--methods=flip", "--engines=accelerate", f"--out={tmp_path}"]
    done = subprocess.run(
        [str(QUICK / "python"), str(script), *words],
        env=environment(quick=True) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = json.loads((tmp_path / "kill_campaign.json").read_text()).values()
    assert sum(told["kills"].values()) == 5 and told["faults"] == []
