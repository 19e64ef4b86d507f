"""What ZeRO, DDP and optimizers keep, against sums by hand; DeepSpeed files as they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from frugal.common.errors import InputError
from frugal.common.plan.fake_step import Moment, StepMemory
from frugal.common.plan.partition import Zero, exchanged, host_memory, peak_memory
from support import ROOT

N = 1_000_000
STEP = StepMemory(
    weights=4 * N,
    trainable=(400_000, 600_000),
    frozen=0,
    batch=1_000,
    moments=(Moment(0, 50 * N, 2 * N), Moment(600_000, 30 * N, 0), Moment(N, 10 * N, 0)),
    tokens={},
    exchanged=7_000,
)
"""Activations that are more than everything else: the fullest moment is before any gradient."""


def bytes_of(zero: Zero | None, *, world_size: int = 4, **options: int) -> dict[str, int]:
    memory = peak_memory(STEP, zero, world_size=world_size, moments=2, **options)
    parts = vars(memory)
    assert memory.total == sum(parts.values())
    assert parts["activations"] == 48 * N and parts["loss"] == 2 * N
    return {
        name: parts[name] / N for name in parts if name not in ("activations", "loss", "inputs")
    }


def test_parts_of_four_processes_at_every_stage() -> None:
    small = {"bucket": 1_000, "prefetch": 1_000}
    names = ("weights", "master_weights", "moments", "gradients")
    expected = {0: (4, 0, 8, 0), 1: (4, 1, 2, 0), 2: (4, 1, 2, 0), 3: (1 + 4, 1, 2, 1)}
    for stage, parts in expected.items():
        found = bytes_of(Zero(stage=stage, **small))
        assert tuple(found[name] for name in names) == parts


def test_ddp_has_buckets_of_all_gradients_and_one_process_has_none() -> None:
    assert bytes_of(None)["buffers"] == 4
    assert bytes_of(None, world_size=1)["buffers"] == 0


def test_accumulated_gradients_are_there_from_the_beginning() -> None:
    assert bytes_of(None, accumulate=2)["gradients"] == 4
    assert bytes_of(Zero(stage=2, bucket=1_000), accumulate=2)["gradients"] == 1


def test_offloaded_parts_are_on_the_host() -> None:
    zero = Zero(stage=2, bucket=1_000, offload_moments=True)
    found = bytes_of(zero)
    assert found["moments"] == found["master_weights"] == 0
    # master weights, two moments, gradients, what goes back to the device: 5 x 4 bytes over 4
    assert host_memory(STEP, zero, world_size=4, moments=2) == 5 * N
    assert host_memory(STEP, None, world_size=4, moments=2) == 0


def test_a_step_without_activations_is_fullest_when_gradients_are_exchanged() -> None:
    bare = StepMemory(**{**vars(STEP), "moments": (Moment(N, 0, 0),)})
    memory = peak_memory(bare, Zero(stage=0), world_size=4, moments=2)
    # weights, moments, gradients and DeepSpeed's flat copy of them
    assert memory.total - memory.inputs == (4 + 8 + 4 + 4) * N


def test_communication_of_a_ring() -> None:
    ring = 3 * N  # 4 bytes of N numbers, three quarters of them
    assert exchanged(STEP, None, world_size=4) == {
        "gradients": 2 * ring, "weights": 0, "loss": 7_000,
    }  # fmt: skip
    assert exchanged(STEP, Zero(stage=3), world_size=4)["weights"] == 2 * ring
    assert exchanged(STEP, None, world_size=1)["gradients"] == 0
    # an optimizer of whole matrices: nothing is gathered where every process has them
    assert exchanged(STEP, Zero(stage=1), world_size=4, gathered=100)["optimizer"] == 300
    for zero in (None, Zero(stage=0)):
        assert "optimizer" not in exchanged(STEP, zero, world_size=4, gathered=100)


def test_every_file_of_ds_configs_is_read() -> None:
    found = {path.stem: Zero.read(path) for path in (ROOT / "ds_configs").glob("*.json")}
    assert {name: zero.stage for name, zero in found.items()} == {
        "zero0": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3,
    }  # fmt: skip
    assert found["zero2"].buckets == 2  # overlap_comm
    assert found["zero3_offload"].offload_weights and not found["zero2_offload"].offload_weights


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"zero_optimization": {"stage": 4}}', "names no stage of ZeRO"),
        ('{"zero_optimization": 2}', "names no stage of ZeRO"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', "give a number"),
        ("[1]", "must hold a JSON object"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "zero.json").write_text(content)
    with pytest.raises(InputError, match=words):
        Zero.read(tmp_path / "zero.json")
    with pytest.raises(InputError, match="there is no DeepSpeed file"):
        Zero.read(tmp_path / "gone.json")
