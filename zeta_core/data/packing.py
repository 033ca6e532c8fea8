"""Token files become sequences of ``seq_len``: packed, with documents kept apart; or one document each.

Text is packed without padding: a document goes on in the next sequence. Conversations are never cut: each lies whole in
one sequence, which is filled by best fit, and `Fit` says what became of those longer than ``seq_len``. Of sources
with shares each is cut and packed by itself, so that a sequence is of one source.

Shapes: B sequences, T tokens of each. A *segment* is the part of one document in one sequence; attention stays within
it, positions count from its start, and its first token is never a target (its context is another document).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.data.tokens import TokenFile
from zeta_core.failures import InvalidData

IGNORED = -100  # the label that cross-entropy leaves out
Overlong = Literal["error", "truncate", "drop"]
ASKED_MULTIPLE, ASKED_SHARE = 64, 0.9  # positions that a model is asked about: a multiple of so many, or all above it
PIECE_TOKENS = 1 << 22  # looked at together when learned tokens are counted


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device; ``labels`` are not shifted: position t is predicted from what is before it."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor | None  # a number for each token's document, -1 for padding; None: one document each
    num_targets: int
    asked_K: torch.Tensor | None = None  # positions whose next token some row learns, and a few more; None: all

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        segments = None if self.segments_BT is None else moved(self.segments_BT)
        asked = None if self.asked_K is None else moved(self.asked_K)
        ids, labels, positions = moved(self.ids_BT), moved(self.labels_BT), moved(self.positions_BT)
        return Batch(ids, labels, positions, segments, self.num_targets, asked)


@dataclass(frozen=True)
class Fit:
    """What became of documents that are longer than a sequence; places are those of the first one."""

    num_truncated: int = 0
    num_dropped: int = 0
    num_cut_tokens: int = 0
    truncated_at: str | None = None
    dropped_at: str | None = None


class Sequences:
    """The sequences of a token file, by index.

    ``overlong`` says what happens to a document longer than ``seq_len``; ``None``: text goes on in the next sequence,
    and a conversation is truncated. Raises `InvalidData` for ``"error"``, naming the first.
    """

    def __init__(
        self, tokens: TokenFile, seq_len: int, *, pack: bool, overlong: Overlong | None = None, together: int = 1
    ) -> None:
        """Of ``together`` documents in turn, all are taken or none."""
        self._tokens = tokens
        self._offsets = np.asarray(tokens.offsets)
        self.seq_len = seq_len
        self.pack = pack
        self.fit = Fit()
        self._starts: NDArray[np.int64] | None = None  # of each part of a document that is one sequence or lies in one
        self._ends: NDArray[np.int64] | None = None
        self._bins: _Bins | None = None
        self._num_targets: NDArray[np.int64] | None = None  # of each sequence, where they are not told by the offsets
        source_starts = self._offsets[tokens.source_bounds]
        if tokens.has_whole_documents or overlong is not None:
            self._starts, self._ends, self.fit = _fitted(tokens, seq_len, overlong, together)
            self._num_targets = _learned(tokens, self._starts, self._ends)
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
        """Of each source, of the sequences seen; ``None``: each sequence is seen equally often."""
        return None if self._tokens.mix is None else self._tokens.mix.shares

    @property
    def source_bounds(self) -> NDArray[np.int64]:
        """The first sequence of each source with a share, and the number of all."""
        if self._starts is None:
            return np.array([0, self._count], dtype=np.int64)
        starts = self._starts if self._bins is None else self._starts[self._bins.parts[self._bins.firsts[:-1]]]
        source_starts = self._offsets[self._tokens.source_bounds]
        owner = np.searchsorted(source_starts[1:], starts, "right")
        return np.cumsum(np.concatenate(([0], np.bincount(owner, minlength=len(source_starts) - 1))), dtype=np.int64)

    @property
    def pads(self) -> bool:
        """Whether sequences are shorter than the place they have: not where text flows from one to the next."""
        return not self.pack or self._bins is not None

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence in its batch; those that are not packed are as long as the longest beside them."""
        return self.seq_len if self.pack else self.num_tokens(np.arange(len(self))) / max(1, len(self))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        if self.pack:
            return self.seq_len
        starts, ends = self.spans(np.arange(self._count))
        return int((ends - starts).max(initial=0))

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and one-past-last token of each sequence that is one stretch of tokens."""
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

    def num_places(self, indices: NDArray[np.int64]) -> int:
        """The tokens that these sequences have room for; without packing that is what they hold."""
        return self.seq_len * len(indices) if self.pack else self.num_tokens(indices)

    def num_learned(self, indices: NDArray[np.int64]) -> int:
        """How many of their tokens are learned, whatever the loss is the mean over."""
        return Sequences.num_targets(self, indices)

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """How many tokens of these sequences are learned: at most all but the first of each segment."""
        if self._num_targets is not None:
            return int(self._num_targets[indices].sum())
        starts, ends = self.spans(indices)
        inner = np.searchsorted(self._offsets, ends, "left") - np.searchsorted(self._offsets, starts, "right")
        return int((ends - starts - 1 - inner).sum())

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> Batch:
        """The sequences as tensors on the CPU; those after the first ``num_counting`` have no targets."""
        at_BT, document_BT = self._stretches(indices) if self._bins is None else self._filled(indices, self._bins)
        length = at_BT.shape[1]
        inside_BT = document_BT >= 0
        places_BT = self._tokens.where(at_BT)
        ids_BT = self._tokens.ids[places_BT].astype(np.int64)
        begins_BT = np.ones_like(inside_BT)
        begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
        begin_at_BT = np.maximum.accumulate(np.where(begins_BT, np.arange(length), 0), axis=1)
        ignored_BT = begins_BT | ~inside_BT
        if self._tokens.supervised is not None:
            ignored_BT |= ~self._tokens.supervised[places_BT]
        labels_BT = np.where(ignored_BT, IGNORED, ids_BT)
        labels_BT[num_counting:] = IGNORED
        several = isolate and bool(begins_BT[:, 1:].any())
        return Batch(
            torch.from_numpy(ids_BT),
            torch.from_numpy(labels_BT),
            torch.from_numpy(np.arange(length) - begin_at_BT),
            torch.from_numpy(document_BT) if several else None,
            int((labels_BT != IGNORED).sum()),
            _asked(labels_BT),
        )

    def _stretches(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions, and the document of each (-1: padding), of sequences that are one stretch of tokens."""
        starts, ends = self.spans(indices)
        length = int((ends - starts).max())  # of packed ones only the last is shorter, and may be alone here
        at_BT = starts[:, None] + np.arange(length)
        inside_BT = at_BT < ends[:, None]
        at_BT = np.minimum(at_BT, ends[:, None] - 1)
        document_BT = np.searchsorted(self._offsets, at_BT, "right")
        document_BT[~inside_BT] = -1
        return at_BT, document_BT

    def _filled(self, indices: NDArray[np.int64], bins: _Bins) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same of sequences that are filled with whole documents."""
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


def _asked(labels_BT: NDArray[np.int64]) -> torch.Tensor | None:
    """The positions that a model need be asked about, filled up to a multiple so that few shapes occur."""
    asked_T = np.zeros(labels_BT.shape[1], dtype=bool)
    asked_T[:-1] = (labels_BT[:, 1:] != IGNORED).any(0)
    num_asked = int(asked_T.sum())
    num_kept = -(-max(1, num_asked) // ASKED_MULTIPLE) * ASKED_MULTIPLE
    if num_kept > ASKED_SHARE * len(asked_T):
        return None
    asked_T[np.flatnonzero(~asked_T)[: num_kept - num_asked]] = True
    return torch.from_numpy(np.flatnonzero(asked_T))


# --- Whole documents --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bins:
    """Which parts lie in which sequence: those of sequence ``s`` are ``parts[firsts[s]:firsts[s + 1]]``."""

    parts: NDArray[np.int64]
    firsts: NDArray[np.int64]
    num_tokens: NDArray[np.int64]

    @staticmethod
    def filled(lengths: NDArray[np.int64], capacity: int) -> _Bins:
        """Best fit, longest part first: the sequence with the least room that is enough.

        ``rooms`` has bit r set where a sequence has room for r tokens, so the search is one shift of a number.
        """
        rooms = 0
        with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
        contents: list[list[int]] = []
        in_order = np.argsort(-lengths, kind="stable")
        for part, length in zip(in_order.tolist(), lengths[in_order].tolist(), strict=True):
            enough = rooms >> length
            if enough:
                room = length + (enough & -enough).bit_length() - 1
                sequence = with_room[room].pop()
                if not with_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, sequence = capacity, len(contents)
                contents.append([])
            contents[sequence].append(part)
            if room > length:
                with_room[room - length].append(sequence)
                rooms |= 1 << (room - length)
        parts = np.array([part for some in contents for part in some], dtype=np.int64)
        firsts = np.cumsum([0, *map(len, contents)], dtype=np.int64)
        bins = _Bins(parts, firsts, np.empty(0, np.int64))
        return _Bins(parts, firsts, bins.sums(lengths))

    @staticmethod
    def joined(bins: Sequence[_Bins]) -> _Bins:
        """Those of parts that follow one another."""
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


def _fitted(
    tokens: TokenFile, seq_len: int, overlong: Overlong | None, together: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Fit]:
    """Start and end of every part that is trained on: a document or, of text that is longer, its parts."""
    offsets = np.asarray(tokens.offsets)
    starts, ends = offsets[:-1].copy(), offsets[1:].copy()
    too_long = (ends - starts > seq_len) & (tokens.whole_D | (overlong is not None))
    first = int(np.argmax(too_long))
    if overlong == "error" and too_long.any():
        raise InvalidData(
            f"{tokens.place(first)}: has {ends[first] - starts[first]} tokens, more than the {seq_len} of seq_len, as "
            f"{int(too_long.sum())} of {len(starts)} documents.",
            hint="Raise seq_len, or set overlong to 'truncate' or 'drop'.",
            patch={"overlong": "truncate"},
            evidence={"overlong_documents": int(too_long.sum()), "longest_tokens": int((ends - starts).max())},
        )
    kept = ~too_long if overlong == "drop" else np.ones_like(too_long)
    cut = too_long & kept
    whole = ends - starts
    ends[cut] = starts[cut] + seq_len
    kept[cut] = _learned(tokens, starts[cut], ends[cut]) > 0  # an answer may lie beyond the cut
    kept = kept.reshape(-1, together).all(axis=1).repeat(together)
    cut &= kept
    dropped = ~kept
    fit = Fit(
        num_truncated=int(cut.sum()),
        num_dropped=int(dropped.sum()),
        num_cut_tokens=int(whole[cut].sum()) - seq_len * int(cut.sum()),
        truncated_at=tokens.place(int(np.argmax(cut))) if cut.any() else None,
        dropped_at=tokens.place(int(np.argmax(dropped))) if dropped.any() else None,
    )
    starts, ends = _parts(starts[kept], ends[kept], seq_len)
    useful = _learned(tokens, starts, ends) > 0
    return starts[useful], ends[useful], fit


def _learned(tokens: TokenFile, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens of each stretch are learned; its first one never is."""
    if tokens.supervised is None or not len(starts):
        return ends - starts - 1
    begins, stops = tokens.where(starts) + 1, tokens.where(ends - 1) + 1
    counts = np.zeros(len(starts), dtype=np.int64)
    # They follow one another in the file, which is read in pieces: it may be larger than memory.
    edges = np.searchsorted(begins, np.arange(begins[0], begins[-1] + PIECE_TOKENS, PIECE_TOKENS))
    for low, high in pairwise(np.append(edges, len(begins)).tolist()):
        if low < high:
            at = int(begins[low])
            before = np.cumsum(np.append(False, tokens.supervised[at : int(stops[high - 1])]), dtype=np.int64)
            counts[low:high] = before[stops[low:high] - at] - before[begins[low:high] - at]
    return counts


def _predicting(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those stretches of more than a single token, which predicts nothing."""
    useful = ends - starts >= 2
    return starts[useful], ends[useful]


def _parts(
    first: NDArray[np.int64], last: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and end of every part of at most ``seq_len`` tokens of each stretch."""
    parts = -(-(last - first) // seq_len)
    owner = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = first[owner] + number * seq_len
    return starts, np.minimum(starts + seq_len, last[owner])
