"""Batches: the tensors of a micro-batch, and the division of a global batch into micro-batches.

Shapes: B sequences, T tokens each, K positions with logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from zeta_core.data.tokens import TokenFile

IGNORED = -100  # the label that cross-entropy ignores
LOGITS_MULTIPLE = 64  # the number of positions with logits is a multiple of this
MAX_LOGITS_SHARE = 0.9  # if more positions need logits, all of them get logits


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on its device. ``labels`` are not shifted: position t is predicted from earlier positions."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor | None  # a number for each token's document, -1 for padding; None: one document each
    num_targets: int
    logit_positions_K: torch.Tensor | None = None  # those with a target, and some more; None means all positions

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        segments = None if self.segments_BT is None else moved(self.segments_BT)
        logit_positions = None if self.logit_positions_K is None else moved(self.logit_positions_K)
        ids, labels, positions = moved(self.ids_BT), moved(self.labels_BT), moved(self.positions_BT)
        return MicroBatch(ids, labels, positions, segments, self.num_targets, logit_positions)


def make_batch(
    tokens: TokenFile,
    at_BT: NDArray[np.int64],
    document_BT: NDArray[np.int64],
    num_counting: int,
    *,
    isolate: bool,
) -> MicroBatch:
    """The tokens at the positions ``at_BT`` as tensors on the CPU. Only the first ``num_counting`` rows have targets.

    ``document_BT`` is a number for each token's document, -1 for padding. With ``isolate``, the batch contains it if
    any sequence has several documents.
    """
    length = at_BT.shape[1]
    inside_BT = document_BT >= 0
    indices_BT = tokens.where(at_BT)
    ids_BT = tokens.ids[indices_BT].astype(np.int64)
    begins_BT = np.ones_like(inside_BT)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    begin_at_BT = np.maximum.accumulate(np.where(begins_BT, np.arange(length), 0), axis=1)
    ignored_BT = begins_BT | ~inside_BT
    if tokens.supervised is not None:
        ignored_BT |= ~tokens.supervised[indices_BT]
    labels_BT = np.where(ignored_BT, IGNORED, ids_BT)
    labels_BT[num_counting:] = IGNORED
    several = isolate and bool(begins_BT[:, 1:].any())
    return MicroBatch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(labels_BT),
        torch.from_numpy(np.arange(length) - begin_at_BT),
        torch.from_numpy(document_BT) if several else None,
        int((labels_BT != IGNORED).sum()),
        _positions_with_logits(labels_BT),
    )


def _positions_with_logits(labels_BT: NDArray[np.int64]) -> torch.Tensor | None:
    """The positions that need logits, extended to a multiple of `LOGITS_MULTIPLE` so that few shapes occur."""
    needed_T = np.zeros(labels_BT.shape[1], dtype=bool)
    needed_T[:-1] = (labels_BT[:, 1:] != IGNORED).any(0)
    num_needed = int(needed_T.sum())
    num_kept = -(-max(1, num_needed) // LOGITS_MULTIPLE) * LOGITS_MULTIPLE
    if num_kept > MAX_LOGITS_SHARE * len(needed_T):
        return None
    needed_T[np.flatnonzero(~needed_T)[: num_kept - num_needed]] = True
    return torch.from_numpy(np.flatnonzero(needed_T))


def micro_batches(
    window: NDArray[np.int64], *, micro_batch: int, world_size: int, rank: int
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Split one global batch: yield this rank's sequences for each micro-step, and how many of them count.

    Every rank gets the same number of micro-steps, and the same number of rows in each. If the last batch of a run is
    not full, a rank without a sequence of its own gets a repeated one that does not count.
    """
    for start in range(0, len(window), micro_batch * world_size):
        rows = window[start : start + micro_batch * world_size]
        own = rows[rank::world_size]
        wanted = -(-len(rows) // world_size)
        filler = np.repeat(rows[:1], wanted - len(own))
        yield np.concatenate((own, filler)), len(own)


def largest_micro_batch(widths: NDArray[np.int64], *, micro_batch: int, world_size: int) -> int:
    """The number of positions in the largest of the `micro_batches` of all ranks, padding included.

    ``widths`` are the positions of each sequence of the global batch, which must not be empty.
    """
    starts = np.arange(0, len(widths), micro_batch * world_size)
    num_rows = -(-np.minimum(len(widths) - starts, micro_batch * world_size) // world_size)
    return int((num_rows * np.maximum.reduceat(widths, starts)).max())
