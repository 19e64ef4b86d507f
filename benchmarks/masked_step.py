"""Samples/s and memory of a whole training step at several mask ratios.

    python benchmarks/masked_step.py

Towers of FLIP's L/16 at reduced depth (image to text layers as 2 to 1, as published), 32 text
tokens, forward, backward and AdamW on random pixels and captions, each setting in a process of its
own, whose memory is its own then. ``train_step.py`` compares with open_clip.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import fastest, measured, memory_in_mib, place, read_step_options, write

LEAST_SPEED, MOST_MEMORY = 3.0, 0.45
"""Of a step at 75 %, as shares of one at 0 %."""
SETTINGS = ("0", "0.5", "0.75")


def main() -> None:
    """Measure every setting, compare, and fail where a limit is missed."""
    options = read_step_options(
        __doc__,
        batch=128,
        depth=2,
        layers="of the text tower; the image tower has twice as many",
        settings=SETTINGS,
        name="masked_step",
    )
    if options.measure:
        sys.stdout.write(json.dumps(measure(options)))
        return
    words = [f"--{key}={value}" for key, value in vars(options).items() if value is not None]
    rows: dict[str, dict[str, Any]] = {}
    for name in SETTINGS:
        rows[name] = measured([sys.executable, __file__, *words, f"--measure={name}"])
        whole, row = rows["0"], rows[name]
        print(
            f"{name:16}{row['samples_per_second']:10.2f} samples/s{row['peak_mib']:10.0f} MiB"
            f"{row['samples_per_second'] / whole['samples_per_second']:8.2f}x"
            f"{row['peak_mib'] / whole['peak_mib']:8.2f}x"
        )
    most, least = rows["0.75"], rows["0"]
    report = {
        "device": least["device"],
        "batch": options.batch,
        "depth": options.depth,
        "settings": rows,
        "speed_ratio": most["samples_per_second"] / least["samples_per_second"],
        "memory_ratio": most["peak_mib"] / least["peak_mib"],
    }
    write(options.out, report)
    print(
        f"75 % against 0 %: {report['speed_ratio']:.2f}x the samples/s (at least {LEAST_SPEED}), "
        f"{report['memory_ratio']:.2f}x the memory (at most {MOST_MEMORY})"
    )
    if report["speed_ratio"] < LEAST_SPEED or report["memory_ratio"] > MOST_MEMORY:
        sys.exit("the masked step misses a limit")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Samples/s of the fastest step, and the memory above that of the loaded libraries."""
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = memory_in_mib(options.device, peak=False)
    step = training_step(options, float(options.measure))

    def checked_step() -> None:
        assert step() > 0

    seconds = fastest(checked_step, repeats=options.steps, device=options.device)
    return {
        "samples_per_second": options.batch / seconds,
        "peak_mib": memory_in_mib(options.device, peak=True) - before,
        "device": place(options.device),
    }


def random_batch(options: argparse.Namespace) -> tuple[Any, Any]:
    """Pixels (B, 3, 224, 224) uint8 and full captions (B, 32)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, 3, 224, 224)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    token_ids = torch.randint(1, 30522, (options.batch, 32), generator=generator)
    return images.to(options.device), token_ids.to(options.device)


def training_step(options: argparse.Namespace, mask_ratio: float) -> Callable[[], float]:
    """One step of FLIP's large recipe at reduced depth."""
    import torch

    from frugal.common.contracts import Batch
    from frugal.common.engine.accelerate import AccelerateEngine
    from frugal.common.models.clip import DualEncoderConfig
    from frugal.common.recipe import EngineOptions, Reductions, model_of
    from frugal.common.reduction.random_masking import RandomMasking
    from frugal.common.run import Run, make_logger
    from frugal.flip.recipes import large

    recipe = large()
    model = model_of(DualEncoderConfig, recipe.model)
    model = replace(
        model,
        image=replace(model.image, depth=2 * options.depth),
        text=replace(model.text, depth=options.depth),
    )
    reduction = Reductions(image=RandomMasking(mask_ratio=mask_ratio), text=recipe.reduction.text)
    recipe = replace(
        recipe,
        model=model,
        reduction=reduction,
        batch_size=options.batch,
        engine=EngineOptions(device=options.device, precision=options.precision),
    )
    run = Run(Path("runs/benchmarks"), 0, 1, 0, torch.device(options.device), make_logger(0))
    engine = AccelerateEngine(recipe.objective.build(recipe), recipe, run)
    images, token_ids = random_batch(options)
    batch = Batch(
        images=images,
        token_ids=token_ids,
        text_lengths=torch.full((options.batch,), 32, device=options.device),
        sample_numbers=torch.arange(options.batch, device=options.device),
        valid=torch.ones(options.batch, dtype=torch.bool, device=options.device),
    )

    def step() -> float:
        loss, _ = engine.forward(batch)
        engine.backward(loss)
        engine.step(1e-4)
        return loss.item()

    return step


if __name__ == "__main__":
    main()
