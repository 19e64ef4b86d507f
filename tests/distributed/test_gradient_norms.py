"""One gradient, however a step is cut up: into micro-batches, chunks and processes.

Some samples are damaged, more of them in one micro-batch and on one process than in others. The
reference is plain autograd in float64 in a process of its own. Run as a script this file is one of
the processes.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from frugal.cit.objective import LockedContrastive
from frugal.common.contracts import Batch
from frugal.common.engine.metrics import fetch
from frugal.common.engine.step import train_step
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.ports import free_port
from frugal.common.recipe import EngineOptions, Recipe
from frugal.common.reduction.image import KeepAll
from frugal.common.run import Run, make_logger
from frugal.common.train import make_engine
from frugal.common.transfer.photometric import PhotometricDistortion
from frugal.flip.recipes import demo
from frugal.milan.recipes import demo_pixels
from frugal.milan.segmentation_recipes import SEGMENTATION
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING
from support import ROOT, start_ranks

GLOBAL, LENGTH, CLASSES = 24, 6, 5
IMAGE = ImageTower(
    width=16, depth=1, heads=2, mlp_width=32, patch_size=8, image_size=32, norm_epsilon=1e-3
)
TEXT = TextTower(width=16, depth=1, heads=2, mlp_width=32, vocabulary=30, length=LENGTH)
VALID = torch.ones(GLOBAL, dtype=torch.bool)
VALID[[1, 2, 3, 5, 6, 7, 8, 20]] = False
"""Of the two micro-batches, and of the two processes in each, none has as many as another."""
CUTS = {
    "whole": EngineOptions(),
    "cached": EngineOptions(cache_chunk=4),
    "accumulated": EngineOptions(accumulate=2),
    "both": EngineOptions(accumulate=2, cache_chunk=4),
}
STAGES = (None, 0, 1, 2, 3)
"""Of ZeRO; None is Accelerate."""


def contrastive(engine: EngineOptions) -> Recipe:
    recipe = demo()
    model = replace(recipe.model, image=IMAGE, text=TEXT, embed_dim=8)
    return cut(replace(recipe, model=model), engine)


def cut(recipe: Recipe, engine: EngineOptions) -> Recipe:
    engine = replace(engine, precision="float32", device="cpu", threads=1)
    return replace(
        recipe,
        engine=engine,
        batch_size=GLOBAL,
        # the norm that is compared is the one before clipping, which must not hide a factor
        optimizer=replace(recipe.optimizer, clip_norm=0.5),
    )


def others(engine: EngineOptions) -> dict[str, Recipe]:
    """The objectives whose losses compare no samples, and CiT's."""
    classifier = replace(IMAGE, positions="learned")
    segmenting = SEGMENTATION["demo"]()
    undistorted = PhotometricDistortion(probability=0)
    locked = LockedContrastive(train_image="all", train_text="all")
    recipes = {
        "cit": replace(contrastive(engine), objective=locked),
        "pixels": replace(
            demo_pixels(), model=replace(demo_pixels().model, image=replace(IMAGE, width=32))
        ),
        "classes": replace(
            FINE_TUNING["demo"](),
            model=replace(FINE_TUNING["demo"]().model, image=classifier, num_classes=CLASSES),
        ),
        "probe": replace(
            LINEAR_PROBING["demo"](),
            model=replace(LINEAR_PROBING["demo"]().model, image=classifier, num_classes=CLASSES),
            reduction=replace(LINEAR_PROBING["demo"]().reduction, image=KeepAll()),
        ),
        "segments": replace(
            segmenting,
            model=replace(
                segmenting.model,
                image=replace(classifier, depth=4),
                taps=(1, 2, 3, 4), num_classes=CLASSES, width=8, auxiliary_width=8, dropout=0.0,
            ),
            objective=replace(segmenting.objective, distortion=undistorted),
        ),
    }  # fmt: skip
    return {name: cut(recipe, engine) for name, recipe in recipes.items()}


def batch_for(name: str) -> Batch:
    """A global batch; what stands in damaged samples would be noticed."""
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randint, generator=generator)
    labels = draw(CLASSES, (GLOBAL,))
    if name == "segments":
        labels = draw(CLASSES, (GLOBAL, 32, 32)).to(torch.uint8)
        for row in range(GLOBAL):  # every picture has another number of pixels with a class
            labels[row, : row + 1] = 255
    images = draw(256, (GLOBAL, 3, 32, 32)).to(torch.uint8)
    return Batch(
        images=images,
        sample_numbers=torch.arange(GLOBAL),
        valid=VALID,
        token_ids=draw(1, 30, (GLOBAL, LENGTH)),
        text_lengths=torch.full((GLOBAL,), LENGTH),
        labels=labels,
        damage={"image": int((~VALID).sum())},
    )


