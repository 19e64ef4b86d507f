"""A method that nobody here knows is a new package, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support import BIN, ROOT, TINY

METHOD = '''
"""Keep the left part of every image; a method in one file."""
from dataclasses import dataclass, replace

from frugal.common.recipe import Recipe
from frugal.common.reduction.image import ImageReduction, KeptPatches
from frugal.flip.recipes import demo  # a recipe to start from; a real method writes its own


@dataclass(frozen=True, kw_only=True)
class LeftPart(ImageReduction):
    """The leftmost columns of patches stay."""

    columns: int = 1
    """Columns of patches that stay."""

    def keep(self, view, *, noise):
        """Dense indices, row-major."""
        import torch

        rows, columns = view.grid
        index = torch.arange(rows * columns).view(rows, columns)[:, : self.columns].flatten()
        return KeptPatches.dense(index.expand(len(view.images), -1))


def left_demo() -> Recipe:
    """FLIP's demo that sees the left of every image."""
    recipe = demo()
    return replace(recipe, reduction=replace(recipe.reduction, image=LeftPart()))


RECIPES = {"left-demo": left_demo}
'''
ENTRY = """
from frugal.common.train import main
from frugal.toy.recipes import RECIPES

main(RECIPES, method="toy")
"""


def test_a_toy_method_from_another_folder_trains_and_saves_itself(
    scenes: Path, tmp_path: Path
) -> None:
    package = tmp_path / "somewhere" / "frugal" / "toy"
    package.mkdir(parents=True)
    (package / "recipes.py").write_text(METHOD)
    (package / "train.py").write_text(ENTRY)
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "frugal.toy.train", "left-demo", *TINY, f"--run.dir={run}",
        f"--data.train={scenes / 'train'}", "--schedule.samples=48",
        "--reduction.image.columns=2",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tmp_path / 'somewhere'}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["reduction"]["image"] == {"type": "frugal.toy.recipes.LeftPart", "columns": 2}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # 32-pixel images in patches of 8: four rows of two columns, and the class token
    assert lines[-1]["image_tokens"] == 4 * 2 + 1
