"""Virtual processes: the bits of a run do not depend on how many processes computed it."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from frugal.common.contracts import Batch, Objective
from frugal.common.distributed import gather, place_in_world, sum_over_processes
from frugal.common.engine.engine import Engine
from frugal.common.engine.loop import _read_step
from frugal.common.engine.signals import StopSignal
from frugal.common.engine.throughput import Meter
from frugal.common.engine.training import Training
from frugal.common.engine.virtual import VirtualTrainer, step_of_virtual_processes
from frugal.common.errors import InputError
from frugal.common.files import read_json_lines
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_timm
from frugal.common.recipe import EngineOptions
from frugal.common.run import Run
from frugal.common.scenes.settings import Settings
from frugal.common.scenes.writing import write
from frugal.common.transfer.classifier import ClassifierConfig
from frugal.flip.recipes import RECIPES
from support import (
    ROOT,
    TINY,
    Launcher,
    kill_at_step,
    largest_difference,
    losses,
    metrics,
    newest,
    saved_tensors,
    start,
    train,
    zero,
)

CIT = "frugal.cit.train"
VIRTUAL = "--engine.virtual-processes=4"
OF_THE_MACHINE = re.compile(r"time|.*second.*|data_wait|share_of_peak|memory_bytes")
"""What of a log line is another number in every run."""
TOWER = (
    "--model.image.width=32", "--model.image.depth=2", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--data.workers=0", "--engine.precision=float32",
    "--run.log-every=1",
)  # fmt: skip
DROPPED = "--model.image.drop-path=0.3"


def processes(count: int) -> Launcher:
    return Launcher(f"{count} processes", processes=count)


@dataclass(frozen=True)
class Case:
    """Four steps of a recipe; its words may name {scenes}, {masked} and {encoder}."""

    module: str
    words: tuple[str, ...]
    recipe: str = "demo"
    small: tuple[str, ...] = TINY
    others: tuple[int, ...] = (4,)
    """Numbers of processes that are to end as one does."""

    def train(
        self, launcher: Launcher, run: Path, folders: dict[str, Path], *, virtual: int = 4
    ) -> str:
        words = [word.format(**folders) for word in self.words]
        return train(
            launcher, run, f"--engine.virtual-processes={virtual}", "--run.save-every=2",
            "--run.keep=9", *words,
            module=self.module, recipe=self.recipe, small=self.small,
        )  # fmt: skip


TRAIN, FOUR = "--data.train={scenes}/train", "--schedule.samples=96"
LABELED = ("--data.train={scenes}/zero_shot/train", "--evaluation.0.data={scenes}")
CASES = {
    "flip": Case(
        "frugal.flip.train", (TRAIN, FOUR, DROPPED, "--engine.ema-decay=0.9", "--run.digests"),
        others=(4, 2),
    ),
    "clipa in micro-batches and chunks": Case(
        "frugal.clipa.train",
        (TRAIN, "--schedule.samples=64", "--batch-size=16", DROPPED, "--engine.accumulate=2",
         "--engine.cache-chunk=1"),
    ),
    "cluster masking": Case(
        "frugal.cluster_masking.train", (TRAIN, FOUR, "--reduction.image.search-images=40")
    ),
    "cit": Case(
        "frugal.cit.train",
        (TRAIN, FOUR, "--data.metadata.sources={scenes}/zero_shot/classnames.txt",
         "--data.period=1", "--data.scan=10", "--data.threshold=0.999", "--data.min-ratio=0.25",
         ),
    ),
    "milan": Case(
        "frugal.milan.pretrain",
        (TRAIN, "--schedule.samples=64", "--objective.teacher.source={teacher}"),
        small=(*TOWER, "--model.decoder.width=16", "--model.decoder.heads=2", "--batch-size=16",
               "--schedule.warmup-samples=0"),
    ),
    "fine-tuning": Case(
        "frugal.milan.finetune",
        (*LABELED, "--batch-size=16", "--schedule.samples=64", "--schedule.warmup-samples=0",
         "--objective.mixing.together=4", "--model.image.drop-path=0.2", "--engine.accumulate=2",
         "--objective.from-scratch"),
        small=TOWER, others=(2,),
    ),
    "linear probing": Case(
        "frugal.milan.linear_probe",
        (*LABELED, "--batch-size=16", "--schedule.samples=64", "--schedule.warmup-samples=0",
         "--run.start-from={encoder}", "--objective.statistics=each_process"),
        small=TOWER, others=(2,),
    ),
    "segmentation": Case(
        "frugal.milan.segment",
        ("--data.train={masked}", "--evaluation.0.data={masked}"),
        small=(
            "--model.image.width=16", "--model.image.heads=2", "--model.image.mlp-width=32",
            "--model.image.image-size=32", "--model.width=16", "--model.auxiliary-width=16",
            "--objective.from-scratch", "--data.workers=0", "--engine.precision=float32",
            "--run.log-every=1", "--batch-size=8", "--schedule.samples=32",
            "--schedule.warmup-samples=8",
        ),
        others=(2,),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(alone: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words of cases name."""
    masked = tmp_path_factory.mktemp("masked") / "scenes"
    write(
        Settings(
            out=masked, image_size=32, train_samples=0, zero_shot_samples=0, probe_samples=0,
            retrieval_samples=0, compositional_samples=0, segmentation_samples=24, processes=1,
        )
    )  # fmt: skip
    tower = ImageTower(width=32, depth=2, heads=2, mlp_width=64, patch_size=8, image_size=32)
    model = ClassifierConfig(image=tower).build(torch.Generator().manual_seed(0))
    encoder = masked.parent / "encoder.safetensors"
    save_file(to_timm(model.image.state_dict(), tower), encoder)
    return {"scenes": scenes, "masked": masked, "teacher": alone, "encoder": encoder}


