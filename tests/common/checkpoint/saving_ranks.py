"""One process of a run that saves once and is killed; started by test_background.py.

Words: rank, folder, when the second process dies (copied, copying).
"""

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from frugal.common.checkpoint.background import BackgroundSaves
from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.run import Run

rank, folder, when = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
log = logging.getLogger("test")
saves = BackgroundSaves(
    CheckpointStore(Run(folder / "run", rank, 2, rank, torch.device("cpu"), log), keep=2),
    max_failures=9,
)


def save(step: int, *, is_last: bool, dies: bool = False) -> None:
    tensors = {f"weight/{rank}": torch.full((4_000_000,), float(step + rank))}

    def fill(into: Mapping[str, Tensor]) -> None:
        if dies and when == "copying" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for name, tensor in tensors.items():
            into[name].copy_(tensor)

    saves.save(tensors, fill, {"step": step}, is_last=is_last)


save(10, is_last=True)
save(20, is_last=False, dies=True)
os.kill(os.getpid(), signal.SIGKILL)
