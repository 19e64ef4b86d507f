"""Processes that see different copies of the data refuse to measure, each in the same words."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from frugal.common.errors import InputError
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.run import Run, make_logger
from frugal.common.weights.runs import bundle_of
from support import start_ranks

PROCESSES = 2


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=0)  # every file has the same size


def test_another_copy_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    for rank in range(PROCESSES):
        root = tmp_path / str(rank)
        for part in ("train", "test"):
            for name in "ab":
                for number in range(5):
                    # process 1 has other pictures of one class under the same names
                    other = 100 if rank == 1 and (part, name) == ("test", "b") else 0
                    draw(root / part / name / f"{number}.png", number + 10 * (name == "b") + other)
        draw(root / "contrasts" / "0.png", 7)
        item = {"filename": "0.png", "caption": "a cat", "negative_caption": f"{rank} dogs"}
        (root / "contrasts" / "add_obj.json").write_text(json.dumps({"1": item}))
    processes = start_ranks(__file__, PROCESSES, tmp_path)
    assert processes.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert said[0] == said[1]
    for task, words in said[0].items():
        assert f"data of the evaluation '{task}' is not the same everywhere" in words
        assert "process 1 of 2 sees another copy than process 0" in words
    assert set(said[0]) == {"zero_shot", "linear_probe", "compositional"}


def refused(root: Path, rank: int) -> dict[str, str]:
    """What each task says to this process."""
    sys.path.insert(0, str(Path(__file__).parent))
    from evaluated import recipe, telling

    plan = recipe()
    model = telling(plan)
    run = Run(root, rank, PROCESSES, rank, torch.device("cpu"), make_logger(rank))
    said = {}
    for task, data in (
        (ZeroShot(), root / "test"),
        (LinearProbe(weight_decay=0.1, features=root / "features"), root),
        (Compositional(), root / "contrasts"),
    ):
        try:
            replace(task, data=data).evaluate(bundle_of(model, plan), run)
        except InputError as error:
            said[task.name] = str(error)
    assert Retrieval().evaluate(bundle_of(model, plan), run) == {}
    return said


if __name__ == "__main__":
    number, out = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meeting", rank=number, world_size=PROCESSES
    )
    found = refused(out / str(number), number)
    (out / f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
