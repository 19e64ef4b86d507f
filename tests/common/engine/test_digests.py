"""A digest belongs to the bits, wherever and in how many parts they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from frugal.common.contracts import Batch
from frugal.common.engine import digests
from frugal.common.engine.digests import digest, from_hex, sample_digests, to_hex
from host_reads import nothing_is_read


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a small tensor is many of them."""
    monkeypatch.setitem(digests._CHUNK, "cpu", 8)
    monkeypatch.setattr(digests, "_WEIGHTS", 20)
    digests._weights.cache_clear()
    yield
    digests._weights.cache_clear()


def by_hand(values: torch.Tensor) -> int:
    """Word by word in Python's integers."""
    content = values.numpy().tobytes()
    content += bytes(-len(content) % 8)
    words = [int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content), 8)]
    upper = [(word >> 32) - (word >> 63 << 32) for word in words]  # of signed numbers
    mixed = [word + 128 * half for word, half in zip(words, upper, strict=True)]
    weights = digests._weights(torch.device("cpu")).tolist()
    factors = [weights[place % 20] * (2 * (place // 20) + 1) for place in range(len(mixed))]
    return sum(word * factor for word, factor in zip(mixed, factors, strict=True)) % 2**64


@pytest.mark.parametrize("count", [1, 2, 7, 32, 33, 34, 129])
def test_parts_of_a_tensor_give_the_digest_of_the_whole(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    with nothing_is_read():
        whole = digest(values)
    assert whole.item() % 2**64 == by_hand(values)
    for cut in range(count + 1):
        # the second part lies at a place in memory that no 64-bit word begins at
        parts = [part for part in ((0, values[:cut]), (cut, values[cut:])) if len(part[1])]
        assert sum(digest(part, start) for start, part in parts).item() == whole.item()


def test_every_bit_and_every_place_counts() -> None:
    values = torch.randn(67)
    known = {digest(values).item()}
    for place in range(67):
        for bit in (0, 17, 31):
            changed = values.clone()
            changed.view(torch.int32)[place] ^= (1 << bit) - (1 << 32) * (bit == 31)
            known.add(digest(changed).item())
    for first in range(66):  # two signs at a time, and two numbers that change places
        for second in range(first + 1, 67):
            changed = values.clone()
            changed[[first, second]] *= -1
            known.add(digest(changed).item())
            changed = values.clone()
            changed[[first, second]] = changed[[second, first]]
            known.add(digest(changed).item())
    assert len(known) == 1 + 3 * 67 + 67 * 66


def test_a_sample_has_its_digest_in_every_batch() -> None:
    batch = Batch(
        images=torch.randint(256, (5, 3, 7, 9), dtype=torch.uint8),
        sample_numbers=torch.arange(40, 45),
        valid=torch.tensor([True, True, False, True, True]),
        token_ids=torch.randint(99, (5, 11)),
        text_lengths=torch.full((5,), 11),
    )
    with nothing_is_read():
        found = sample_digests(batch)
    assert len(found.unique()) == 5
    assert torch.equal(sample_digests(batch.rows(1, 4)), found[1:4])
    for change in ("images", "sample_numbers", "token_ids", "text_lengths"):
        changed = getattr(batch, change).clone()
        changed[2] += 1
        differs = sample_digests(replace(batch, **{change: changed})) != found
        assert differs.tolist() == [False, False, True, False, False], change
    other = sample_digests(replace(batch, valid=torch.ones(5, dtype=torch.bool)))
    assert (other != found).tolist() == [False, False, True, False, False]


def test_digests_are_written_and_read_as_digits() -> None:
    some = digests._on_host(torch.tensor([0, -1, 2**62, -(2**63)]))
    assert to_hex(some) == "0" * 16 + "f" * 16 + "4" + "0" * 15 + "8" + "0" * 15
    assert from_hex(to_hex(some)).tolist() == some.tolist()
