"""64-bit digests of what a step is computed from and of its gradient, by the bits.

The digest of a row of bytes is the sum of its 64-bit words, each times an odd number drawn for its
place, modulo 2**64; the upper half of every word is added to it first, as a flip of the
highest bit is the same after every multiplication. A change of one 32-bit number is always seen,
and parts of a tensor that lie on several processes give the digest of the whole as their sum.

Everything is computed on the device and stays there until a log line asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from frugal.common.contracts import Batch
from frugal.common.distributed import gather
from frugal.common.engine.engine import Engine, GradientPart
from frugal.common.randomness import mix, stable_key

_CHUNK = {"cpu": 1 << 14, "cuda": 1 << 20}
"""Words of a tensor that are summed at a time: what a cache holds, or what keeps a GPU busy."""
_WEIGHTS = 1 << 20
"""Places that have a weight of their own; of the places behind them it is multiplied."""
GROUPS = 1024
"""A batch is told apart in that many groups of samples at most."""


@lru_cache(2)
def _weights(device: torch.device) -> Tensor:
    """(WEIGHTS,) int64: odd numbers, which have an inverse modulo 2**64, drawn once for all."""
    return mix((torch.arange(_WEIGHTS, device=device) + 1) * stable_key("digest")) | 1


def _pieces(words: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Of words (..., W) from a place on: pieces, their weights, and the factor of these."""
    weights, chunk = _weights(words.device), _CHUNK[words.device.type]
    begin, count = 0, words.shape[-1]
    while begin < count:
        turn, place = divmod(first + begin, _WEIGHTS)
        length = min(chunk, _WEIGHTS - place, count - begin)
        piece = words[..., begin : begin + length]
        yield (
            (piece >> 32).bitwise_left_shift_(7).add_(piece),
            weights[place : place + length],
            2 * turn + 1,
        )
        begin += length


