"""A gradient that is not finite changes nothing, which is decided on the device."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from frugal.common.contracts import Batch, Objective
from frugal.common.engine.accelerate import AccelerateEngine
from frugal.common.engine.engine import LossScale
from frugal.common.engine.saving import WeightAverage
from frugal.common.engine.step import train_step
from frugal.common.optim.optimizers import LARS, AdamW
from frugal.common.recipe import EngineOptions
from frugal.common.run import Run, make_logger
from frugal.flip.recipes import RECIPES
from host_reads import nothing_is_read
from support import ALONE, DDP, Launcher, metrics, newest, train, zero

OPTIMIZERS = {
    "adamw": AdamW(learning_rate=1.0, clip_norm=1.0),
    "adamw-unclipped": AdamW(learning_rate=1.0),
    "lars": LARS(learning_rate=1.0),
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first device that a process asks it for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Layers(nn.Sequential, Objective):
    """Layers one after the other, as what an engine trains."""


def make_engine(
    folder: Path, optimizer: str, precision: str = "float32", objective: Objective | None = None
) -> AccelerateEngine:
    """Around an objective, or three matrices and three vectors."""
    torch.manual_seed(0)
    recipe = replace(
        RECIPES["demo"](),
        optimizer=OPTIMIZERS[optimizer],
        engine=EngineOptions(precision=precision),
    )
    run = Run(folder, 0, 1, 0, torch.device("cpu"), make_logger(0))
    layers = Layers(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Linear(4, 2))
    return AccelerateEngine(objective or layers, recipe, run)


def everything(engine: AccelerateEngine, average: WeightAverage) -> dict[str, torch.Tensor]:
    """Weights, moments, their counters and averages, copied."""
    found = {f"average/{name}": tensor for name, tensor in average.owned.items()}
    for number, moments in enumerate(engine.moments()):
        found |= {f"{kind}/{number}": tensor for kind, tensor in moments.items()}
    found |= dict(engine.trainable())
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def step(engine: AccelerateEngine, average: WeightAverage, *, spoiled: float | None) -> float:
    """One step as the loop takes it, with a number in one gradient spoiled; the norm."""
    for _, parameter in engine.trainable():
        parameter.grad = torch.randn_like(parameter)
    if spoiled is not None:
        engine.objective[2].weight.grad[1, 2] = spoiled
    with nothing_is_read():
        norm = engine.step(0.1)
        stepped = norm.isfinite()
        engine.clamp({"1.bias": (-9.0, 9.0), "0.bias": (0.1, 0.2)}, stepped=stepped)
        average.update(stepped)
    return norm.item()


class Normed(Objective):
    """A layer behind batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.layer(self.norm(batch.images)).square().mean(), {}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nor_do_the_statistics_of_batch_norm(accumulate: int, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "adamw", objective=Normed())
    recipe = replace(
        RECIPES["demo"](), batch_size=8, engine=EngineOptions(accumulate=accumulate)
    )  # fmt: skip

    def take(step: int, spoiled: float) -> dict[str, torch.Tensor]:
        images = torch.randn(accumulate, 4, 3)
        images[-1, 2, 1] += spoiled
        batches = [
            Batch(images=part, sample_numbers=torch.arange(4), valid=torch.ones(4).bool())
            for part in images
        ]
        with nothing_is_read():
            train_step(engine, recipe, step, batches)
        return {name: buffer.clone() for name, buffer in engine.objective.named_buffers()}

    before = take(0, spoiled=0.0)
    for step, spoiled in enumerate((torch.nan, torch.inf), 1):
        after = take(step, spoiled)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
    after = take(3, spoiled=0.0)
    assert after["norm.num_batches_tracked"] == 2 * accumulate
    assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("spoiled", [torch.inf, torch.nan])
def test_nothing_changes_by_a_single_bit(optimizer: str, spoiled: float, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, optimizer)
    average = WeightAverage(engine, 0.9)
    for taken in range(3):
        before = everything(engine, average)
        assert not torch.tensor(step(engine, average, spoiled=spoiled)).isfinite()
        for name, tensor in everything(engine, average).items():
            assert torch.equal(tensor, before[name]), name
        assert engine.updates == taken
        step(engine, average, spoiled=None)
        for name, tensor in everything(engine, average).items():
            # LARS counts no steps, and one bias stays at its bound
            if "0.bias" not in name and not (optimizer == "lars" and "step/" in name):
                assert not torch.equal(tensor, before[name]), name
        assert engine.updates == taken + 1


