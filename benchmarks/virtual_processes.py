"""What a step of virtual processes costs, against the same step computed as usual.

    python benchmarks/virtual_processes.py

Both train the demo of FLIP on samples that are made up, taking turns after every step, so that
whatever else the machine does slows both. CPU time is that of all processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import write

VIRTUAL = 4


def main() -> None:
    """Measure one and two processes, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128, help="pairs of one step")
    parser.add_argument("--steps", type=int, default=12, help="of either kind; the median counts")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/virtual_processes.json"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
        return
    report = {f"{world} processes": measure_apart(world, options) for world in (1, 2)}
    for name, rows in report.items():
        ratios = {kind: rows["virtual"][kind] / rows["plain"][kind] for kind in rows["plain"]}
        print(name, rows, {kind: f"{ratio:.2f} times" for kind, ratio in ratios.items()})
    write(options.out, {"batch": options.batch, "virtual_processes": VIRTUAL, **report})


def measure_apart(world_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one kind of run, in processes of their own."""
    from frugal.common.ports import free_port

    words = [f"--batch={options.batch}", f"--steps={options.steps}", "--measure"]
    together = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    processes = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        environment = os.environ | (together | own if own else {})
        command = [sys.executable, __file__, *words]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    said = [process.communicate()[0] for process in processes]
    return json.loads(said[0].splitlines()[-1])


def measure(options: argparse.Namespace) -> None:
    """Seconds of a step of both kinds, in one process of a run; the first one tells."""
    import torch

    from frugal.common.contracts import Batch
    from frugal.common.distributed import gather_objects
    from frugal.common.engine.step import train_step
    from frugal.common.recipe import EngineOptions
    from frugal.common.run import open_run
    from frugal.common.train import make_engine
    from frugal.flip.recipes import RECIPES

    run = open_run(Path("nowhere"), "cpu", threads=1)
    plain = replace(
        RECIPES["demo"](), batch_size=options.batch, engine=EngineOptions(precision="float32")
    )
    virtual = replace(plain, engine=replace(plain.engine, virtual_processes=VIRTUAL))
    engine = make_engine(plain.objective.build(plain), plain, run)
    size, (height, width) = options.batch // run.world_size, plain.model.inputs().height_width
    captions = plain.model.inputs().captions
    assert captions is not None
    whole = Batch(
        images=torch.randint(0, 256, (size, 3, height, width)).byte(),
        sample_numbers=torch.arange(size) + run.rank * size,
        valid=torch.ones(size, dtype=torch.bool),
        token_ids=torch.randint(1, captions.vocabulary, (size, captions.length)),
        text_lengths=torch.full((size,), captions.length),
    )
    local = options.batch // VIRTUAL
    parts = [whole.rows(start, start + local) for start in range(0, size, local)]
    kinds = {"plain": (plain, [whole]), "virtual": (virtual, parts)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for step in range(options.steps + 1):
        for name, (recipe, batches) in kinds.items():
            cpu, wall = time.process_time(), time.perf_counter()
            train_step(engine, recipe, step, batches)
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    told = gather_objects(seconds)
    if run.is_main:
        report = {
            name: {
                "cpu_seconds": sum(
                    statistics.median(cpu for cpu, _ in of_rank[name][1:]) for of_rank in told
                ),
                "seconds": statistics.median(wall for _, wall in seconds[name][1:]),
            }
            for name in kinds
        }
        sys.stdout.write(json.dumps(report) + "\n")
    engine.close()


if __name__ == "__main__":
    main()
