"""Peak memory and time of the contrastive loss, against open_clip's, at 1,024 of 32,768 pairs.

    python benchmarks/loss.py

One process stands for all: every process is taken to hold the same samples, so that gathering
means repeating the local rows, and the sum of the gradients that the processes send back means
adding up the parts of one's own. Both losses then see the sizes, the arithmetic and the numbers
of a real run, and must agree in value and gradient. Peak memory is everything above the local
features, gathered columns included: of a fresh process (CPU) or of the allocator (CUDA).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import measured, memory_in_mib, place, write

MOST_MEMORY = 1 / 8
"""Of what open_clip's loss takes."""
LOSSES = ("frugal", "open_clip")


def main() -> None:
    """Measure both losses in processes of their own, and compare."""
    options = read_options()
    if options.measure:
        sys.stdout.write(json.dumps(measure(options)))
        return
    rows = {name: measure_apart(options, name) for name in LOSSES}
    ours, theirs = (rows[name] for name in LOSSES)
    report = {
        "local_batch": options.batch,
        "processes": options.world,
        "width": options.width,
        "device": ours["device"],
        "losses": rows,
        "memory_ratio": ours["peak_mib"] / theirs["peak_mib"],
        "memory_limit": MOST_MEMORY,
        "time_ratio": ours["seconds"] / theirs["seconds"],
        "loss_difference": abs(ours["loss"] - theirs["loss"]),
        "gradient_difference": abs(ours["gradient"] / theirs["gradient"] - 1),
    }
    print_table(options, report)
    write(options.out, report)
    if report["memory_ratio"] > MOST_MEMORY or report["loss_difference"] > 1e-4:
        sys.exit("the chunked loss misses its limit")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=1024, help="pairs of one process")
    parser.add_argument("--world", type=int, default=32, help="processes")
    parser.add_argument("--width", type=int, default=512, help="of the features")
    parser.add_argument("--chunk", type=int, default=None, help="columns at a time")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default what there is")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/loss.json"))
    parser.add_argument("--measure", choices=LOSSES, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The numbers of one loss, time and memory each from a process that has done nothing else."""
    words = [f"--{key}={value}" for key, value in vars(options).items() if value is not None]
    command = [sys.executable, __file__, *words, f"--measure={name}"]
    # freed blocks go back to the system at once: the peak is that of live tensors, the time is not
    tidy_malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    timed = measured([*command, f"--repeats={options.repeats}"])
    return measured([*command, "--repeats=1"], tidy_malloc) | {"seconds": timed["seconds"]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of the first call, seconds of the fastest one, and what it gave."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loss_of = {"frugal": frugal_loss, "open_clip": open_clip_loss}[options.measure](options)

    def features(rows: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, rows, options.width, generator=generator)
        images, texts = F.normalize(drawn, dim=2).to(device)
        scale = torch.tensor([2.6592], device=device)
        return [value.requires_grad_() for value in (images, texts, scale)]

    def run(values: list[torch.Tensor]) -> tuple[float, float]:
        start = time.perf_counter()
        loss = loss_of(*values)
        loss.backward()
        value = loss.item()  # waits for the device
        return time.perf_counter() - start, value

    run(features(2))  # libraries are loaded, kernels are chosen
    values = features(options.batch)
    before = memory_in_mib(device, peak=False)
    seconds, loss = run(values)
    peak = memory_in_mib(device, peak=True) - before
    gradient = sum(
        value.grad.double().square().sum().item() for value in values if value.grad is not None
    )
    for _ in range(options.repeats - 1):
        seconds = min(seconds, run(values)[0])
    return {
        "device": place(device), "peak_mib": peak, "seconds": seconds, "loss": loss,
        "gradient": gradient,
    }  # fmt: skip


def frugal_loss(options: argparse.Namespace) -> Callable[..., Any]:
    """Our loss, on as many processes as there are said to be."""
    from frugal.common.objectives import contrastive_loss as module

    def repeated(local: Any, group: Any = None) -> Any:
        return local.detach().repeat(options.world, *[1] * (local.ndim - 1))

    module.gather = repeated
    module.place_in_world = lambda group=None: (0, options.world)

    def loss(images: Any, texts: Any, log_scale: Any) -> Any:
        return module.contrastive_loss(images, texts, log_scale, chunk=options.chunk).loss

    return loss


def open_clip_loss(options: argparse.Namespace) -> Callable[..., Any]:
    """open_clip's, in its leanest setting: local rows, gathered columns that carry gradients."""
    import torch
    from open_clip import loss as module

    class Repeat(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, local: Any) -> Any:
            return local.repeat(options.world, 1)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient.view(options.world, -1, gradient.shape[1]).sum(0)

    def gather_features(images: Any, texts: Any, **_: Any) -> Any:
        return Repeat.apply(images), Repeat.apply(texts)

    module.gather_features = gather_features
    clip_loss = module.ClipLoss(
        local_loss=True, gather_with_grad=True, rank=0, world_size=options.world
    )
    return lambda images, texts, log_scale: clip_loss(images, texts, log_scale.exp())


def print_table(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """What was measured, for people."""
    print(
        f"contrastive loss, forward and backward: {options.batch} of "
        f"{options.batch * options.world} pairs, width {options.width}, {report['device']}"
    )
    print(f"{'':12}{'peak MiB':>12}{'seconds':>12}{'loss':>14}")
    for name, row in report["losses"].items():
        print(f"{name:12}{row['peak_mib']:12.1f}{row['seconds']:12.3f}{row['loss']:14.6f}")
    memory, seconds = report["memory_ratio"], report["time_ratio"]
    print(f"memory 1/{1 / memory:.1f} (limit 1/{1 / MOST_MEMORY:.0f}), time x {seconds:.2f}")


if __name__ == "__main__":
    main()
