"""Fixtures that several tests share."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import support`
sys.path.insert(0, str(Path(__file__).parent / "reference"))  # for `import reference_milan`

from support import ALONE, train


@pytest.fixture(autouse=True)
def _log_of_a_fresh_process() -> None:
    """Undo what a command that an earlier test ran in this process has made of the log."""
    log = logging.getLogger("frugal")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small scenes data set of 32-pixel pictures."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    command = [
        sys.executable, "-m", "frugal.common.scenes", "--out", str(folder), "--image-size", "32",
        "--train-samples", "150", "--shard-size", "40", "--zero-shot-samples", "128",
        "--probe-samples", "112", "--retrieval-samples", "40", "--compositional-samples", "10",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of the tiny FLIP in one process, with a moving average of the weights."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(ALONE, run, f"--data.train={scenes / 'train'}", "--engine.ema-decay=0.9")
    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real photos with captions, where this machine has them."""
    folder = Path(os.environ.get("FRUGAL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here; set FRUGAL_TEST_DATA to a folder that has it")
    return folder