def micro_batches(name: str, recipe: Recipe, rank: int, world: int) -> list[Batch]:
    """What one process reads for one step."""
    local = recipe.local_batch(world)
    found = []
    for number in range(recipe.engine.accumulate):
        start = (number * world + rank) * local
        batch = batch_for(name).rows(start, start + local)
        damaged = int((~batch.valid).sum())
        found.append(replace(batch, damage={"image": damaged} if damaged else {}))
    return found


def norm_and_loss(name: str, recipe: Recipe, run: Run) -> tuple[float, float]:
    """Of the first step, as the training loop takes it."""
    engine = make_engine(recipe.objective.build(recipe), recipe, run)
    batches = micro_batches(name, recipe, run.rank, run.world_size)
    values = fetch([train_step(engine, recipe, 0, batches)], engine.mean)[0]
    return values["gradient_norm"], values["loss"]


def run_rank(rank: int, folder: Path, world: int, port: str) -> None:
    if world > 1:  # what torchrun tells its processes
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
    run = Run(folder, rank, world, rank, torch.device("cpu"), make_logger(rank))
    results: dict[tuple, Any] = {}
    for stage in STAGES if world > 1 else STAGES[:1]:
        file = None if stage is None else ROOT / "ds_configs" / f"zero{stage}.json"
        for name, options in CUTS.items():
            recipe = contrastive(replace(options, deepspeed_config=file))
            results[world, stage, name] = norm_and_loss("contrastive", recipe, run)
    for name, recipe in others(CUTS["accumulated"]).items():
        results[world, name] = norm_and_loss(name, recipe, run)
    if rank == 0:
        torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Any]:
    results: dict[tuple, Any] = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp("norms")
        processes = start_ranks(__file__, world, folder, world, free_port())
        assert processes.wait(timeout=300) == 0, (folder / "log").read_text()[-6000:]
        results |= torch.load(folder / "results.pt")
    return results


def reference(name: str, recipe: Recipe) -> tuple[float, float]:
    """The norm and the loss by autograd in float64, of everything at once."""
    objective = recipe.objective.build(recipe)
    if name != "probe":  # whose batch norm is float32 whatever it is given
        objective = objective.double()
    batch = batch_for(name)
    half = GLOBAL // recipe.engine.accumulate
    parts = [batch.rows(start, start + half) for start in range(0, GLOBAL, half)]
    if name in ("classes", "pixels"):
        parts = [batch]  # samples that nothing is compared with: one batch of all
    wholes = [only_valid(part) for part in parts]
    counts = [count(name, part) for part in wholes]
    losses = [objective(part)[0] for part in wholes]
    loss: Any = sum(loss * number for loss, number in zip(losses, counts, strict=True))
    loss = loss / sum(counts)
    loss.backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()), loss.item()


def only_valid(batch: Batch) -> Batch:
    def rows(tensor: Tensor) -> Tensor:
        return tensor[batch.valid]

    names = ("images", "sample_numbers", "token_ids", "text_lengths", "labels")
    return Batch(**{name: rows(getattr(batch, name)) for name in names}, valid=rows(batch.valid))


def count(name: str, batch: Batch) -> int:
    return int((batch.labels != 255).sum()) if name == "segments" else len(batch)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("world", "stage"), [(1, None), *((2, stage) for stage in STAGES)],
    ids=["one process", "two under DDP", *(f"two at ZeRO-{stage}" for stage in STAGES[1:])],
)  # fmt: skip
def test_the_norm_is_that_of_the_valid_samples(
    found: dict[tuple, Any], world: int, stage: int | None, cut: str
) -> None:
    expected = reference("contrastive", contrastive(CUTS[cut]))
    assert found[world, stage, cut] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", list(others(CUTS["accumulated"])))
def test_micro_batches_count_by_what_is_valid_in_them(
    found: dict[tuple, Any], world: int, name: str
) -> None:
    expected = reference(name, others(CUTS["accumulated"])[name])
    assert found[world, name] == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
