"""What a fake GPU cannot tell: whether numbers, kernels and engines of a real one are right.

``benchmarks/gpu/run.sh`` runs this and every other test marked ``gpu`` on one GPU. With
``FRUGAL_GPU_TESTS_ON=cpu`` in the environment it runs on the CPU, to see that it runs at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._dynamo.utils import counters

from frugal.cluster_masking.recipes import RECIPES as CLUSTERS
from frugal.common.cli import Recipes, read_command_line
from frugal.common.contracts import Batch
from frugal.common.engine.accelerate import AccelerateEngine
from frugal.common.engine.engine import Engine
from frugal.common.engine.step import train_step
from frugal.common.optim.optimizers import set_learning_rate, skip_unless_finite
from frugal.common.ports import free_port
from frugal.common.recipe import Recipe
from frugal.common.run import Run, make_logger
from frugal.flip.recipes import RECIPES as FLIP
from frugal.milan.recipes import RECIPES as MILAN
from support import ROOT, TINY

ON = os.environ.get("FRUGAL_GPU_TESTS_ON", "cuda")
DEVICE = torch.device(ON, 0) if ON == "cuda" else torch.device(ON)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        ON == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
WIDE = (
    *TINY, "--model.image.width=128", "--model.image.depth=2", "--model.image.mlp-width=256",
    "--model.text.width=128", "--model.text.depth=2", "--model.text.mlp-width=256",
)  # fmt: skip
"""Heads of 64 channels, as kernels for GPUs want them."""
MAE = (
    "--model.image.width=128", "--model.image.depth=2", "--model.image.heads=2",
    "--model.image.mlp-width=256", "--model.image.image-size=32", "--model.decoder.width=64",
    "--model.decoder.depth=2", "--model.decoder.heads=2", "--batch-size=24",
    "--engine.precision=float32",
)  # fmt: skip
CASES: dict[str, tuple[Recipes, str, tuple[str, ...]]] = {
    "dense": (FLIP, "demo", (*WIDE, "--model.text.no-packed")),
    "packed": (CLUSTERS, "demo", (*WIDE, "--reduction.image.threshold=0.5")),
    "mae": (MILAN, "demo-pixels", MAE),
}
GRAPHS = {"dense": 2, "packed": 4, "mae": 2}
"""That are compiled; of packed tokens each once more, for any number of tokens."""
STEPS = 5


def recipe_of(case: str, *words: str) -> Recipe:
    recipes, name, own = CASES[case]
    given = (name, *own, "--data.train=nowhere", *words)
    return read_command_line(recipes, program="test", arguments=given)[1]


def batch_of(step: int) -> Batch:
    """Smooth pictures, so that clusters differ in size, and captions of any length."""
    generator = torch.Generator().manual_seed(step)
    coarse = 255 * torch.rand(24, 3, 5, 5, generator=generator)
    return Batch(
        images=nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").byte(),
        sample_numbers=torch.arange(24) + 24 * step,
        valid=torch.ones(24, dtype=torch.bool),
        token_ids=torch.randint(1, 60, (24, 24), generator=generator),
        text_lengths=torch.randint(1, 25, (24,), generator=generator),
    )


def run_on(device: torch.device) -> Run:
    return Run(Path("nowhere"), 0, 1, 0, device, make_logger(0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps the first device, torch what it has compiled."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    counters.clear()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


def loss_and_gradient(case: str, device: torch.device, precision: str) -> tuple[float, Tensor]:
    """Of one batch; the gradient as one float64 vector on the CPU."""
    recipe = recipe_of(case, f"--engine.precision={precision}")
    engine = AccelerateEngine(recipe.objective.build(recipe), recipe, run_on(device))
    scale = 1.0
    if precision == "float16":  # at the first scale it overflows, and the step would be skipped
        scale = 2.0**6
        engine.load_scale_state({"scale": scale, "quiet_steps": 0})
    loss, _ = engine.forward(batch_of(0).to(device))
    engine.backward(loss)
    AcceleratorState._reset_state(reset_partial_state=True)
    parts = [p.grad.double().cpu().flatten() for _, p in engine.trainable() if p.grad is not None]
    return loss.item(), torch.cat(parts) / scale


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("precision", "of_loss", "of_gradient"),
    [("float32", 1e-4, 1e-3), ("bfloat16", 2e-2, 5e-2), ("float16", 5e-3, 2e-2)],
)
def test_a_step_is_that_of_the_cpu_in_float32(
    case: str, precision: str, of_loss: float, of_gradient: float
) -> None:
    expected, gradient = loss_and_gradient(case, torch.device("cpu"), "float32")
    loss, its = loss_and_gradient(case, DEVICE, precision)
    assert loss == pytest.approx(expected, rel=of_loss)
    assert (its - gradient).norm() < of_gradient * gradient.norm()


def test_fused_adamw_steps_as_in_float64() -> None:
    options = recipe_of("dense").optimizer
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(30, 70), nn.LayerNorm(70), nn.Linear(70, 5)).double()
    module = nn.Sequential(nn.Linear(30, 70), nn.LayerNorm(70), nn.Linear(70, 5)).to(DEVICE)
    module.load_state_dict(reference.state_dict())
    ours = options.build(module)
    theirs = options.build(reference)
    for group in theirs.param_groups:
        group["fused"], group["foreach"] = False, False
    assert all(group["fused"] for group in ours.param_groups)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for left, right in zip(module.parameters(), reference.parameters(), strict=True):
            right.grad = torch.randn(right.shape, generator=generator, dtype=torch.float64)
            left.grad = right.grad.to(left)
        norm = torch.tensor(torch.inf if step == 3 else 1.0, device=DEVICE)
        set_learning_rate(ours, 1e-2)
        set_learning_rate(theirs, 1e-2)
        skip_unless_finite(ours, norm)
        ours.step()
        if step != 3:
            theirs.step()
    for left, right in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(left.double().cpu(), right, rtol=1e-4, atol=1e-5)


def test_the_loader_pins_what_goes_to_the_device(scenes: Path) -> None:
    recipe = recipe_of("dense", "--data.workers=1")
    recipe = replace(recipe, data=replace(recipe.data, train=(str(scenes / "train"),)))
    run = run_on(DEVICE)
    engine = AccelerateEngine(recipe.objective.build(recipe), recipe, run)
    stream = iter(recipe.data.build(recipe, run, first_sample=0, state={}, engine=engine))
    batch = next(stream)
    stream.close()
    tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    assert len(tensors) > 3
    assert all(value.is_pinned() == (DEVICE.type == "cuda") for value in tensors)


@pytest.mark.parametrize("case", CASES)
def test_towers_are_compiled_once(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # a process that was killed may have left half of what it compiled in the usual place
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    losses = []
    for compiles in (False, True):
        words = ("--engine.precision=bfloat16", *(["--engine.compile"] if compiles else []))
        recipe = recipe_of(case, *words)
        engine = AccelerateEngine(recipe.objective.build(recipe), recipe, run_on(DEVICE))
        steps = [train_step(engine, recipe, s, [batch_of(s).to(DEVICE)]) for s in range(STEPS)]
        losses.append([step.means[step.names.index("loss")].item() for step in steps])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == GRAPHS[case]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def taken(engine: Engine, recipe: Recipe) -> dict[str, Tensor]:
    """What some steps report, and the weights behind them."""
    steps = [train_step(engine, recipe, s, [batch_of(s).to(DEVICE)]) for s in range(STEPS)]
    weights = {name: engine.read("weight", parameter) for name, parameter in engine.trainable()}
    found = {"means": torch.stack([step.means for step in steps])}
    found |= {"norms": torch.stack([step.norm.float() for step in steps])} | weights
    return {name: value.detach().cpu().clone() for name, value in found.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Of one process without a group."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = recipe_of("dense")
    engine = AccelerateEngine(recipe.objective.build(recipe), recipe, run_on(DEVICE))
    return taken(engine, recipe)


@pytest.fixture(scope="module")
def alone_in_a_group(expected: dict[str, Tensor]) -> Iterator[None]:
    """The only process of a group, as a launcher starts it; NCCL takes a GPU once.

    One group for all engines: DeepSpeed remembers the first that it meets.
    """
    del expected
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, str(value))
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
        yield
        dist.destroy_process_group()


def engine_of(kind: str, recipe: Recipe) -> Engine:
    objective = recipe.objective.build(recipe)
    if kind == "ddp":
        return AccelerateEngine(objective, recipe, run_on(DEVICE))
    from frugal.common.engine.deepspeed import DeepSpeedEngine

    file = ROOT / "ds_configs" / f"{kind}.json"
    recipe = replace(recipe, engine=replace(recipe.engine, deepspeed_config=file))
    return DeepSpeedEngine(objective, recipe, run_on(DEVICE))


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
def test_engines_take_the_steps_of_one_process(kind: str, expected: dict[str, Tensor]) -> None:
    recipe = recipe_of("dense")
    engine = engine_of(kind, recipe)
    if kind == "ddp":
        assert isinstance(engine._wrapped, nn.parallel.DistributedDataParallel)
    else:
        assert engine.name == f"deepspeed {kind}"
    found = taken(engine, recipe)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)
