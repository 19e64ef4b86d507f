"""What optimizer, ZeRO and DDP keep beside a step, and the fullest moment of all of it.

Sizes follow from the numbers of the parameters, as DeepSpeed 0.19.8 (``runtime/zero``) and torch's
DDP lay them out for float32 weights: flat copies of parts, moments, gradients by stage, buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.plan.fake_step import StepMemory

_BYTES = 4
"""Of a number of a weight, gradient or moment."""
_ALL_REDUCE_AT_ONCE = 500_000_000
"""Numbers that DeepSpeed copies together at stage 0 (``MEMORY_OPT_ALLREDUCE_SIZE``)."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What of a DeepSpeed file decides about memory and communication."""

    stage: int = 0
    bucket: int = 500_000_000
    """Numbers of gradients that are exchanged together."""
    buckets: int = 1
    """Two where communication overlaps with the backward pass at stages 1 and 2."""
    prefetch: int = 50_000_000
    """Stage 3: numbers of weights that are gathered together ahead of their use."""
    reuse_distance: int = 1_000_000_000
    """Stage 3: weights stay gathered that are used again within so many numbers."""
    offload_moments: bool = False
    """Master weights, moments and gradients are in the memory of the host."""
    offload_weights: bool = False
    """Stage 3: the parts of the weights too."""

    @classmethod
    def read(cls, path: Path) -> Zero:
        """From a file of ``ds_configs/``.

        Raises:
            InputError: if it is not there, or is none.
        """
        if not path.is_file():
            raise InputError(f"there is no DeepSpeed file {path}; give one of ds_configs/")
        zero = read_json_object(path).get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            raise InputError(
                f"the DeepSpeed file {path} names no stage of ZeRO that there is (zero_optimization"
                f" is {zero}); write one from 0 to 3"
            )
        bucket, prefetch, distance = (
            _number(zero, name, default, path)
            for name, default in (
                ("reduce_bucket_size", cls.bucket),
                ("stage3_prefetch_bucket_size", cls.prefetch),
                ("stage3_max_reuse_distance", cls.reuse_distance),
            )
        )
        return cls(
            stage=stage,
            bucket=bucket,
            prefetch=prefetch,
            buckets=2 if stage in (1, 2) and zero.get("overlap_comm") else 1,
            reuse_distance=distance,
            offload_moments=_is_on_host(zero.get("offload_optimizer")),
            offload_weights=stage == 3 and _is_on_host(zero.get("offload_param")),
        )


def _number(zero: dict[str, Any], name: str, default: int, path: Path) -> int:
    value = zero.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise InputError(f"the DeepSpeed file {path} sets {name} to {value!r}; give a number")
    return int(value)


def _is_on_host(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") != "none"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at its fullest moment, by what they are for."""

    weights: int
    """Those of towers, frozen ones and teachers included; at stage 3 the part and what is
    gathered."""
    master_weights: int = 0
    """The float32 part that the optimizer of ZeRO steps, and an average of the weights."""
    moments: int = 0
    gradients: int = 0
    buffers: int = 0
    """Buckets and flat copies of gradients."""
    activations: int = 0
    loss: int = 0
    """What the loss makes beyond what the towers left behind."""
    inputs: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, item.name) for item in fields(self))


