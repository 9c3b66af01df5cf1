"""Who owns which sample: every sample once, whatever does not divide by what."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from distconv.data.shard import Shards, batches, epoch_order, split

SIZES = range(1, 9)


@pytest.mark.parametrize("size", SIZES)
def test_split_covers_the_range_once_in_order_in_parts_that_differ_by_one_at_most(size):
    for n in range(50):
        parts = [split(n, size, rank) for rank in range(size)]
        assert [i for part in parts for i in range(n)[part]] == list(range(n))
        # Also as bare numbers, since loops run from start to stop.
        lengths = [len(range(n)[part]) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert parts[0].start == 0
        assert parts[-1].stop == n
        assert all(left.stop == right.start for left, right in pairwise(parts))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (10, 4), (97, 10), (100, 10), (5, 100), (64, 7)])
def test_an_epoch_visits_every_sample_once_over_all_batches_and_ranks(n, batch_size, size):
    order = epoch_order(seed=3, epoch=0, n=n)
    visited = []
    for batch in range(batches(n, batch_size)):
        parts = [Shards(size, size, rank).samples(order, batch, batch_size) for rank in range(size)]
        together = np.concatenate(parts)
        # The batch does not depend on the number of ranks, and only the last one may be smaller.
        np.testing.assert_array_equal(together, order[batch * batch_size :][:batch_size])
        assert len(together) == min(batch_size, n - batch * batch_size)
        visited.extend(together.tolist())
    assert sorted(visited) == list(range(n))


def test_the_last_batch_is_shared_out_too_and_may_leave_ranks_without_samples():
    order = epoch_order(seed=0, epoch=0, n=22)
    assert batches(22, 10) == 3
    assert [len(Shards(4, 4, rank).samples(order, 2, 10)) for rank in range(4)] == [1, 1, 0, 0]
    assert [len(Shards(4, 4, rank).samples(order, 1, 10)) for rank in range(4)] == [3, 3, 2, 2]


@pytest.mark.parametrize("count", [1, 3, 8, 13])
def test_the_shards_are_the_same_ones_whichever_rank_has_them(count):
    for n in (0, 5, 13, 97):
        wanted = [list(range(n)[split(n, count, shard)]) for shard in range(count)]
        for size in range(1, count + 1):
            shards, most = [], 0
            for rank in range(size):
                mine = Shards(count, size, rank)
                assert len(mine.own) == len(mine.parts(n)) >= 1
                samples = range(n)[mine.part(n)]
                shards += [list(samples[part]) for part in mine.parts(n)]
                most = max(most, len(mine.own))
            assert shards == wanted and mine.most == most


def test_every_epoch_and_seed_has_an_order_of_its_own_that_comes_back():
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(25)}
    assert len(set(orders.values())) == 100
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert tuple(epoch_order(2, 7, 50)) == orders[2, 7]
