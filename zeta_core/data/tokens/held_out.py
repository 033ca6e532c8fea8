"""Dividing data into a part that is trained on and a part that is held out for evaluation.

Guarantees: the rows of a file are never divided, even if a conversation became several documents, and neither are
preference pairs, exact duplicates, and rows with the same value of ``group_by``. The result depends only on the data,
the share and the seed. Memory grows by a few numbers per document.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.tokens.encoder import content_hash
from zeta_core.data.tokens.token_file import TokenFile
from zeta_core.failures import InvalidData

_PIECE_TOKENS = 1 << 22  # compared at once
_DRAW = 0x4E1D  # distinguishes the draw of held-out documents from the orders of the epochs, which have the same seed

Ranges = tuple[NDArray[np.int64], NDArray[np.int64]]  # starts and ends


@dataclass(frozen=True)
class Overlap:
    """Duplicates between or within the training data and the held-out data.

    ``num_duplicates`` held-out rows are copies of other held-out rows. ``num_removed`` documents of held-out
    conversations are not evaluated, because training data contains them, too. ``num_trained`` rows of an
    ``eval_dataset`` are copies of rows that are trained on.
    """

    num_duplicates: int = 0
    num_removed: int = 0
    num_trained: int = 0


@dataclass(frozen=True)
class HeldOutSplit:
    train: TokenFile
    held_out: TokenFile
    overlap: Overlap = Overlap()


def hold_out(tokens: TokenFile, share: float, seed: int) -> HeldOutSplit:
    """Hold out a ``share`` of the rows, drawn by ``seed``; each weighted source contributes its own share.

    If there are too few rows, the end of the longest text is held out instead, with ``share`` of all tokens. Raises
    `InvalidData` if nothing would be left for either part.
    """
    tokens = replace(tokens, hashes=document_hashes(tokens))
    units = RowClusters.of(tokens)
    held_U = np.zeros(units.number, dtype=np.bool_)
    decided_C = np.zeros(len(units.sizes_C), dtype=np.bool_)
    ends = np.array(tokens.offsets[1:])
    tails: list[Ranges] = []
    source_of_U = np.searchsorted(tokens.source_bounds[1:], units.first_U, "right")
    for source, (first, last) in enumerate(pairwise(tokens.source_bounds)):
        own_U = np.flatnonzero(source_of_U == source)
        if not len(own_U):
            continue
        num_held = round(share * len(own_U))
        if not num_held:
            tails.append(_hold_out_end(tokens, units, ends, share, slice(int(first), int(last)), num_units=len(own_U)))
            continue
        key = (seed, _DRAW) if tokens.mix is None else (seed, _DRAW, source)
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        clusters, sizes = np.unique(units.cluster_U[own_U], return_counts=True)
        free = ~decided_C[clusters]
        missing = num_held - int(held_U[own_U].sum())  # rows that belong to clusters of earlier sources may be held
        chosen = clusters[free][_choose(sizes[free], missing, draw)]
        decided_C[clusters] = True
        held_U |= np.isin(units.cluster_U, chosen)
        if held_U[own_U].all():
            raise _indivisible(units, share)
    return _split(tokens, units, held_U, ends, tails, f"{tokens.fingerprint} {share} {seed}")


def num_shared(train: TokenFile, held_out: TokenFile) -> int:
    """How many rows of the held-out data are exact copies of rows that are trained on."""
    if any(tokens.hashes is None and tokens.num_documents == 1 for tokens in (train, held_out)):
        return int(_are_equal(train, held_out))  # a flat file may be too large to be hashed
    return int(np.isin(RowClusters.of(held_out).hash_U, RowClusters.of(train).hash_U).sum())


# --- Rows that belong together ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowClusters:
    """The rows of the data: U units, each of consecutive documents, in C clusters that are never divided."""

    first_U: NDArray[np.int64]  # the first document
    hash_U: NDArray[np.uint64]
    cluster_U: NDArray[np.int64]
    sizes_C: NDArray[np.int64]
    unit_D: NDArray[np.int64]
    has_groups: bool

    @property
    def number(self) -> int:
        return len(self.first_U)

    @staticmethod
    def of(tokens: TokenFile) -> RowClusters:
        first_U, unit_D = _rows(tokens)
        hash_U = combined_hashes(document_hashes(tokens), first_U)
        cluster_U = np.unique(hash_U, return_inverse=True)[1].astype(np.int64)
        if tokens.groups is not None:
            group_U = np.unique(np.asarray(tokens.groups)[first_U], return_inverse=True)[1].astype(np.int64)
            cluster_U = _connected(cluster_U, group_U)
        cluster_U, sizes_C = _in_order(cluster_U)
        return RowClusters(first_U, hash_U, cluster_U, sizes_C, unit_D, tokens.groups is not None)


def _rows(tokens: TokenFile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first document of each row, and the row of each document."""
    number = tokens.num_documents
    begins_D = np.ones(number, dtype=np.bool_)
    if tokens.rows is not None and number:
        rows_D = np.asarray(tokens.rows)
        origin_D = np.repeat(np.arange(len(tokens.origins)), [origin.num_documents for origin in tokens.origins])
        same = (rows_D[1:] == rows_D[:-1]) & (rows_D[1:] > 0)
        begins_D[1:] = ~(same & (origin_D[1:] == origin_D[:-1])) if tokens.origins else ~same
    elif tokens.has_pairs:
        begins_D[1::2] = False
    return np.flatnonzero(begins_D), np.cumsum(begins_D) - 1


