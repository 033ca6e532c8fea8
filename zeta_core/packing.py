"""Token files become sequences of ``seq_len``: packed without padding, documents kept apart; or one document each.

Shapes: B sequences, T tokens of each. A *segment* is the part of one document in one sequence; attention stays within
it, positions count from its start, and its first token is never a target (its context is another document).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.tokens import TokenFile

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device; ``labels`` are not shifted: position t is predicted from what is before it."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask_B1TT: torch.Tensor | None  # True where attention is allowed; None: plain causal attention says the same
    num_targets: int

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        mask = None if self.mask_B1TT is None else moved(self.mask_B1TT)
        return Batch(moved(self.ids_BT), moved(self.labels_BT), moved(self.positions_BT), mask, self.num_targets)


class Sequences:
    """The sequences of a token file, by index."""

    def __init__(self, tokens: TokenFile, seq_len: int, *, pack: bool) -> None:
        self._tokens = tokens
        self._offsets = np.asarray(tokens.offsets)
        self.seq_len = seq_len
        self.pack = pack
        self._starts: NDArray[np.int64] | None = None
        self._ends: NDArray[np.int64] | None = None
        if pack:
            full, rest = divmod(tokens.num_tokens, seq_len)
            self._count = full + (rest >= 2)  # a single token predicts nothing
        else:
            self._starts, self._ends = _document_parts(self._offsets, seq_len)
            self._count = len(self._starts)

    def __len__(self) -> int:
        return self._count

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and one-past-last token of each sequence."""
        if self._starts is not None and self._ends is not None:
            return self._starts[indices], self._ends[indices]
        starts = indices * self.seq_len
        return starts, np.minimum(starts + self.seq_len, self._tokens.num_tokens)

    def num_tokens(self, indices: NDArray[np.int64]) -> int:
        starts, ends = self.spans(indices)
        return int((ends - starts).sum())

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """How many tokens of these sequences are predicted: all but the first of each segment."""
        starts, ends = self.spans(indices)
        inner = np.searchsorted(self._offsets, ends, "left") - np.searchsorted(self._offsets, starts, "right")
        return int((ends - starts - 1 - inner).sum())

    def batch(self, indices: NDArray[np.int64], num_counting: int, *, isolate: bool = True) -> Batch:
        """The sequences as tensors on the CPU; those after the first ``num_counting`` have no targets."""
        starts, ends = self.spans(indices)
        length = self.seq_len if self.pack else int((ends - starts).max())
        at_BT = starts[:, None] + np.arange(length)
        inside_BT = at_BT < ends[:, None]
        at_BT = np.minimum(at_BT, ends[:, None] - 1)
        ids_BT = self._tokens.ids[at_BT].astype(np.int64)
        document_BT = np.searchsorted(self._offsets, at_BT, "right")
        document_BT[~inside_BT] = -1
        begins_BT = np.ones_like(inside_BT)
        begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
        begin_at_BT = np.maximum.accumulate(np.where(begins_BT, np.arange(length), 0), axis=1)
        labels_BT = np.where(begins_BT | ~inside_BT, IGNORED, ids_BT)
        labels_BT[num_counting:] = IGNORED
        mask = None
        if isolate and begins_BT[:, 1:].any():
            document = torch.from_numpy(document_BT)
            same_BTT = document[:, :, None] == document[:, None, :]
            mask = (same_BTT & _causal(length)).unsqueeze(1)
        return Batch(
            torch.from_numpy(ids_BT),
            torch.from_numpy(labels_BT),
            torch.from_numpy(np.arange(length) - begin_at_BT),
            mask,
            int((labels_BT != IGNORED).sum()),
        )


def _document_parts(offsets: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and end of every part of at most ``seq_len`` tokens of every document; parts of one token are left out."""
    parts = -(-np.diff(offsets) // seq_len)
    document = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = offsets[document] + number * seq_len
    ends = np.minimum(starts + seq_len, offsets[document + 1])
    useful = ends - starts >= 2
    return starts[useful], ends[useful]


def _causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()
