import pickle

import numpy as np
import pytest

from frugal.common.data.order import GlobalOrder, WeightedOrder
from frugal.common.errors import InputError

COUNTS = [7, 1, 0, 12, 5, 3, 0, 9]


def every_sample(counts):
    return {(shard, index) for shard, count in enumerate(counts) for index in range(count)}


def located(order, numbers):
    shards, indices = order.locate(np.asarray(numbers))
    return list(zip(shards.tolist(), indices.tolist(), strict=True))


@pytest.mark.parametrize("window", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sample_comes_exactly_once_per_epoch(window, epoch):
    order = GlobalOrder(COUNTS, seed=3, window=window)
    assert order.samples == sum(COUNTS)
    found = located(order, range(epoch * order.samples, (epoch + 1) * order.samples))
    assert len(found) == sum(COUNTS)
    assert set(found) == every_sample(COUNTS)


def test_a_place_does_not_depend_on_what_else_is_asked():
    order = GlobalOrder(COUNTS, seed=3, window=2)
    numbers = np.random.default_rng(0).permutation(5 * order.samples)
    whole = dict(zip(numbers.tolist(), located(order, numbers), strict=True))
    fresh = GlobalOrder(COUNTS, seed=3, window=2)
    for number in numbers[:60].tolist():
        assert located(fresh, [number]) == [whole[number]]
    straddling = [order.samples - 1, order.samples, 3 * order.samples]
    assert located(fresh, straddling) == [whole[number] for number in straddling]


def test_samples_are_mixed_within_a_window_of_shards_and_not_beyond():
    counts = [10] * 12
    order = GlobalOrder(counts, seed=1, window=3)
    shards, indices = order.locate(np.arange(order.samples))
    windows = [set(shards[start : start + 30].tolist()) for start in range(0, 120, 30)]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert set().union(*windows) == set(range(12))
    first = shards[:30].tolist()
    assert first != sorted(first, key=first.index)  # not shard after shard
    assert indices[:30].tolist() != list(range(10)) * 3


def test_epochs_seeds_and_sources_are_ordered_differently():
    def epoch(number, **options):
        order = GlobalOrder(COUNTS, **{"seed": 0, "window": 3} | options)
        return located(order, range(number * order.samples, (number + 1) * order.samples))

    orders = [epoch(0), epoch(1), epoch(0, seed=1), epoch(0, source=1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_an_order_survives_the_way_to_a_spawned_process():
    order = GlobalOrder(COUNTS, seed=3, window=2)
    order.locate(np.arange(10))
    copy = pickle.loads(pickle.dumps(order))
    assert located(copy, range(80)) == located(order, range(80))


def test_weighted_sources_keep_their_shares_and_their_own_epochs():
    sources = [[50, 60], [7], [30, 1]]
    order = WeightedOrder(sources, [0.7, 0.2, 0.1], seed=5, window=2)
    shards, indices = order.locate(np.arange(3 << 14))
    source_of = np.array([0, 0, 1, 2, 2])[shards]
    shares = np.bincount(source_of[: 1 << 14]) / (1 << 14)
    assert np.abs(shares - [0.7, 0.2, 0.1]).max() < 1 / (1 << 14)
    first_of = {0: 0, 1: 2, 2: 3}
    for number, counts in enumerate(sources):
        own = source_of == number
        found = list(zip(shards[own] - first_of[number], indices[own], strict=True))
        size = sum(counts)
        for start in range(0, len(found) - size, size):
            assert set(found[start : start + size]) == every_sample(counts)
    # every stretch of the stream is a mixture, not one source after the other
    assert all(
        len(set(source_of[start : start + 200].tolist())) == 3 for start in range(0, 16000, 200)
    )


def test_weighted_places_do_not_depend_on_what_else_is_asked():
    order = WeightedOrder([[5, 6], [7]], [1, 3], seed=5, window=2)
    numbers = np.arange(0, 60_000, 997)
    assert [located(order, [number])[0] for number in numbers] == located(order, numbers)


def test_a_share_too_small_to_occur_is_refused():
    with pytest.raises(InputError, match="fewer than one of 16,384"):
        WeightedOrder([[5], [7]], [1.0, 1e-6], seed=0, window=2)
