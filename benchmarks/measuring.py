"""What benchmarks share: measuring in processes of their own, memory, and keeping results."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any


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


def place(device: str) -> str:
    """What a number was measured on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"


def write(out: Path, report: dict[str, Any]) -> None:
    """Keep a report as JSON, and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {out}")
