"""Choosing the sequences that a step trains on: a pure function of the seed, the epoch and the global position.

Positions count sequences over the whole run and all processes. Epoch ``e`` is one permutation of all sequences, drawn
from (seed, e). Epochs follow one another without a gap, so a step may span two epochs, and nothing is dropped, repeated
or padded at the end of an epoch. Resuming requires only the number of consumed sequences, takes the same time for any
such number, and gives the same order with any number of processes.

With weighted sources, an epoch still has as many sequences as the data, and each source contributes its share of them
(`Mixture`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.sequences.packing import Sequences
from zeta_core.failures import InvalidData

# Distinguishes the draw of positions in a mixture from the orders of its sources, which have the same seed.
_MIXTURE_DRAW = 0x9A1C


class Sampler:
    """Draws the epochs of ``num_sequences`` from ``seed`` and, in a mixture, the number of the ``source``."""

    def __init__(self, num_sequences: int, seed: int, *source: int) -> None:
        assert num_sequences > 0
        self.num_sequences = num_sequences
        self._seed = (seed, *source)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The sequences of one epoch. The two most recent epochs are cached."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = self._drawn(epoch)
        return self._orders[epoch]

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        return _generator(*self._seed, epoch).permutation(self.num_sequences)

    def sequences(self, first: int, last: int) -> NDArray[np.int64]:
        """The sequences at global positions ``first`` to ``last`` (exclusive)."""
        parts: list[NDArray[np.int64]] = []
        while first < last:
            epoch, offset = divmod(first, self.num_sequences)
            stop = min(self.num_sequences, offset + last - first)
            parts.append(self.order(epoch)[offset:stop])
            first += stop - offset
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class Mixture(Sampler):
    """Draws from several sources by ``shares``, which sum to one. Source ``k`` starts at sequence ``bounds[k]``.

    Each source has its own order and epochs. It continues where the previous epoch of the mixture stopped, so no
    sequence is repeated before all others of its source have been used. If a source contributes c sequences to an
    epoch, the j-th one has a random position within the j-th of c equal parts of the epoch, so each step has about the
    shares. Raises `InvalidData` for a source without sequences, or with a share of less than one sequence.
    """

    def __init__(self, bounds: NDArray[np.int64], shares: Sequence[float], seed: int) -> None:
        super().__init__(int(bounds[-1]), seed)
        self.bounds = bounds
        self.per_epoch = _apportioned(shares, self.num_sequences)
        for number, (held, taken, share) in enumerate(zip(np.diff(bounds), self.per_epoch, shares, strict=True)):
            if not held:
                raise InvalidData(
                    f"dataset.{number} has a weight, but no sequence to train on; provide more data, or remove it."
                )
            if not taken:
                raise InvalidData(
                    f"dataset.{number}.weight is a share of {share:.2g}, less than one of the {self.num_sequences} "
                    "sequences of an epoch; raise it, or remove the source."
                )
        self._sources = [Sampler(int(held), seed, number) for number, held in enumerate(np.diff(bounds))]

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        generator = _generator(*self._seed, _MIXTURE_DRAW, epoch)
        parts: list[NDArray[np.int64]] = []
        positions: list[NDArray[np.float64]] = []
        for source, first, count in zip(self._sources, self.bounds, self.per_epoch, strict=False):
            parts.append(first + source.sequences(epoch * count, (epoch + 1) * count))
            positions.append((np.arange(count) + generator.random(count)) / count)
        return np.concatenate(parts)[np.argsort(np.concatenate(positions), kind="stable")]

    def seen(self, num_sequences: int) -> list[int]:
        """The number of sequences of each source among the first ``num_sequences`` of a run."""
        epochs, rest = divmod(num_sequences, self.num_sequences)
        owners = np.searchsorted(self.bounds[1:], self.order(epochs)[:rest], "right")
        in_rest = np.bincount(owners, minlength=len(self.per_epoch)).tolist()
        return [epochs * count + more for count, more in zip(self.per_epoch, in_rest, strict=True)]


def build_sampler(sequences: Sequences, seed: int) -> Sampler:
    """The order of a run over these sequences. Raises `InvalidData`."""
    if sequences.shares is None:
        return Sampler(len(sequences), seed)
    return Mixture(sequences.source_bounds, sequences.shares, seed)


def _apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Integers that add up to ``total``, each within one of its share: the largest remainders are rounded up."""
    exact = np.array(shares) * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts.tolist()


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
