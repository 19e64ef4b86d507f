"""Samples/s of a training step with clusters masked, against random masking and 137 tokens always.

    python benchmarks/cluster_masking.py

The vit-b16-cc12m recipe at reduced depth, forward, backward and AdamW on cloudy pictures and
captions of 10 to 40 tokens, each in a process of its own. "cluster" runs the visible patches
of every image packed, at the threshold that masks half of these pictures. "random" keeps the same
number of patches of every image, on average as many. "filled" fills every image up to 137 patches
and is otherwise computed like these. "reference" does so as the published code does: it embeds all
196 patches first, hands a mask of every head to attention, and computes every token of the last
block. "pgs" grows clusters around patches on no edge. Text is the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    cloudy_pictures,
    fastest,
    measured,
    memory_in_mib,
    place,
    read_step_options,
    write,
)

from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.pgs import PgsMasking
from frugal.common.contracts import Batch
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.randomness import NoiseSource, SampleNoise
from frugal.common.recipe import model_of
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.random_masking import RandomMasking

if TYPE_CHECKING:
    import torch

    from frugal.common.models.vit import ImageTransformer
    from frugal.common.recipe import Recipe

MOST_OF_RANDOM, LEAST_FASTER, MOST_CHOOSING = 1.1, 1.4, 0.03
"""Time of a clustered step by that of a random one; of a reference step by that of a clustered
one; share of the clustered step in which the mask is chosen."""
SETTINGS = ("cluster", "random", "filled", "reference", "pgs")
TARGET = 0.5


def main() -> None:
    """Measure every layout, compare, and fail where a limit is missed."""
    options = read_step_options(
        __doc__,
        batch=64,
        depth=3,
        layers="of each tower",
        settings=SETTINGS,
        name="cluster_masking",
    )
    if options.measure:
        sys.stdout.write(json.dumps(measure(options)))
        return
    words = [f"--{key}={value}" for key, value in vars(options).items() if value is not None]
    rows: dict[str, dict[str, Any]] = {}
    for name in SETTINGS:
        rows[name] = measured([sys.executable, __file__, *words, f"--measure={name}"])
        row = rows[name]
        print(
            f"{name:12}{row['seconds']:9.3f} s a step{row['samples_per_second']:10.2f} samples/s"
            f"{row['mask_ratio']:8.1%} masked{row['image_tokens']:8.1f} tokens"
            f"{row['peak_mib']:9.0f} MiB{row['choosing']:9.2%} choosing"
        )
    cluster, random, filled, reference, pgs = (rows[name] for name in SETTINGS)
    report = {
        "device": cluster["device"],
        "batch": options.batch,
        "depth": options.depth,
        "precision": options.precision,
        "settings": rows,
        "time_to_random": cluster["seconds"] / random["seconds"],
        "reference_to_cluster": reference["seconds"] / cluster["seconds"],
        "filled_to_cluster": filled["seconds"] / cluster["seconds"],
        "choosing": cluster["choosing"],
        "choosing_pgs": pgs["choosing"],
    }
    write(options.out, report)
    print(
        f"a clustered step takes {report['time_to_random']:.2f}x a random one (at most "
        f"{MOST_OF_RANDOM}), is {report['reference_to_cluster']:.2f}x as fast as the reference "
        f"layout (at least {LEAST_FASTER}; {report['filled_to_cluster']:.2f}x as fast as the same "
        f"computed our way) and spends {report['choosing']:.2%} on the mask, "
        f"with patches on no edge {report['choosing_pgs']:.2%} (at most {MOST_CHOOSING:.0%})"
    )
    if (
        report["time_to_random"] > MOST_OF_RANDOM
        or report["reference_to_cluster"] < LEAST_FASTER
        or max(report["choosing"], report["choosing_pgs"]) > MOST_CHOOSING
    ):
        sys.exit("cluster masking misses a limit")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The fastest step, what it saw, and the time in it that chooses the mask."""
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = memory_in_mib(options.device, peak=False)
    batch = cloudy_batch(options)
    recipe = small_recipe(options, batch)
    step, metrics, choose = training_step(options, recipe, batch)
    seconds, choosing = (
        fastest(action, repeats=options.steps, device=options.device) for action in (step, choose)
    )
    return {
        "seconds": seconds,
        "samples_per_second": options.batch / seconds,
        "choosing": choosing / seconds,
        **metrics,
        "peak_mib": memory_in_mib(options.device, peak=True) - before,
        "device": place(options.device),
    }


