"""The order of training: complete, reproducible, and the same for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from zeta_core.data.sequences import Sampler, largest_micro_batch, micro_batches


def test_every_epoch_has_every_sequence_once_in_a_new_order() -> None:
    sampler = Sampler(101, seed=3)
    first, second = sampler.sequences(0, 101), sampler.sequences(101, 202)
    assert sorted(first) == sorted(second) == list(range(101))
    assert first.tolist() != second.tolist()


def test_the_order_depends_only_on_seed_and_position() -> None:
    whole = Sampler(50, seed=7).sequences(0, 175)
    late = Sampler(50, seed=7)
    assert late.sequences(120, 175).tolist() == whole[120:].tolist()
    assert late.sequences(0, 50).tolist() == whole[:50].tolist()
    assert Sampler(50, seed=8).sequences(0, 175).tolist() != whole.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 5, 12, 24])
def test_ranks_together_train_each_sequence_of_a_window_once(world_size: int, size: int) -> None:
    window = np.arange(100, 100 + size)
    ranks = [list(micro_batches(window, micro_batch=3, world_size=world_size, rank=rank)) for rank in range(world_size)]
    counted = [int(row) for rank in ranks for rows, counting in rank for row in rows[:counting]]
    assert sorted(counted) == window.tolist()
    shapes = {tuple(len(rows) for rows, _ in rank) for rank in ranks}
    assert len(shapes) == 1, "every rank has the same micro-steps, or a collective would hang"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 5, 12, 24, 25])
def test_the_largest_micro_batch_is_that_of_all_ranks(world_size: int, size: int) -> None:
    widths = np.random.default_rng(size).integers(1, 100, size)
    window = np.arange(size)
    ranks = [list(micro_batches(window, micro_batch=3, world_size=world_size, rank=rank)) for rank in range(world_size)]
    sizes = [len(rows) * widths[rows].max() for rank in ranks for rows, _ in rank]
    assert largest_micro_batch(widths, micro_batch=3, world_size=world_size) == max(sizes)