def peak_memory(
    step: StepMemory,
    zero: Zero | None,
    *,
    world_size: int,
    moments: float,
    accumulate: int = 1,
    averages: bool = False,
) -> Memory:
    """The fullest moment of a step, its backward passes and the optimizer's.

    Args:
        step: of one micro-batch.
        zero: how it is divided among the processes; None for Accelerate.
        world_size: processes.
        moments: numbers that the optimizer keeps for each that is trained.
        accumulate: micro-batches of a step, all of which are on the device.
        averages: whether an average of the weights is kept.
    """
    moment_list = _moments(step, zero or Zero(), ddp=zero is None, world_size=world_size,
                           moments=moments, accumulate=accumulate)  # fmt: skip
    average = -(-_BYTES * step.num_trained // world_size) * averages
    fullest = max(moment_list, key=lambda memory: memory.total)
    values = {item.name: getattr(fullest, item.name) for item in fields(Memory)}
    values["inputs"] = accumulate * step.batch
    values["master_weights"] += average
    return Memory(**values)


def _moments(
    step: StepMemory, zero: Zero, *, ddp: bool, world_size: int, moments: float, accumulate: int
) -> Iterator[Memory]:
    """Moments of the backward pass, the exchange behind it and the optimizer's step."""
    whole = _BYTES * step.num_trained
    part = -(-whole // world_size) if zero.stage else whole
    bucket = _BYTES * zero.bucket
    filled = min(bucket, whole)
    on_device = not zero.offload_moments
    fixed = {
        "weights": _weights(step, zero, world_size, gathered=0),
        "master_weights": part * (zero.stage > 0) * on_device,
        "moments": round(moments * part) * on_device,
    }
    largest = _BYTES * max(step.trainable, default=0)
    # a flat copy is exchanged: of a bucket, or of a gradient that is larger than one
    copied = min(max(bucket, largest), whole)
    offload_buffer = largest * (not on_device) * (zero.stage in (1, 2))
    ddp_buckets = whole * (ddp and world_size > 1)
    for moment in step.moments:
        done = _BYTES * (step.num_trained if accumulate > 1 else moment.gradients)
        begun = _BYTES * moment.gradients
        if zero.stage in (0, 1):
            gradients, buffers = done, ddp_buckets
            if zero.stage == 1 and begun:
                buffers = zero.buckets * bucket
        elif zero.stage == 2:
            is_reduced = begun >= filled or accumulate > 1
            gradients = part * is_reduced * on_device * (1 + (accumulate > 1 and begun >= filled))
            buffers = (zero.buckets * bucket + copied * (begun >= filled)) * (begun > 0)
        else:
            gradients = part * on_device
            # weights are gathered in one flat tensor, from which each is copied
            ahead = min(_BYTES * zero.prefetch, whole - begun) * (world_size > 1)
            buffers = bucket + max(ahead, copied * (begun >= filled))
        gathered = whole - begun if zero.stage == 3 and world_size > 1 else 0
        yield Memory(
            **fixed | {"weights": _weights(step, zero, world_size, gathered=gathered)},
            gradients=gradients,
            buffers=buffers + offload_buffer,
            activations=moment.activations - moment.loss,
            loss=moment.loss,
        )
    yield from _last_moments(zero, fixed, ddp=ddp, whole=whole, part=part, copied=copied)


def _last_moments(
    zero: Zero, fixed: dict[str, int], *, ddp: bool, whole: int, part: int, copied: int
) -> Iterator[Memory]:
    """When the backward pass is through: gradients are exchanged, then the weights stepped."""
    bucket, on_device = _BYTES * zero.bucket, not zero.offload_moments
    if zero.stage == 0:
        copies = 0 if ddp else min(whole, _BYTES * _ALL_REDUCE_AT_ONCE)
        yield Memory(**fixed, gradients=whole, buffers=copies)
        return
    held = part * on_device
    if zero.stage == 1:
        # whole gradients move through the bucket: its copy takes the place of what moved
        beyond = copied * (copied > bucket)
        yield Memory(**fixed, gradients=whole + held, buffers=zero.buckets * bucket + beyond)
    else:
        yield Memory(**fixed, gradients=held, buffers=zero.buckets * bucket + copied)
    # the optimizer steps one flat copy of the part; at stage 3 the bucket is never given back
    yield Memory(**fixed, gradients=2 * held, buffers=bucket * (zero.stage == 3))


def _weights(step: StepMemory, zero: Zero, world_size: int, *, gathered: int) -> int:
    """Bytes of the weights; at stage 3 the part of the process and what is gathered."""
    if zero.stage < 3:
        return step.weights
    part = 0 if zero.offload_weights else -(-step.weights // world_size)
    # what stands x numbers before the end is used again after 2 x of them
    return part + min(gathered, _BYTES * zero.reuse_distance // 2)


def host_memory(step: StepMemory, zero: Zero | None, *, world_size: int, moments: float) -> int:
    """Bytes of the host that one process offloads into: parts of what its optimizer steps."""
    if zero is None or not zero.offload_moments:
        return 0
    part = -(-_BYTES * step.num_trained // world_size)
    # master weights, gradients and, at stage 2, what goes back to the device
    copies = 2 + moments + (zero.stage == 2)
    return round(copies * part) + part * zero.offload_weights


def exchanged(
    step: StepMemory, zero: Zero | None, *, world_size: int, gathered: int = 0
) -> dict[str, int]:
    """Bytes that one process sends in a step with one micro-batch, by what they are.

    ``gathered`` is how many numbers the optimizer needs whole where each process has a piece.

    A ring sends (W - 1) / W of a tensor to gather it or to add it up in parts, and twice that to
    add it up on every process. DeepSpeed adds whole buckets up on every process at stages 1 and 2
    (``use_multi_rank_bucket_allreduce``).
    """
    whole = _BYTES * step.num_trained * (world_size - 1) // world_size
    stage = 0 if zero is None else zero.stage
    gradients = whole if stage == 3 else 2 * whole
    weights = {0: 0, 1: whole, 2: whole, 3: 2 * whole}[stage]
    pieces = _BYTES * gathered * (world_size - 1) // world_size if stage else 0
    sent = {"gradients": gradients, "weights": weights, "loss": step.exchanged}
    return sent | ({"optimizer": pieces} if pieces else {})