def cloudy_batch(options: argparse.Namespace) -> Batch:
    """Cloudy pictures and captions."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = cloudy_pictures(options.batch, 224, generator)
    numbers = torch.arange(options.batch)
    batch = Batch(
        images=images,
        token_ids=torch.randint(1, 49407, (options.batch, 77), generator=generator),
        text_lengths=torch.randint(10, 41, (options.batch,), generator=generator),
        sample_numbers=numbers,
        valid=torch.ones_like(numbers, dtype=torch.bool),
    )
    return batch.to(options.device)


@dataclass(frozen=True, kw_only=True)
class FilledUp(ImageReduction):
    """The published layout: visible patches, and masked ones until there are equally many."""

    clusters: ClusterMasking

    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches:
        """Dense, (B, K), with K the most that an image may keep: some image of a batch does."""
        mask = self.clusters.mask(view, noise=noise)
        return KeptPatches.dense(mask.order[:, : mask.most_kept])


def small_recipe(options: argparse.Namespace, batch: Batch) -> Recipe:
    """The published recipe at reduced depth with the reduction that is measured."""
    from frugal.cluster_masking.recipes import vit_b16_cc12m
    from frugal.common.recipe import EngineOptions, Reductions

    recipe = vit_b16_cc12m()
    model = model_of(DualEncoderConfig, recipe.model)
    model = replace(
        model,
        image=replace(model.image, depth=options.depth),
        text=replace(model.text, depth=options.depth),
    )
    view, noise = PatchView.of(batch.images, model.image), SampleNoise(0, batch.sample_numbers)
    clusters = ClusterMasking(target_mask_ratio=TARGET).calibrate(
        [(view, noise)], gather=lambda value: [value], log=logging.getLogger(__name__)
    )
    ratio = clusters.mask(view, noise=noise).mask_ratio.mean().item()
    reductions: dict[str, Any] = {
        "cluster": clusters,
        "random": RandomMasking(mask_ratio=ratio),
        "filled": FilledUp(clusters=clusters),
        "reference": FilledUp(clusters=clusters),
        "pgs": PgsMasking(threshold=clusters.threshold, min_mask_ratio=clusters.min_mask_ratio),
    }
    return replace(
        recipe,
        model=model,
        reduction=Reductions(image=reductions[options.measure], text=recipe.reduction.text),
        batch_size=options.batch,
        engine=EngineOptions(device=options.device, precision=options.precision),
    )


def published_tower(tower: ImageTransformer) -> Any:
    """The tower computed as in the published code, whatever its attention mask holds."""
    from reference_cluster_masking import published_bias, tower_with_bias
    from torch import nn

    class PublishedTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, images: torch.Tensor, kept: KeptPatches) -> torch.Tensor:
            hits = kept.index.new_zeros(len(images), 1 + kept.index.shape[1])
            bias = published_bias(hits, tower.config.heads)
            return tower_with_bias(tower, images, kept.index, bias)

    return PublishedTower()


def training_step(
    options: argparse.Namespace, recipe: Recipe, batch: Batch
) -> tuple[Callable[[], object], dict[str, float], Callable[[], object]]:
    """A whole step, what it reports, and the part of it that chooses the mask."""
    import torch

    from frugal.common.engine.accelerate import AccelerateEngine
    from frugal.common.run import Run, make_logger

    run = Run(Path("runs/benchmarks"), 0, 1, 0, torch.device(options.device), make_logger(0))
    objective: Any = recipe.objective.build(recipe)
    if options.measure == "reference":
        objective.model.image = published_tower(objective.model.image)
    engine = AccelerateEngine(objective, recipe, run)
    metrics: dict[str, float] = {}

    def step() -> None:
        loss, reported = engine.forward(batch)
        engine.backward(loss)
        engine.step(1e-4)
        for name in ("mask_ratio", "image_tokens"):
            metrics[name] = reported[name].item()

    def choose() -> torch.Tensor:
        view = PatchView.of(batch.images, model_of(DualEncoderConfig, recipe.model).image)
        noise = SampleNoise(0, batch.sample_numbers)
        kept = recipe.reduction.image.keep(view, noise=noise)
        assert kept is not None
        return kept.index

    return step, metrics, choose


if __name__ == "__main__":
    main()
