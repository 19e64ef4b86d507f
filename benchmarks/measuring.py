"""What benchmarks share: measuring in processes of their own, memory, and keeping results."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(
    str(Path(__file__).parents[1] / "tests" / "reference")
)  # slow oracles to compare with


def measured(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a measuring process says, in JSON on its standard output."""
    done = subprocess.run(
        command, env=os.environ | (environment or {}), check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def memory_in_mib(device: str, *, peak: bool) -> float:
    """Memory of this process, or of its tensors on the GPU: now, or the most there ever was."""
    if device == "cuda":
        import torch

        if peak:
            return torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def fastest(action: Callable[[], object], *, repeats: int, device: str) -> float:
    """Seconds of the fastest call, after a first one that chooses kernels."""
    import torch

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def cloudy_pictures(count: int, size: int, generator: Any) -> Any:
    """(N, 3, S, S) uint8 with large and small structures, some busier than others."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    pictures = torch.zeros(count, 3, size, size)
    for cells in (2, 4, 8, 16, 32, 64, size):
        busy = torch.rand(count, 1, 1, 1, generator=generator)
        field = torch.randn(count, 3, cells, cells, generator=generator)
        field = field + torch.randn(count, 1, cells, cells, generator=generator)
        smooth = F.interpolate(field, size=size, mode="bilinear", align_corners=False)
        pictures += smooth * cells ** (-0.3 - busy)
    pictures = pictures / pictures.std(dim=(1, 2, 3), keepdim=True)
    return (128 + 50 * pictures).clamp(0, 255).to(torch.uint8)


def read_step_options(
    description: str | None,
    *,
    batch: int,
    depth: int,
    layers: str,
    settings: Sequence[str],
    name: str,
) -> argparse.Namespace:
    """The command line of a benchmark of whole training steps, each setting in its own process.

    Args:
        description: docstring of the benchmark.
        batch: pairs of a step by default.
        depth: layers by default.
        layers: what ``--depth`` counts.
        settings: what is measured, by name.
        name: of the file with the results.
    """
    out = Path("runs/benchmarks") / f"{name}.json"
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=batch, help="pairs of one step")
    parser.add_argument("--depth", type=int, default=depth, help=layers)
    parser.add_argument("--steps", type=int, default=2, help="of which the fastest counts")
    parser.add_argument("--precision", default="float32", help="of the products: float32, bfloat16")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default what there is")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--measure", choices=settings, help=argparse.SUPPRESS)
    return parser.parse_args()


def place(device: str) -> str:
    """What a number was measured on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"


def write(out: Path, report: dict[str, Any]) -> None:
    """Keep a report as JSON, and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {out}")
