"""MILAN's three ways to measure an image tower, for ``frugal.common.evaluate --tasks``."""

from pathlib import Path

from frugal.common.evaluation.programs import Program, train_and_test
from frugal.milan.segmentation_recipes import SEGMENTATION
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING


def both(data: Path) -> tuple[Path, Path]:
    """A folder of pictures with masks holds both parts itself."""
    return data, data


FINETUNE = Program(FINE_TUNING, train_and_test, "accuracy")
LINEAR_PROBE = Program(LINEAR_PROBING, train_and_test, "accuracy")
SEGMENT = Program(SEGMENTATION, both, "segmentation")
