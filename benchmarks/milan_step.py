"""Samples/s and memory of MILAN's pretraining step against the same step the plain way.

    python benchmarks/milan_step.py

ViT-B/16 with the published prompting decoder, three quarters of the patches hidden, on random
pixels; CLIP's ViT-B/16 as teacher. Student (sampling, forward, loss, backward, AdamW) and teacher
(features and the attention of the class token) are measured apart, each in a process of its own.
The plain way is that of the published code: every patch embedded, tokens put back in the order of
the image in every block of the decoder, whole attention matrices, normalized copies in the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from measuring import fastest, measured, memory_in_mib, place, read_step_options, write

MOST_MEMORY = 0.8
"""Of the student's step, as a share of the plain one's."""
SETTINGS = ("student-fast", "student-plain", "teacher-fast", "teacher-plain")
FEATURES = 512


def main() -> None:
    """Measure every setting, compare, and fail where a limit is missed."""
    options = read_step_options(
        __doc__,
        batch=64,
        depth=12,
        layers="of encoder and teacher; the decoder has two thirds as many",
        settings=SETTINGS,
        name="milan_step",
    )
    if options.measure:
        sys.stdout.write(json.dumps(measure(options)))
        return
    words = [f"--{key}={value}" for key, value in vars(options).items() if value is not None]
    rows: dict[str, dict[str, Any]] = {}
    for name in SETTINGS:
        rows[name] = measured([sys.executable, __file__, *words, f"--measure={name}"])
        print(
            f"{name:16}{rows[name]['samples_per_second']:10.2f} samples/s"
            f"{rows[name]['peak_mib']:10.0f} MiB"
        )
    report: dict[str, Any] = {
        "device": rows[SETTINGS[0]]["device"],
        "batch": options.batch,
        "depth": options.depth,
        "precision": options.precision,
        "settings": rows,
    }
    for part in ("student", "teacher"):
        fast, plain = rows[f"{part}-fast"], rows[f"{part}-plain"]
        report[f"{part}_speed_ratio"] = fast["samples_per_second"] / plain["samples_per_second"]
        report[f"{part}_memory_ratio"] = fast["peak_mib"] / plain["peak_mib"]
        print(
            f"{part}: {report[f'{part}_speed_ratio']:.2f}x the samples/s of the plain way at "
            f"{report[f'{part}_memory_ratio']:.2f}x the memory"
        )
    seconds = {name: 1 / row["samples_per_second"] for name, row in rows.items()}
    both = {way: seconds[f"student-{way}"] + seconds[f"teacher-{way}"] for way in ("fast", "plain")}
    report["speed_ratio"] = both["plain"] / both["fast"]
    report["teacher_share"] = seconds["teacher-fast"] / both["fast"]
    write(options.out, report)
    print(
        f"both: {report['speed_ratio']:.2f}x; the teacher takes {report['teacher_share']:.0%} of "
        f"the fast step; the student's memory may be {MOST_MEMORY} of the plain way's"
    )
    if report["student_memory_ratio"] > MOST_MEMORY:
        sys.exit("the student's step misses a limit")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Samples/s of the fastest step, and the memory above that of the loaded libraries."""
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    part, _, way = options.measure.partition("-")
    build = {"student": student_step, "teacher": teacher_step}[part]
    before = memory_in_mib(options.device, peak=False)
    step = build(options, is_fast=way == "fast")
    seconds = fastest(step, repeats=options.steps, device=options.device)
    return {
        "samples_per_second": options.batch / seconds,
        "peak_mib": memory_in_mib(options.device, peak=True) - before,
        "device": place(options.device),
    }


def random_images(options: argparse.Namespace) -> Any:
    """Pixels (B, 3, 224, 224) uint8."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, 3, 224, 224)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(options.device)


def products_in(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Autocast as the engines have it."""
    import torch

    dtype = getattr(torch, options.precision)
    return torch.autocast(options.device, dtype, enabled=dtype != torch.float32)


def student_step(options: argparse.Namespace, *, is_fast: bool) -> Callable[[], None]:
    """One step of ``vit-b16`` on a target that is there already."""
    import reference_milan as readable
    import torch

    from frugal.common.contracts import Batch
    from frugal.common.optim.optimizers import AdamW
    from frugal.common.recipe import model_of
    from frugal.milan.decoders import Split
    from frugal.milan.model import MaskedModel
    from frugal.milan.objective import Reconstruction
    from frugal.milan.recipes import vit_b16
    from frugal.milan.targets import FeatureTarget, TargetValues

    recipe = vit_b16()
    assert isinstance(recipe.optimizer, AdamW)
    config = model_of(MaskedModel, recipe.model)
    config = replace(
        config,
        image=replace(config.image, depth=options.depth),
        decoder=replace(config.decoder, depth=max(2 * options.depth // 3, 1)),
    )
    patches, device = config.image.num_patches, options.device
    target = TargetValues(
        torch.randn(options.batch, 1 + patches, FEATURES, device=device),
        torch.rand(options.batch, patches, device=device),
    )

    class Ready(FeatureTarget):
        """A target that is there already."""

        def __init__(self) -> None:
            self.outputs = FEATURES

        def of(self, images: torch.Tensor) -> TargetValues:
            return target

    model = config.build(outputs=FEATURES).to(device)
    objective = Reconstruction(model, Ready(), reduction=recipe.reduction.image, seed=0)
    optimizer = recipe.optimizer.build(objective)
    batch = Batch(
        images=random_images(options),
        sample_numbers=torch.arange(options.batch, device=device),
        valid=torch.ones(options.batch, dtype=torch.bool, device=device),
    )

    def plain_loss() -> torch.Tensor:
        view, noise = objective.patch_view(batch)
        kept = objective.reduction.keep(view, noise=noise)
        assert kept is not None
        split = Split.of(kept, patches)
        return readable.feature_loss(readable.predict(model, batch.images, split), target.values)

    def step() -> None:
        with products_in(options):
            loss = objective(batch)[0] if is_fast else plain_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() > 0

    return step


def teacher_step(options: argparse.Namespace, *, is_fast: bool) -> Callable[[], None]:
    """A batch through CLIP's ViT-B/16."""
    import reference_milan as readable
    import torch

    from frugal.common.models.image_encoder import ImageEncoder
    from frugal.common.models.named import clip_encoder
    from frugal.common.models.vit import ImageTransformer
    from frugal.milan.teacher import FrozenTeacher

    tower = replace(clip_encoder("B/16", quick_gelu=True).image, depth=options.depth)
    state = ImageTransformer(tower, FEATURES).state_dict()
    teacher = FrozenTeacher(
        ImageEncoder(tower, state, "drawn"), pixels_mean=tower.mean, pixels_std=tower.std
    )
    teacher.tower.to(options.device)
    images = random_images(options)

    def step() -> None:
        with products_in(options), torch.no_grad():
            if is_fast:
                _, importance = teacher(images)
            else:
                _, attention = readable.teach(teacher.tower, images)
                importance = attention[:, 0, 1:]
        assert importance.shape == (options.batch, tower.num_patches)

    return step


if __name__ == "__main__":
    main()
