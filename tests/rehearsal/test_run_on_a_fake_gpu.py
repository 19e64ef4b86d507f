"""The training loop and evaluations on a GPU that is none; see ``fake_cuda``.

Where a fake GPU cannot go: checkpoints, and what evaluations count, which are numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from fake_cuda import CUDA, FakeCuda, fake_cuda
from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.cli import read_command_line
from frugal.common.contracts import Batch, Objective
from frugal.common.distributed import Ranks
from frugal.common.engine.accelerate import AccelerateEngine
from frugal.common.engine.evaluator import Evaluator
from frugal.common.engine.logger import MetricsLogger
from frugal.common.engine.loop import train
from frugal.common.engine.saving import WeightAverage
from frugal.common.engine.training import Training
from frugal.common.engine.watchdog import Watchdog
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder, text_table
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.recipe import Recipe
from frugal.common.run import Run, make_logger
from frugal.common.weights.runs import bundle_of
from frugal.flip.recipes import RECIPES
from host_reads import WatchedStream
from support import TINY

pytestmark = pytest.mark.slow

LOG_EVERY, STEPS = 2, 4
WORDS = (
    "demo", *TINY, "--engine.precision=bfloat16", f"--schedule.samples={24 * STEPS}",
    f"--run.log-every={LOG_EVERY}", "--engine.ema-decay=0.9",
)  # fmt: skip


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """Accelerate keeps the first device that a process asks it for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with fake_cuda() as opened:
        yield opened
    AcceleratorState._reset_state(reset_partial_state=True)


def batches(gpu: FakeCuda, *, pinned: bool) -> list[Batch]:
    """What a loader hands over."""

    def loaded(value: Tensor) -> Tensor:
        tensor = gpu.mode.from_tensor(value)
        if pinned:
            gpu.pinned[tensor] = True
        return tensor

    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        images=loaded(torch.randint(0, 256, (24, 3, 32, 32), generator=generator).byte()),
        sample_numbers=loaded(torch.arange(24)),
        valid=loaded(torch.ones(24, dtype=torch.bool)),
        token_ids=loaded(torch.randint(1, 60, (24, 24), generator=generator)),
        text_lengths=loaded(torch.randint(1, 25, (24,), generator=generator)),
    )
    return [batch] * STEPS


def training_of(
    recipe: Recipe, objective: Objective, tmp_path: Path, gpu: FakeCuda, *, pinned: bool
) -> Training:
    """Everything the loop needs; nothing is saved."""
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", 0, 1, 0, CUDA, make_logger(0))
    engine = AccelerateEngine(gpu.put_module(objective), recipe, run)
    logger = MetricsLogger(run, first_step=0, steps=recipe.steps)
    average = WeightAverage(engine, 0.9)
    # at the first step a batch is drawn, which its time is measured for
    stream = WatchedStream(
        batches(gpu, pinned=pinned),
        guard=gpu.watched,
        watched=lambda step: step > 1 and step % LOG_EVERY > 0,
    )
    training = Training(
        watchdog=Watchdog(run, minutes=None, remedy=""), recipe=recipe, run=run, engine=engine,
        stream=stream, store=CheckpointStore(run, keep=1), logger=logger, average=average,
        first_step=0,
        evaluator=Evaluator(
            recipe=recipe, run=run, engine=engine, average=average, logger=logger, last_step=0
        ),
    )  # fmt: skip
    training.save = lambda *_, **__: None
    return training


@pytest.fixture
def made() -> tuple[Recipe, Objective]:
    """On the CPU: before there is a GPU."""
    words = [*WORDS, "--data.train=nowhere"]
    recipe = read_command_line(RECIPES, program="test", arguments=words)[1]
    return recipe, recipe.objective.build(recipe)


def test_the_loop_waits_for_nothing_between_log_steps(
    made: tuple[Recipe, Objective], gpu: FakeCuda, tmp_path: Path
) -> None:
    training = training_of(*made, tmp_path, gpu, pinned=True)
    try:
        train(training)
    finally:
        training.stream.close()
        training.logger.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert training.stream.steps_watched == [3]
    assert [line["step"] for line in lines] == [2, 4]
    assert gpu.declared == {"Packed.of": STEPS}  # captions, once a step


def test_batches_that_are_not_pinned_are_waited_for(
    made: tuple[Recipe, Objective], gpu: FakeCuda, tmp_path: Path
) -> None:
    training = training_of(*made, tmp_path, gpu, pinned=False)
    try:
        with pytest.raises(AssertionError, match="between cpu and cuda: the host waits"):
            train(training)
    finally:
        training.stream.close()
        training.logger.close()


@pytest.mark.parametrize("views", [0, 3])
def test_embeddings_of_images_wait_for_nothing(
    views: int, made: tuple[Recipe, Objective], gpu: FakeCuda, tmp_path: Path
) -> None:
    recipe, objective = made
    gpu.put_module(objective)
    run = Run(tmp_path, 0, 1, 0, CUDA, make_logger(0))
    task = ZeroShot(mask_ratio=0.5 if views else 0.0, views=views or 1)
    embedder = Embedder.of(bundle_of(objective.model, recipe), run, task)
    batch = batches(gpu, pinned=True)[0]
    # at the end it reads how many are unusable: here every number is one
    at_the_end = pytest.raises(InputError, match="1 of 1 images and of 1 of 1 texts are not finite")
    with at_the_end, embedder.measuring(Ranks()):
        texts = text_table(embedder, ["a red square", "a circle"], ranks=Ranks())
        with gpu.watched():
            images = embedder.images(batch.images, batch.sample_numbers)
            scores = images @ texts.T
    assert scores.device == CUDA
    assert embedder._unusable.device == CUDA
