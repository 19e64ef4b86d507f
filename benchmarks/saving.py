"""How long training waits for a checkpoint, against how long the checkpoint takes to write.

    python benchmarks/saving.py --megabytes 500 --folder /path/on/the/disk

The memory that all of them are copied into is taken before, as it is before the first step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from frugal.common.checkpoint.background import BackgroundSaves
from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.run import Run


def main() -> None:
    """Save several times in both ways, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    layers = 50
    numbers = options.megabytes * 1_000_000 // 4 // layers
    tensors = {f"weight/{n}": torch.randn(numbers) for n in range(layers)}

    def fill(into: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            into[name].copy_(tensor)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = Run(Path(folder), 0, 1, 0, torch.device("cpu"), logging.getLogger("benchmark"))
        store = CheckpointStore(run, keep=1)
        saves = BackgroundSaves(store, max_failures=1)
        started = time.perf_counter()
        saves.prepare(tensors)
        prepared = time.perf_counter() - started
        waited, written = [], []
        for step in range(options.saves):
            started = time.perf_counter()
            saves.save(tensors, fill, {"step": step}, is_last=False)
            waited.append(time.perf_counter() - started)
            assert saves.settle()
            written.append(time.perf_counter() - started)
        saves.close()
        started = time.perf_counter()
        store.save({n: t.clone() for n, t in tensors.items()}, {"step": options.saves})
        alone = time.perf_counter() - started
    print(f"{options.megabytes} MB, seconds:")
    print(f"  to take the memory, {prepared:.3f}")
    print(f"  waited, the first time {waited[0]:.3f}, then {_described(waited[1:])}")
    print(f"  until written, the first time {written[0]:.2f}, then {_described(written[1:])}")
    share = statistics.median(waited[1:]) / statistics.median(written[1:])
    print(f"  share of the writing that training waited for: {100 * share:.1f} %")
    print(f"  written while training waits: {alone:.2f}")


def _described(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    main()
