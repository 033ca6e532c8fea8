"""Which sequences a step trains on: a pure function of seed, epoch and global position.

Positions count sequences over the whole run and all processes. Epoch ``e`` is one permutation of all sequences, drawn
from (seed, e); the epochs follow one another without a gap, so a step may span two of them and nothing is dropped,
repeated or padded at an epoch's end. A run resumes from the number of consumed sequences alone, in time that does not
depend on it, and reads the same order with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class Sampler:
    def __init__(self, num_sequences: int, seed: int) -> None:
        assert num_sequences > 0
        self.num_sequences = num_sequences
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of one epoch; the last two are kept."""
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, epoch))))
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = generator.permutation(self.num_sequences)
        return self._orders[epoch]

    def sequences(self, first: int, last: int) -> NDArray[np.int64]:
        """The sequences at global positions ``first`` to ``last`` (not included)."""
        parts: list[NDArray[np.int64]] = []
        while first < last:
            epoch, offset = divmod(first, self.num_sequences)
            stop = min(self.num_sequences, offset + last - first)
            parts.append(self.order(epoch)[offset:stop])
            first += stop - offset
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def micro_batches(
    window: NDArray[np.int64], *, micro_batch: int, world_size: int, rank: int
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Split one global batch: yields this rank's sequences of each micro-step, and how many of them count.

    Every rank gets the same number of micro-steps, and in one of them the same number of rows: where the last
    window of a run is not full, a rank without a sequence of its own repeats one that counts for nothing.
    """
    for start in range(0, len(window), micro_batch * world_size):
        rows = window[start : start + micro_batch * world_size]
        own = rows[rank::world_size]
        wanted = -(-len(rows) // world_size)
        filler = np.repeat(rows[:1], wanted - len(own))
        yield np.concatenate((own, filler)), len(own)
