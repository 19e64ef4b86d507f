"""Random numbers that belong to a sample or to a step, never to a process.

What belongs to a sample (its crop, its mask) is a pure function of (seed, purpose, number of the
sample in the run), so that any number of processes, loader workers or restarts sees the same
draw. On the device this is counter-based noise: a vectorized 64-bit integer hash that gives the
same bits on CPU and GPU. In the loader it is a NumPy generator keyed by the same numbers.

What belongs to the model (dropout, drop path) comes from torch's generators, seeded anew for
every step by :func:`seed_step`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor
from typing_extensions import override

_MULTIPLIER_1 = -0x40A7B892E31B1A47  # splitmix64's 0xBF58476D1CE4E5B9 as a signed integer
_MULTIPLIER_2 = -0x6B2FB644ECCEEE15  # splitmix64's 0x94D049BB133111EB
_GOLDEN_RATIO = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15


def stable_key(*words: int | str) -> int:
    """A signed 64-bit key that depends on nothing but the words given."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(state: Tensor) -> Tensor:
    """The output function of splitmix64, on int64 with wrap-around."""
    for shift, multiplier in ((30, _MULTIPLIER_1), (27, _MULTIPLIER_2), (31, None)):
        # int64 shifts are arithmetic: the mask makes them logical
        state = state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))
        if multiplier is not None:
            state = state * multiplier
    return state


def uniform_noise(key: int, sample_numbers: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) with 24 random bits, one row per sample.

    Args:
        key: from :func:`stable_key`; names the seed and the purpose.
        sample_numbers: (B,) int64, on the device where the noise is wanted.
        count: numbers per sample.

    Returns:
        (B, count) float32 on the device of ``sample_numbers``; bit-identical on every device.
    """
    counter = torch.arange(1, count + 1, device=sample_numbers.device)  # (count,)
    row = mix((sample_numbers + 1) * _GOLDEN_RATIO + key)  # (B,)
    bits = mix(row[:, None] + counter * _GOLDEN_RATIO)  # (B, count)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / float(1 << 24)


class NoiseSource(Protocol):
    """Where a token reduction gets its random numbers."""

    def uniform(self, purpose: str, count: int) -> Tensor:
        """(B, count) float32 in [0, 1); the same numbers for the same purpose."""
        ...


@dataclass(frozen=True)
class SampleNoise:
    """Noise that is a pure function of (seed, purpose, sample number)."""

    seed: int
    sample_numbers: Tensor
    """(B,) int64: the number of each sample since the start of the run."""

    def uniform(self, purpose: str, count: int) -> Tensor:
        """(B, count) float32 in [0, 1)."""
        return uniform_noise(stable_key(self.seed, purpose), self.sample_numbers, count)


@dataclass(frozen=True)
class RecordedNoise:
    """Noise that was recorded elsewhere: golden cases, replays."""

    recorded: dict[str, Tensor] = field(default_factory=dict)
    """(B, count) per purpose."""

    def uniform(self, purpose: str, count: int) -> Tensor:
        """The recorded numbers.

        Raises:
            ValueError: if nothing of this purpose and width was recorded.
        """
        noise = self.recorded.get(purpose)
        if noise is None or noise.shape[1] != count:
            shape = None if noise is None else tuple(noise.shape)
            raise ValueError(f"no recorded noise {purpose!r} of {count} numbers (have {shape})")
        return noise


def sample_generator(seed: int, purpose: str, sample_number: int) -> np.random.Generator:
    """The generator of one sample for one purpose (crop, flip, choice of caption)."""
    key = stable_key(seed, purpose, sample_number) & 0xFFFFFFFFFFFFFFFF
    return np.random.Generator(np.random.Philox(_Key(key)))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """The key of a Philox: ``Philox(key=key)``, without the entropy that NumPy would collect first.

    That would take four times as long as all the rest, for every sample.
    """

    def __init__(self, key: int) -> None:
        self._key = key

    @override
    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Both words of the key, as Philox takes them from a seed."""
        return np.array([self._key, 0], dtype=np.uint64)


def weight_generator(seed: int) -> torch.Generator:
    """The generator that the weights of a run are drawn from before its first step."""
    return torch.Generator().manual_seed(stable_key(seed, "weights") >> 1)


def random_states(device: torch.device) -> list[Tensor]:
    """Where torch's generators stand, on the CPU and on a device."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Bring them back to where :func:`random_states` found them."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators on every device for what the model draws in one step."""
    torch.manual_seed(stable_key(seed, "model", step, rank) & 0x7FFFFFFFFFFFFFFF)
