"""Cutting token files into sequences of ``seq_len``: packed, with documents kept apart, or one document each.

Text is packed without padding: a document continues in the next sequence. A conversation is never split: each one is
contained in one sequence, sequences are filled by best fit, and `OverlongCounts` counts the conversations that are
longer than ``seq_len``. Weighted sources are cut and packed separately, so each sequence comes from one source.

Shapes: B sequences, T tokens each. A *segment* is the part of one document in one sequence: attention stays within it,
positions count from its start, and its first token is never a target, because its context is another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.sequences.batch import MicroBatch, make_batch
from zeta_core.data.tokens import TokenFile
from zeta_core.failures import InvalidData

Overlong = Literal["error", "truncate", "drop"]
PIECE_TOKENS = 1 << 22  # processed at a time when target tokens are counted


@dataclass(frozen=True)
class OverlongCounts:
    """How documents longer than a sequence were handled. The locations are those of the first such document."""

    num_truncated: int = 0
    num_dropped: int = 0
    num_cut_tokens: int = 0
    truncated_at: str | None = None
    dropped_at: str | None = None


class Sequences:
    """The sequences of a token file, by index.

    ``overlong`` determines what happens to a document longer than ``seq_len``. With ``None``, text continues in the
    next sequence, and a conversation is truncated. With ``"error"``, raises `InvalidData` naming the first one.
    """

    def __init__(
        self, tokens: TokenFile, seq_len: int, *, pack: bool, overlong: Overlong | None = None, group_size: int = 1
    ) -> None:
        """Each group of ``group_size`` consecutive documents is used or dropped as a whole."""
        self._tokens = tokens
        self._offsets = np.asarray(tokens.offsets)
        self.seq_len = seq_len
        self.pack = pack
        self.overlong_counts = OverlongCounts()
        self._starts: NDArray[np.int64] | None = None  # of each part of a document, which never spans two sequences
        self._ends: NDArray[np.int64] | None = None
        self._bins: _Bins | None = None
        self._num_targets: NDArray[np.int64] | None = None  # per sequence, unless the offsets determine it
        source_starts = self._offsets[tokens.source_bounds]
        if tokens.has_whole_documents or overlong is not None:
            self._starts, self._ends, self.overlong_counts = _fit_to_length(tokens, seq_len, overlong, group_size)
            self._num_targets = _count_targets(tokens, self._starts, self._ends)
            if pack:
                lengths, bounds = self._ends - self._starts, np.searchsorted(self._starts, source_starts)
                self._bins = _Bins.joined([_Bins.filled(lengths[a:b], seq_len) for a, b in pairwise(bounds)])
                self._num_targets = self._bins.sums(self._num_targets)
            self._count = len(self._num_targets)
        elif pack and tokens.mix is not None:
            self._starts, self._ends = _predicting(*_parts(source_starts[:-1], source_starts[1:], seq_len))
            self._count = len(self._starts)
        elif pack:
            full, rest = divmod(tokens.num_tokens, seq_len)
            self._count = full + (rest >= 2)  # a single token predicts nothing
        else:
            self._starts, self._ends = _predicting(*_parts(self._offsets[:-1], self._offsets[1:], seq_len))
            self._count = len(self._starts)

    def __len__(self) -> int:
        return self._count

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Each source's share of the sequences seen; ``None`` if each sequence is seen equally often."""
        return None if self._tokens.mix is None else self._tokens.mix.shares

    @property
    def source_bounds(self) -> NDArray[np.int64]:
        """The first sequence of each weighted source, and the total number."""
        if self._starts is None:
            return np.array([0, self._count], dtype=np.int64)
        starts = self._starts if self._bins is None else self._starts[self._bins.parts[self._bins.firsts[:-1]]]
        source_starts = self._offsets[self._tokens.source_bounds]
        owner = np.searchsorted(source_starts[1:], starts, "right")
        return np.cumsum(np.concatenate(([0], np.bincount(owner, minlength=len(source_starts) - 1))), dtype=np.int64)

    @property
    def pads(self) -> bool:
        """Whether sequences may need padding. Text that continues from one sequence to the next needs none."""
        return not self.pack or self._bins is not None

    @property
    def mean_length(self) -> float:
        """The mean number of tokens per sequence, with the padding of packed sequences but not that of others."""
        return self.seq_len if self.pack else self.num_tokens(np.arange(len(self))) / max(1, len(self))

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        if self.pack:
            return self.seq_len
        starts, ends = self.spans(np.arange(self._count))
        return int((ends - starts).max(initial=0))

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The start and end (exclusive) of each sequence, for sequences that are one range of tokens."""
        assert self._bins is None, "a filled sequence has several"
        if self._starts is not None and self._ends is not None:
            return self._starts[indices], self._ends[indices]
        starts = indices * self.seq_len
        return starts, np.minimum(starts + self.seq_len, self._tokens.num_tokens)

    def num_tokens(self, indices: NDArray[np.int64]) -> int:
        if self._bins is not None:
            return int(self._bins.num_tokens[indices].sum())
        starts, ends = self.spans(indices)
        return int((ends - starts).sum())

    def capacity(self, indices: NDArray[np.int64]) -> int:
        """The capacity of these sequences in tokens. Without packing, it is the number of their tokens."""
        return self.seq_len * len(indices) if self.pack else self.num_tokens(indices)

    def widths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of positions of each sequence in a batch in which none is longer."""
        if self._bins is not None:
            return np.full(len(indices), self.seq_len, dtype=np.int64)
        starts, ends = self.spans(indices)
        return ends - starts

    def num_target_tokens(self, indices: NDArray[np.int64]) -> int:
        """The number of target tokens, even if the loss is not a mean over tokens."""
        return Sequences.num_targets(self, indices)

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """The number of target tokens in these sequences. The first token of a segment is never a target."""
        if self._num_targets is not None:
            return int(self._num_targets[indices].sum())
        starts, ends = self.spans(indices)
        inner = np.searchsorted(self._offsets, ends, "left") - np.searchsorted(self._offsets, starts, "right")
        return int((ends - starts - 1 - inner).sum())

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> MicroBatch:
        """The sequences as tensors on the CPU. Only the first ``num_counting`` have targets."""
        at_BT, document_BT = self._ranges(indices) if self._bins is None else self._filled(indices, self._bins)
        return make_batch(self._tokens, at_BT, document_BT, num_counting, isolate=isolate)

    def _ranges(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The positions of sequences that are one range of tokens, and the document of each (-1 for padding)."""
        starts, ends = self.spans(indices)
        length = int((ends - starts).max())  # if packed, only the last one is shorter, maybe alone here
        at_BT = starts[:, None] + np.arange(length)
        inside_BT = at_BT < ends[:, None]
        at_BT = np.minimum(at_BT, ends[:, None] - 1)
        document_BT = np.searchsorted(self._offsets, at_BT, "right")
        document_BT[~inside_BT] = -1
        return at_BT, document_BT

    def _filled(self, indices: NDArray[np.int64], bins: _Bins) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same as `_ranges`, for sequences that are filled with whole documents."""
        assert self._starts is not None
        assert self._ends is not None
        at_BT = np.zeros((len(indices), self.seq_len), dtype=np.int64)
        document_BT = np.full((len(indices), self.seq_len), -1, dtype=np.int64)
        for row, index in enumerate(indices.tolist()):
            filled = 0
            for part in bins.parts_in(index):
                start, end = int(self._starts[part]), int(self._ends[part])
                stop = filled + end - start
                at_BT[row, filled:stop] = np.arange(start, end)
                document_BT[row, filled:stop] = part
                filled = stop
        return at_BT, document_BT


# --- Whole documents --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bins:
    """The assignment of parts to sequences: sequence ``s`` contains ``parts[firsts[s]:firsts[s + 1]]``."""

    parts: NDArray[np.int64]
    firsts: NDArray[np.int64]
    num_tokens: NDArray[np.int64]

    @staticmethod
    def filled(lengths: NDArray[np.int64], capacity: int) -> _Bins:
        """Best fit, longest part first: each part goes into the sequence with the least free space that suffices.

        Bit r of ``free_sizes`` is set if a sequence has space for r tokens, so the search is one shift of an integer.
        """
        free_sizes = 0
        with_free: list[list[int]] = [[] for _ in range(capacity + 1)]
        contents: list[list[int]] = []
        in_order = np.argsort(-lengths, kind="stable")
        for part, length in zip(in_order.tolist(), lengths[in_order].tolist(), strict=True):
            enough = free_sizes >> length
            if enough:
                free = length + (enough & -enough).bit_length() - 1
                sequence = with_free[free].pop()
                if not with_free[free]:
                    free_sizes &= ~(1 << free)
            else:
                free, sequence = capacity, len(contents)
                contents.append([])
            contents[sequence].append(part)
            if free > length:
                with_free[free - length].append(sequence)
                free_sizes |= 1 << (free - length)
        parts = np.array([part for some in contents for part in some], dtype=np.int64)
        firsts = np.cumsum([0, *map(len, contents)], dtype=np.int64)
        bins = _Bins(parts, firsts, np.empty(0, np.int64))
        return _Bins(parts, firsts, bins.sums(lengths))

    @staticmethod
    def joined(bins: Sequence[_Bins]) -> _Bins:
        """The bins of consecutive ranges of parts as one."""
        if len(bins) == 1:
            return bins[0]
        before = np.cumsum([0, *(len(some.parts) for some in bins)])
        return _Bins(
            np.concatenate([some.parts + first for some, first in zip(bins, before[:-1], strict=True)]),
            np.append(
                np.concatenate([b.firsts[:-1] + first for b, first in zip(bins, before, strict=False)]), before[-1]
            ),
            np.concatenate([some.num_tokens for some in bins]),
        )

    def sums(self, of_parts: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each sequence, the sum over its parts."""
        return np.add.reduceat(of_parts[self.parts], self.firsts[:-1]) if len(self.parts) else np.empty(0, np.int64)

    def parts_in(self, sequence: int) -> NDArray[np.int64]:
        return self.parts[self.firsts[sequence] : self.firsts[sequence + 1]]


def _fit_to_length(
    tokens: TokenFile, seq_len: int, overlong: Overlong | None, group_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], OverlongCounts]:
    """The start and end of every part that is trained on: a document, or the parts of a longer text."""
    offsets = np.asarray(tokens.offsets)
    starts, ends = offsets[:-1].copy(), offsets[1:].copy()
    too_long = (ends - starts > seq_len) & (tokens.whole_D | (overlong is not None))
    first = int(np.argmax(too_long))
    if overlong == "error" and too_long.any():
        raise InvalidData(
            f"{tokens.location(first)} has {ends[first] - starts[first]} tokens, more than the {seq_len} of seq_len, "
            f"as {int(too_long.sum())} of {len(starts)} documents.",
            hint="Raise seq_len, or set overlong to 'truncate' or 'drop'.",
            patch={"overlong": "truncate"},
            evidence={"overlong_documents": int(too_long.sum()), "longest_tokens": int((ends - starts).max())},
        )
    kept = ~too_long if overlong == "drop" else np.ones_like(too_long)
    cut = too_long & kept
    whole = ends - starts
    ends[cut] = starts[cut] + seq_len
    kept[cut] = _count_targets(tokens, starts[cut], ends[cut]) > 0  # the answer may have been cut off
    kept = kept.reshape(-1, group_size).all(axis=1).repeat(group_size)
    cut &= kept
    dropped = ~kept
    overlong_counts = OverlongCounts(
        num_truncated=int(cut.sum()),
        num_dropped=int(dropped.sum()),
        num_cut_tokens=int(whole[cut].sum()) - seq_len * int(cut.sum()),
        truncated_at=tokens.location(int(np.argmax(cut))) if cut.any() else None,
        dropped_at=tokens.location(int(np.argmax(dropped))) if dropped.any() else None,
    )
    starts, ends = _parts(starts[kept], ends[kept], seq_len)
    useful = _count_targets(tokens, starts, ends) > 0
    return starts[useful], ends[useful], overlong_counts


def _count_targets(tokens: TokenFile, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of target tokens in each range. The first token of a range is never a target."""
    if tokens.supervised is None or not len(starts):
        return ends - starts - 1
    begins, stops = tokens.where(starts) + 1, tokens.where(ends - 1) + 1
    counts = np.zeros(len(starts), dtype=np.int64)
    # The ranges are in file order. The file is read in pieces, because it may be larger than memory.
    edges = np.searchsorted(begins, np.arange(begins[0], begins[-1] + PIECE_TOKENS, PIECE_TOKENS))
    for low, high in pairwise(np.append(edges, len(begins)).tolist()):
        if low < high:
            at = int(begins[low])
            before = np.cumsum(np.append(False, tokens.supervised[at : int(stops[high - 1])]), dtype=np.int64)
            counts[low:high] = before[stops[low:high] - at] - before[begins[low:high] - at]
    return counts


def _predicting(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ranges with at least two tokens, because a single token predicts nothing."""
    useful = ends - starts >= 2
    return starts[useful], ends[useful]


def _parts(
    first: NDArray[np.int64], last: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The start and end of the parts, of at most ``seq_len`` tokens, into which each range is cut."""
    parts = -(-(last - first) // seq_len)
    owner = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = first[owner] + number * seq_len
    return starts, np.minimum(starts + seq_len, last[owner])
