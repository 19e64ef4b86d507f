"""Between log steps the host reads no number of the device: it queues work and goes on."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from frugal.clipa.recipes import RECIPES as CLIPA
from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.cli import read_command_line
from frugal.common.contracts import Batch, Objective
from frugal.common.engine.accelerate import AccelerateEngine
from frugal.common.engine.evaluator import Evaluator
from frugal.common.engine.logger import MetricsLogger
from frugal.common.engine.loop import train
from frugal.common.engine.saving import WeightAverage
from frugal.common.engine.training import Training
from frugal.common.engine.watchdog import Watchdog
from frugal.common.optim.optimizers import LARS, skip_unless_finite
from frugal.common.recipe import Recipe
from frugal.common.run import Run, make_logger
from frugal.flip.recipes import RECIPES as FLIP
from frugal.milan.recipes import RECIPES as MILAN
from host_reads import WatchedStream, nothing_is_read, nothing_waits_for_the_gpu
from support import TINY

LOG_EVERY, STEPS = 4, 12
SHORT = (
    f"--schedule.samples={24 * STEPS}", f"--run.log-every={LOG_EVERY}", "--engine.ema-decay=0.9",
)  # fmt: skip
PAIRS = (*TINY, "--model.text.no-packed")
PRETRAIN = (
    "--model.image.width=32", "--model.image.depth=2", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--model.decoder.width=16", "--model.decoder.heads=2",
    "--data.workers=0", "--engine.precision=float32", "--batch-size=24",
    "--schedule.warmup-samples=48",
)  # fmt: skip
JITTER = ("--data.color.probability=0.8",)
CASES = {
    "flip": (FLIP, PAIRS),
    "flip-float16": (FLIP, (*PAIRS, "--engine.precision=float16")),
    "flip-accumulated": (FLIP, (*PAIRS, "--engine.accumulate=2")),
    "flip-cached": (FLIP, (*PAIRS, "--engine.cache-chunk=5")),
    "flip-checkpointed": (FLIP, (*PAIRS, "--engine.checkpoint-activations")),
    "clipa": (CLIPA, (*PAIRS, *JITTER)),
    "milan": (MILAN, PRETRAIN),
    "milan-bfloat16": (MILAN, (*PRETRAIN, "--engine.precision=bfloat16")),
}


@pytest.fixture
def recipe_of(scenes: Path, alone: Path) -> Callable[[str], Recipe]:
    """The recipe of a case."""

    def build(case: str) -> Recipe:
        recipes, words = CASES[case]
        words = ["demo", *words, *SHORT, f"--data.train={scenes / 'train'}"]
        if recipes is MILAN:
            words.append(f"--objective.teacher.source={alone}")
        return read_command_line(recipes, program="test", arguments=words)[1]

    return build


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first device that a process asks it for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class UndrawnLogger(MetricsLogger):
    """Draws no batches, for which some numbers are read on purpose."""

    def draw_batch(self, objective: Objective, batch: Batch, step: int) -> None:
        """Nothing."""


def watched_training(
    recipe: Recipe, folder: Path, device: torch.device, *, guard: Callable, watched: Callable
) -> Training:
    """Everything the loop needs, with batches that lie ready."""
    folder.mkdir()
    run = Run(folder, 0, 1, 0, device, make_logger(0))
    engine = AccelerateEngine(recipe.objective.build(recipe), recipe, run)
    stream = recipe.data.build(recipe, run, first_sample=0, state={}, engine=engine)
    accumulate = recipe.engine.accumulate
    logger = UndrawnLogger(run, first_step=0, steps=recipe.steps)
    average = WeightAverage(engine, 0.9)
    return Training(
        watchdog=Watchdog(run, minutes=None, remedy=""),
        recipe=recipe,
        run=run,
        engine=engine,
        stream=WatchedStream(
            islice(stream, STEPS * accumulate), guard=guard, watched=watched, accumulate=accumulate
        ),
        store=CheckpointStore(run, keep=1),
        logger=logger,
        average=average,
        evaluator=Evaluator(
            recipe=recipe, run=run, engine=engine, average=average, logger=logger, last_step=0
        ),
        first_step=0,
    )


def run_watched(training: Training) -> list[dict]:
    """Train to the end; what was logged."""
    try:
        train(training)
    finally:
        training.stream.close()
        training.logger.close()
    return [json.loads(line) for line in (training.run.dir / "metrics.jsonl").open()]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_between_log_steps(
    case: str, recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    training = watched_training(
        recipe_of(case),
        tmp_path / "run",
        torch.device("cpu"),
        guard=nothing_is_read,
        watched=lambda step: step % LOG_EVERY > 0,
    )
    lines = run_watched(training)
    assert training.stream.steps_watched == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert training.engine.updates == STEPS - lines[-1]["skipped_steps"]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("case", ["flip", "milan"])
def test_what_reads_is_caught(
    case: str, recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    training = watched_training(
        recipe_of(case),
        tmp_path / "run",
        torch.device("cpu"),
        guard=nothing_is_read,
        watched=lambda step: True,
    )
    with pytest.raises(AssertionError, match=r"tolist reads the device"):
        run_watched(training)
    assert training.stream.steps_watched == [1, 2, 3, LOG_EVERY]


@pytest.mark.parametrize(
    "reading",
    [
        lambda numbers: numbers.sum().item(),
        lambda numbers: numbers.tolist(),
        lambda numbers: bool(numbers[0] > 0),
        lambda numbers: float(numbers[0]),
        lambda numbers: numbers.cpu(),
        lambda numbers: numbers.numpy(),
        lambda numbers: numbers.nonzero(),
        lambda numbers: numbers[numbers > 1],
        lambda numbers: numbers.clone().index_put_((numbers > 1,), numbers[:1]),
        lambda numbers: numbers.repeat_interleave(numbers.long()),
        lambda numbers: torch.equal(numbers, numbers),
        lambda numbers: f"{numbers[0]}",
        lambda numbers: numbers.unique(),
    ],
)
def test_every_way_to_read_is_known(reading: Callable) -> None:
    numbers = torch.arange(3.0)
    reading(numbers)
    with pytest.raises(AssertionError, match="reads the device"), nothing_is_read():
        reading(numbers)


def test_a_step_of_lars_reads_nothing() -> None:
    model = nn.Linear(3, 5)
    optimizer = LARS(learning_rate=1.0).build(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with nothing_is_read():
        skip_unless_finite(optimizer, torch.ones(()))
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("case", ["flip", "flip-float16", "flip-cached", "milan", "milan-bfloat16"])
def test_nothing_waits_for_the_gpu_between_log_steps(
    case: str, recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    training = watched_training(
        recipe_of(case),
        tmp_path / "run",
        torch.device("cuda", 0),
        guard=nothing_waits_for_the_gpu,
        # in the first steps kernels are chosen and the teacher moves
        watched=lambda step: step > LOG_EVERY and step % LOG_EVERY > 0,
    )
    lines = run_watched(training)
    assert training.stream.steps_watched == [5, 6, 7, 9, 10, 11]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(0 <= line["data_wait"] <= 1 for line in lines)
