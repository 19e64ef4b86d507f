"""How many samples each stage of an entry gets, from what short trials of all stages cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frugal.common.comparison.entries import Entry
from frugal.common.errors import InputError


@dataclass(frozen=True)
class Price:
    """What a short trial of one stage cost, beside one of the first entry."""

    speed: float
    """Samples per second over those of the first entry."""
    flops_per_sample: float
    samples_per_second: float
    evaluation_seconds: float
    """Of all evaluations, once."""
    other_seconds: float
    """Start, checkpoint and end of its process."""


def relative(speeds: Sequence[float], place: int, *, first: Sequence[int]) -> float:
    """How fast a trial was over the trials of the first entry right before and right behind it.

    A machine that is shared is faster at one time than at another; neighbors find it alike.

    Args:
        speeds: of all trials in their order.
        place: of the one that is asked for.
        first: places of the trials of the first entry.
    """
    before = [speeds[number] for number in first if number < place][-1:]
    behind = [speeds[number] for number in first if number > place][:1]
    near = [*before, *behind]
    return speeds[place] / (sum(near) / len(near))


def samples_of(
    entry: Entry,
    prices: Sequence[Price],
    *,
    first: Price,
    samples: int,
    kind: str,
    batch_sizes: Sequence[int],
) -> list[int]:
    """Samples of each stage of an entry, in whole batches.

    Args:
        entry: what is to be trained.
        prices: of its stages.
        first: of the first entry.
        samples: that the first entry trains on.
        kind: the budget that is equal: time or flops.
        batch_sizes: of its stages.

    Raises:
        InputError: if a share of the budget is less than one batch.
    """
    found = []
    for stage, price, batch in zip(entry.stages, prices, batch_sizes, strict=True):
        times = price.speed if kind == "time" else first.flops_per_sample / price.flops_per_sample
        steps = round(stage.share * samples * times / batch)
        if steps < 1:
            raise InputError(
                f"{entry.name} would train {stage.recipe} on {stage.share * samples * times:.0f} "
                f"samples, less than a batch of {batch}; raise --samples"
            )
        found.append(steps * batch)
    return found


def prices_from_json(content: Mapping[str, Any]) -> dict[str, list[Price]]:
    """Prices of the stages by the name of their entry."""
    return {name: [Price(**price) for price in prices] for name, prices in content.items()}