def numbers(run: Path) -> list[dict]:
    """The log lines without what the machine decides."""
    return [
        {name: value for name, value in line.items() if not OF_THE_MACHINE.fullmatch(name)}
        for line in metrics(run)
    ]


def digests(run: Path) -> list[tuple[int, str, str]]:
    """Of the samples and the gradient of every step, where a run notes them."""
    lines = read_json_lines(run / "digests.jsonl")[0]
    return [(line["step"], line["samples"], line["gradient"]) for line in lines]


def check_equal(run: Path, expected: Path) -> None:
    """Weights, moments, averages, buffers, digests and all logged numbers, to the bit."""
    assert digests(run) == digests(expected)
    left, right = saved_tensors(run), saved_tensors(expected)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert numbers(run) == numbers(expected)


def up_to(step: int, run: Path, copy: Path) -> Path:
    """A copy of a run as it was when it had saved a step."""
    shutil.copytree(run, copy)
    pointer = copy / "checkpoints" / "latest"
    for folder in (copy / "checkpoints").glob("step_*"):
        if folder.name > f"step_{step:09d}":
            shutil.rmtree(folder)
    pointer.write_text(f"step_{step:09d}\n")
    return copy


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_number_of_processes_ends_in_the_same_bits(
    case: Case, folders: dict[str, Path], tmp_path: Path
) -> None:
    one = tmp_path / "one"
    case.train(processes(1), one, folders)
    for world_size in case.others:
        run = tmp_path / str(world_size)
        if world_size == 2:  # as it is taken on in the middle
            up_to(2, one, run)
        case.train(processes(world_size), run, folders)
        check_equal(run, one)


