"""What the tests of MILAN share."""

import shutil
import sys
from pathlib import Path

import pytest

from support import ALONE, train

sys.path.insert(0, str(Path(__file__).parent))  # for `import golden_cases`
sys.path.insert(0, str(Path(__file__).parents[1] / "common/transfer"))  # `import segment_cases`

WORDS = (
    "--model.image.width=32", "--model.image.depth=2", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--model.decoder.width=16", "--model.decoder.heads=2",
    "--data.workers=0", "--engine.precision=float32", "--run.log-every=1",
    "--batch-size=24", "--schedule.samples=120", "--schedule.warmup-samples=24",
)  # fmt: skip


@pytest.fixture(scope="session")
def pretraining_words() -> tuple[str, ...]:
    """Options of a small pretraining."""
    return WORDS


@pytest.fixture(scope="session")
def pretrained(alone: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of MILAN's demo, towards the features of the tiny FLIP."""
    folder = tmp_path_factory.mktemp("pretrained")
    teacher = folder / "teacher"
    shutil.copytree(alone, teacher)
    words = (f"--objective.teacher.source={teacher}", f"--data.train={scenes / 'train'}")
    train(ALONE, folder / "run", *words, module="frugal.milan.pretrain", small=WORDS)
    return folder / "run"
