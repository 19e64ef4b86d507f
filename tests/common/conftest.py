"""Fixtures of the tests of evaluations and of pages about them."""

import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "evaluation"))  # for `import evaluated`
sys.path.insert(0, str(Path(__file__).parent / "report"))  # for `import reported`
sys.path.insert(0, str(Path(__file__).parent / "objectives"))  # for `import contrastive_cases`

from frugal.common.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """One process on the CPU, whose log pytest hears."""
    return Run(tmp_path, 0, 1, 0, torch.device("cpu"), logging.getLogger("evaluating"))