def test_a_weight_that_is_not_finite_spoils_no_average_of_steps_that_are_skipped(
    tmp_path: Path,
) -> None:
    engine = make_engine(tmp_path, "adamw")
    average = WeightAverage(engine, 0.9)
    step(engine, average, spoiled=None)
    before = average.owned["0.weight"].clone()
    with torch.no_grad():
        engine.objective[0].weight[0, 0] = torch.nan
    step(engine, average, spoiled=torch.nan)
    assert torch.equal(average.owned["0.weight"], before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_follows_a_skipped_step_is_as_if_it_had_never_been(
    optimizer: str, tmp_path: Path
) -> None:
    found = []
    for spoiled_steps in ((), (0, 2)):
        engine = make_engine(tmp_path, optimizer)
        average = WeightAverage(engine, 0.9)
        for number in range(3):
            if number in spoiled_steps:
                step(engine, average, spoiled=torch.inf)
            torch.manual_seed(number)
            step(engine, average, spoiled=None)
        found.append(everything(engine, average))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_the_loss_scale_follows_torchs_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "growth_interval", 3)
    ours = LossScale(torch.device("cpu"))
    scale, quiet = torch.full((), 2.0**16), torch.zeros((), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for overflow in (torch.rand(200, generator=generator) < 0.15).tolist():
        with nothing_is_read():
            ours.update(torch.tensor(not overflow))
        found = torch.full((), float(overflow))
        torch._amp_update_scale_(scale, quiet, found, 2.0, 0.5, LossScale.growth_interval)
        assert ours.state() == {"scale": scale.item(), "quiet_steps": quiet.item()}
    saved = ours.state()
    again = LossScale(torch.device("cpu"))
    again.load(json.loads(json.dumps(saved)))
    assert again.state() == saved
    lowest = LossScale(torch.device("cpu"), initial=1.5)
    lowest.update(torch.tensor(False))
    assert lowest.state() == {"scale": 1.0, "quiet_steps": 0}


def test_gradients_of_float16_are_scaled_back(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "adamw-unclipped", "float16")
    loss = engine.forward(torch.ones(4, 3)).float().square().mean()
    weight = engine.objective[3].weight
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    engine.backward(loss)
    scaled = weight.grad
    torch.testing.assert_close(scaled, expected * 2.0**16, rtol=1e-2, atol=1.0)
    norm = torch.stack([p.grad.norm() for _, p in engine.trainable()]).norm() / 2.0**16
    assert engine.step(0.1).item() == pytest.approx(norm.item(), rel=1e-6)
    engine.objective[3].weight.grad = torch.full_like(weight, torch.inf)
    engine.step(0.1)
    assert engine.scale_state() == {"scale": 2.0**15, "quiet_steps": 0}
    assert engine.updates == 1


SPOILED = (
    "--optimizer.learning-rate=1e30", "--optimizer.clip-norm=None",
    "--schedule.warmup-samples=0", "--run.max-skipped=3",
)  # fmt: skip


@pytest.mark.parametrize("launcher", [ALONE, DDP, zero(0)], ids=lambda launcher: launcher.name)
def test_a_rare_log_line_tells_of_the_same_steps_and_samples(
    launcher: Launcher, scenes: Path, tmp_path: Path
) -> None:
    said, listed = [], []
    for every in (1, 4):
        run = tmp_path / f"every_{every}"
        words = (f"--data.train={scenes / 'train'}", *SPOILED, f"--run.log-every={every}")
        output = train(launcher, run, *words, expect=1)
        lines = [line for line in output.splitlines() if "skipped: " in line or "error: " in line]
        said.append([re.sub(r"^[\d:]+ ", "", line).replace(str(run), "") for line in lines])
        listed.append(json.loads((run / "not_finite.json").read_text()))
    assert said[0] == said[1]
    assert len(said[0]) == 4 and "3 steps in a row" in said[0][-1]
    assert listed[0] == listed[1]
    assert len(listed[0]["keys"]) == 24


@pytest.mark.parametrize("launcher", [ALONE, zero(0), zero(1)], ids=lambda launcher: launcher.name)
def test_checkpoints_between_log_steps_count_right(
    launcher: Launcher, scenes: Path, tmp_path: Path
) -> None:
    states, lines = [], []
    for every, save in ((1, 1000), (50, 7)):
        run = tmp_path / f"every_{every}"
        train(
            launcher, run, f"--data.train={scenes / 'train'}", "--engine.precision=float16",
            "--optimizer.learning-rate=1e3", "--schedule.warmup-samples=0", "--run.keep=9",
            f"--run.log-every={every}", f"--run.save-every={save}", "--run.max-skipped=1000",
            "--schedule.samples=240",
        )  # fmt: skip
        names = ("updates", "skipped_steps", "skipped_in_row", "loss_scale")
        state = json.loads((newest(run) / "state.json").read_text())
        states.append({name: state[name] for name in names})
        lines.append(metrics(run))
    assert states[0] == states[1] and states[0]["skipped_steps"] > 0
    early = json.loads((newest(run).parent / "step_000000007" / "state.json").read_text())
    assert early["skipped_steps"] == lines[0][6]["skipped_steps"]
    assert early["updates"] == 7 - early["skipped_steps"]