def combined_hashes(hashes_D: NDArray[np.uint64], first_U: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One hash for the documents of each unit, in order."""
    if len(first_U) == len(hashes_D):
        return hashes_D
    position_D = np.arange(len(hashes_D)) - np.repeat(first_U, np.diff(np.append(first_U, len(hashes_D))))
    return np.add.reduceat(hashes_D * (2 * position_D + 1).astype(np.uint64), first_U)


def document_hashes(tokens: TokenFile) -> NDArray[np.uint64]:
    if tokens.hashes is not None:
        return np.asarray(tokens.hashes)
    if tokens.num_documents == 1:
        return np.zeros(1, dtype=np.uint64)
    spans = pairwise(tokens.offsets.tolist())
    ids = (tokens.ids[tokens.where(np.arange(start, end))] for start, end in spans)
    return np.array([content_hash(each) for each in ids], dtype=np.uint64)


def _are_equal(first: TokenFile, second: TokenFile) -> bool:
    """Whether two token files have the same ids, compared in pieces."""
    if first.num_tokens != second.num_tokens or first.num_documents != second.num_documents:
        return False
    pieces = pairwise([*range(0, first.num_tokens, _PIECE_TOKENS), first.num_tokens])
    return all(np.array_equal(first.ids[a:b], second.ids[a:b]) for a, b in pieces)


def _connected(first_U: NDArray[np.int64], second_U: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label units so that all with the same value in either array, directly or through others, have the same label."""
    label_U = np.arange(len(first_U))
    while True:
        before = label_U
        for value_U in (first_U, second_U):
            smallest = np.full(int(value_U.max()) + 1, len(label_U))
            np.minimum.at(smallest, value_U, label_U)
            label_U = smallest[value_U]
        label_U = label_U[label_U]
        if np.array_equal(label_U, before):
            return label_U


def _in_order(label_U: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same clusters, numbered in the order of the data, and their sizes."""
    _, first, inverse, sizes = np.unique(label_U, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse], sizes[order]


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _choose(sizes: NDArray[np.int64], wanted: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Clusters in random order that have at most ``wanted`` rows together, or the smallest one if all are larger."""
    order = draw.permutation(len(sizes))
    if wanted <= 0 or not len(sizes):
        return order[:0]
    if sizes.max() == 1:
        return order[:wanted]
    chosen: list[int] = []
    for cluster in order.tolist():
        if sizes[cluster] <= wanted:
            chosen.append(cluster)
            wanted -= int(sizes[cluster])
            if not wanted:
                break
    return np.array(chosen or [order[int(np.argmin(sizes[order]))]], dtype=np.int64)


def _split(
    tokens: TokenFile,
    units: RowClusters,
    held_U: NDArray[np.bool_],
    ends: NDArray[np.int64],
    tails: list[Ranges],
    about: str,
) -> HeldOutSplit:
    held_D = held_U[units.unit_D]
    starts = np.asarray(tokens.offsets[:-1])
    evaluated_D = held_D
    if units.number < tokens.num_documents and not tokens.has_pairs:  # turns may be the same in different rows
        hashes_D = document_hashes(tokens)
        evaluated_D = held_D & ~np.isin(hashes_D, hashes_D[~held_D])
    if not evaluated_D.any() and not tails:
        raise InvalidData(
            "Every held-out turn is also in the training data, so nothing is left to evaluate; give an eval_dataset."
        )
    name = hashlib.sha256(about.encode()).hexdigest()[:32]
    held = [(starts[evaluated_D], ends[evaluated_D]), *tails]
    held_starts, held_ends = (np.concatenate(each) for each in zip(*held, strict=True))
    order = np.argsort(held_starts, kind="stable")
    held_hashes = units.hash_U[held_U]
    return HeldOutSplit(
        tokens.parts(starts[~held_D], ends[~held_D], f"{name}-train"),
        tokens.parts(held_starts[order], held_ends[order], f"{name}-eval"),
        Overlap(
            num_duplicates=len(held_hashes) - len(np.unique(held_hashes)),
            num_removed=int(held_D.sum() - evaluated_D.sum()),
        ),
    )


def _hold_out_end(
    tokens: TokenFile, units: RowClusters, ends: NDArray[np.int64], share: float, own: slice, *, num_units: int
) -> Ranges:
    """Shorten the longest document of a source, and all its copies, and return the end that is held out."""
    starts = np.asarray(tokens.offsets[:-1])
    lengths = tokens.offsets[1:][own] - starts[own]
    longest = own.start + int(np.argmax(lengths))
    whole = units.has_groups or bool(tokens.whole_D[own].any())
    kept = int(tokens.offsets[longest + 1] - starts[longest]) - max(2, round(share * int(lengths.sum())))
    if whole or kept < 2:
        rows = "the only one" if num_units == 1 else f"the {num_units}"
        raise InvalidData(
            f"eval_split is {share}, which is less than one row of {rows}; give a larger share, more data, or an "
            "eval_dataset."
        )
    hashes_D = document_hashes(tokens)
    copies = np.flatnonzero(hashes_D == hashes_D[longest])
    end = int(tokens.offsets[longest + 1])
    ends[copies] = starts[copies] + kept
    return np.array([starts[longest] + kept]), np.array([end])


def _indivisible(units: RowClusters, share: float) -> InvalidData:
    together = "the same value of group_by" if units.has_groups else "the same content"
    return InvalidData(
        f"eval_split is {share}, but the {units.number:,} rows cannot be divided, because they have {together}; give "
        "more data, or an eval_dataset."
    )