def digest(values: Tensor, start: int = 0) -> Tensor:
    """(): int64 of a float32 tensor, which may be a part of a larger one from a place on."""
    words = _words(values.detach().reshape(1, -1), before=start % 2)[0]
    sums = [_dot(*pair) * factor for *pair, factor in _pieces(words, start // 2)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _words(rows: Tensor, before: int = 0) -> Tensor:
    """(B, words of 8 bytes) int64: rows (B, ...) of any dtype, with zeros before and behind."""
    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    per_word = 8 // flat.element_size()
    padding = before, -(before + flat.shape[1]) % per_word
    if any(padding):
        flat = functional.pad(flat, padding)
    elif flat.storage_offset() % per_word or not flat.is_contiguous():
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.int64)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    # of integers CUDA has no inner product; on a CPU it needs no memory
    return left.dot(right) if left.device.type == "cpu" else (left * right).sum()


def sample_digests(batch: Batch) -> Tensor:
    """(B,) int64: of everything that is computed with a sample, its number and pixels included."""
    total = torch.zeros_like(batch.sample_numbers)
    for name, rows in sorted(vars(batch).items()):
        if isinstance(rows, Tensor) and rows.numel():  # images may be none, of stored vectors
            total = total + (stable_key(name) | 1) * _digest_rows(rows)
    return mix(total)


def _digest_rows(rows: Tensor) -> Tensor:
    words = _words(rows.to(torch.uint8) if rows.dtype == torch.bool else rows)
    return sum(
        ((piece * weights).sum(1) * factor for piece, weights, factor in _pieces(words, 0)),
        start=torch.zeros(len(words), dtype=torch.int64, device=words.device),
    )


def parameter_digests(parts: Iterable[GradientPart], count: int, device: torch.device) -> Tensor:
    """(count,) int64: of every parameter's gradient, as far as this process holds it."""
    digests = [torch.zeros((), dtype=torch.int64, device=device)] * count
    for part in parts:  # of every parameter one at most
        digests[part.parameter] = digest(part.values, part.start).to(device)
    return torch.stack(digests)


@dataclass(frozen=True)
class PendingDigests:
    """The digests of a step on the device, of what this process has of it."""

    step: int
    """Steps of the run that are done with it, itself included."""
    parameters: Tensor
    """(P,) int64 of gradients, in the order of :meth:`Engine.trainable`; a sum over processes."""
    samples: Tensor
    """(M, B) int64 of the samples of each micro-batch."""


@dataclass(frozen=True)
class StepDigests:
    """The digests of a step on the host, of all processes."""

    step: int
    parameters: np.ndarray
    """(P,) uint64 of gradients."""
    samples: np.ndarray
    """(G,) uint64 of groups of samples, in the order of the batch; of each sample where there are
    no more than 1024."""
    gradient: str
    """64 bits of all parameters."""
    batch: str
    """64 bits of all samples."""


def digest_step(
    engine: Engine, step: int, batches: Sequence[Batch], micro_batches: int
) -> PendingDigests:
    """The digests of a step whose gradient is summed and not yet clipped; nothing is read.

    Args:
        engine: that holds the gradient.
        step: steps of the run that are done with this one.
        batches: of this process; of every micro-batch as many in a row as it stands for virtual
            processes.
        micro_batches: number of them.
    """
    count = sum(1 for _ in engine.trainable())
    parameters = parameter_digests(engine.gradient_parts(), count, engine.run.device)
    # those of virtual processes side by side, as if they were of one
    samples = torch.stack([sample_digests(batch) for batch in batches]).view(micro_batches, -1)
    return PendingDigests(step, parameters, samples)


def fetch_digests(pending: Sequence[PendingDigests]) -> list[StepDigests]:
    """The digests of steps on the host: one exchange between the processes and one wait."""
    if not pending:
        return []
    parameters = gather(torch.stack([step.parameters for step in pending])[None]).sum(0)  # (S, P)
    samples = gather(torch.stack([step.samples for step in pending])[None])  # (W, S, M, B)
    # the parts of the processes side by side are a micro-batch
    samples = samples.permute(1, 2, 0, 3).flatten(1)  # (S, M W B)
    found = []
    for step, of_parameters, of_samples in zip(
        pending, _on_host(parameters), _on_host(samples), strict=True
    ):
        groups = np.array_split(of_samples, min(GROUPS, len(of_samples)))
        found.append(
            StepDigests(
                step=step.step,
                parameters=of_parameters,
                samples=np.array([group.sum(dtype=np.uint64) for group in groups]),
                gradient=digest_all(of_parameters),
                batch=digest_all(of_samples),
            )
        )
    return found


def weight_digests(tensors: Mapping[str, Tensor], names: Sequence[str]) -> np.ndarray:
    """(P,) uint64 of weights on the CPU, by name; every process brings those that it has."""
    zero = torch.zeros((), dtype=torch.int64)
    parts = [digest(tensors[name]) if name in tensors else zero for name in names]
    return _on_host(torch.stack(parts))


def current_weight_digests(engine: Engine) -> np.ndarray:
    """(P,) uint64 of an engine's weights as they are; every process calls this."""
    found = [digest(engine.read("weight", p).float()) for _, p in engine.trainable()]
    return np.array([int(value) for value in found], np.int64).view(np.uint64)


def _on_host(digests: Tensor) -> np.ndarray:
    return digests.cpu().numpy().view(np.uint64)


def digest_all(digests: np.ndarray) -> str:
    """64 bits of all of them, as 16 digits."""
    return hashlib.blake2b(digests.astype("<u8").tobytes(), digest_size=8).hexdigest()


def to_hex(digests: np.ndarray) -> str:
    """16 digits each."""
    return digests.astype(">u8").tobytes().hex()


def from_hex(digits: str) -> np.ndarray:
    """The inverse of :func:`to_hex`; raises ``ValueError`` for anything else."""
    return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)