def test_they_train_what_as_many_processes_train_under_either_engine(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    flip, words = CASES["flip"], [word.format(**folders) for word in CASES["flip"].words]
    train(processes(2), tmp_path / "plain", *words)
    flip.train(processes(1), tmp_path / "accelerate", folders, virtual=2)
    flip.train(zero(0), tmp_path / "deepspeed", folders, virtual=2)
    check_equal(tmp_path / "deepspeed", tmp_path / "accelerate")
    silent = tmp_path / "silent.json"
    silent.write_text("{}")  # of stage 0 too
    words.append(f"--engine.deepspeed-config={silent}")
    train(zero(0, processes=1), tmp_path / "silent", "--engine.virtual-processes=2", *words)
    check_equal(tmp_path / "silent", tmp_path / "accelerate")
    left, right = saved_tensors(tmp_path / "plain"), saved_tensors(tmp_path / "deepspeed")
    # the two gradients are added in one order only, and halved behind that or before
    assert largest_difference(left, right, ("weight", "ema")) < 1e-6
    # what drops out of the model belongs to the virtual process, and so does every sample
    assert losses(tmp_path / "deepspeed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def test_zero_stages_that_share_moments_end_in_the_same_bits(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    flip, one = CASES["flip"], tmp_path / "one"
    flip.train(zero(1, processes=1), one, folders)
    assert len(digests(one)) == 4
    for launcher in (zero(1, processes=2), zero(2, processes=4)):
        run = tmp_path / launcher.name.replace(" ", "")
        if launcher.processes == 2:
            up_to(2, one, run)
        flip.train(launcher, run, folders)
        check_equal(run, one)
    flip.train(processes(1), tmp_path / "accelerate", folders)
    left, right = saved_tensors(tmp_path / "accelerate"), saved_tensors(one)
    assert largest_difference(left, right, ("weight", "ema")) < 1e-6
    assert losses(one) == pytest.approx(losses(tmp_path / "accelerate"), abs=1e-6)


def test_zero_stages_skip_the_same_steps(scenes: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for launcher, run in ((zero(1, processes=1), one), (zero(2, processes=2), two)):
        train(
            launcher, run, f"--data.train={scenes / 'train'}", VIRTUAL, "--schedule.samples=192",
            "--engine.precision=float16", "--optimizer.learning-rate=1e3",
            "--schedule.warmup-samples=0", "--run.max-skipped=1000",
        )  # fmt: skip
    assert 0 < metrics(one)[-1]["skipped_steps"] < 8
    check_equal(two, one)


def test_curating_and_killed_again_and_again_on_other_numbers_of_processes(
    scenes: Path, tmp_path: Path
) -> None:
    words = (
        f"--data.train={scenes / 'train'}", VIRTUAL, "--run.save-every=1", "--data.background",
        f"--data.metadata.sources={scenes / 'zero_shot' / 'classnames.txt'}", "--data.period=3",
        "--data.scan=10", "--data.threshold=0.999", "--data.min-ratio=0.6",
    )  # fmt: skip
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(processes(1), calm, *words, module=CIT)
    for step, world_size in ((4, 4), (10, 1)):
        process = start(processes(world_size), killed, *words, module=CIT)
        kill_at_step(process, killed, step, signal.SIGKILL)
        assert newest(killed).name < "step_000000020", "the kill came too late"
    train(processes(2), killed, *words, module=CIT)
    check_equal(killed, calm)


@pytest.mark.parametrize(
    ("launcher", "words", "refusal"),
    [
        (processes(1), ["--engine.virtual-processes=5"], "batch_size 24 does not divide among"),
        (processes(1), [VIRTUAL, "--engine.compile"], "engine.compile .* leave one of them out"),
        (processes(3), [VIRTUAL], "virtual_processes = 4 does not divide among 3 processes"),
        (
            processes(1),
            [VIRTUAL, "--data.resampled-samples=100"],
            "data.resampled_samples .* engine.virtual_processes",
        ),
        (zero(3, processes=1), [VIRTUAL], r"zero3.json is of stage 3, .* no process holds whole"),
        (
            zero(2, processes=1),
            [VIRTUAL, f"--engine.deepspeed-config={ROOT / 'ds_configs' / 'zero2_offload.json'}"],
            r"zero2_offload.json offloads the optimizer",
        ),
        (
            zero(1, processes=1),
            [VIRTUAL, "--optimizer=frugal.common.optim.optimizers.LARS"],
            "LARS adds norms up over the processes at ZeRO stage 1",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused_in_a_sentence(
    launcher: Launcher, words: list[str], refusal: str, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = train(launcher, run, f"--data.train={scenes / 'train'}", *words, expect=2)
    assert re.search(refusal, said)
    assert not run.exists()


def test_a_run_goes_on_with_as_many_as_it_began_with(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    flip = CASES["flip"]
    flip.train(processes(1), tmp_path / "run", folders)
    with pytest.raises(AssertionError, match=r"engine\.virtual_processes was 4 and is now 2"):
        flip.train(processes(1), tmp_path / "run", folders, virtual=2)


# ------------------------------------------------------------------------------------------------
# In this process, without a run.


class OneLayer(Engine):
    """As much of an engine as a step of virtual processes asks for."""

    def __init__(self) -> None:
        self.objective = cast(Objective, nn.Linear(3, 2, bias=False))
        self.run = Run(Path("nowhere"), 0, 1, 0, torch.device("cpu"), logging.getLogger("frugal"))
        self._scale = None


OneLayer.__abstractmethods__ = frozenset()


def compute_step(compute: Callable[[VirtualTrainer, Sequence[Any]], Any]) -> tuple[Any, nn.Linear]:
    """What a step of four virtual processes gives, and the layer with its gradient.

    The only batch of each is its number.
    """
    engine = OneLayer()  # type: ignore[abstract]
    numbers = cast(list[Batch], [0, 1, 2, 3])
    recipe = replace(RECIPES["demo"](), engine=EngineOptions(virtual_processes=4))
    result = step_of_virtual_processes(engine, recipe, 0, numbers, compute)
    return result, cast(nn.Linear, engine.objective)


def test_what_others_make_of_a_row_comes_back_to_it() -> None:
    inputs = torch.arange(24.0).view(4, 2, 3)
    factors = torch.arange(4 * 8.0).view(4, 8, 1)

    def compute(trainer: VirtualTrainer, batches: Sequence[int]) -> torch.Tensor:
        rank, world_size = place_in_world()
        assert world_size == 4 and rank == batches[0]
        own = trainer.forward(inputs[rank])
        everywhere = gather(own)  # (8, 2)
        loss = (everywhere * factors[rank]).sum() + sum_over_processes(own.sum().square())
        trainer.backward(loss)
        return trainer.mean(loss.detach())

    mean, layer = compute_step(compute)
    rows = layer(inputs.view(8, 3))
    losses_of = [(rows * factors[rank]).sum() for rank in range(4)]
    squares = rows.view(4, -1).sum(1).square().sum()
    expected = torch.stack(losses_of).mean() + squares
    (gradient,) = torch.autograd.grad(expected, layer.parameters())
    torch.testing.assert_close(mean, expected.detach())
    torch.testing.assert_close(layer.weight.grad, gradient)


def test_a_mistake_of_one_ends_the_step_of_all() -> None:
    before = threading.active_count()

    def compute(trainer: VirtualTrainer, batches: Sequence[int]) -> None:
        if batches[0] == 2:
            raise InputError("no captions")
        trainer.mean(torch.zeros(1))

    with pytest.raises(InputError, match="no captions"):
        compute_step(compute)
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "a thread goes on waiting for its turn"
        time.sleep(0.01)


def test_data_that_knows_of_no_virtual_processes_is_refused() -> None:
    recipe = replace(RECIPES["demo"](), batch_size=8, engine=EngineOptions(virtual_processes=4))
    device = torch.device("cpu")
    run = Run(Path("nowhere"), 0, 1, 0, device, logging.getLogger("frugal"))
    training = cast(Training, SimpleNamespace(recipe=recipe, run=run, meter=Meter(device)))
    whole = Batch(
        images=torch.zeros(8, 3, 2, 2), sample_numbers=torch.arange(8), valid=torch.ones(8).bool()
    )
    parts = [whole.rows(start, start + 2) for start in range(0, 8, 2)]
    with StopSignal(grace=0.0) as stop:
        assert len(_read_step(training, 0, iter(parts), stop)) == 4
        with pytest.raises(InputError, match=r"PairData gives a process 8 samples.* each .* has 2"):
            _read_step(training, 0, iter([whole] * 4), stop)
