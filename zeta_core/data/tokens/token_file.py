"""Documents as token ids in one flat, memory-mapped array, from which training sequences are cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.sources import Source

Ids = NDArray[np.uint16] | NDArray[np.uint32]
# The documents of these formats are never cut to fill a sequence.
WHOLE_FORMATS = ("messages", "prompt_completion", "preference", "unpaired_preference")


@dataclass(frozen=True)
class Origin:
    """The source of a range of documents, in the order of the sources. ``word`` is the word for a row (row or line)."""

    name: str
    word: str
    row_format: str
    num_documents: int
    masked: bool = False  # rows of ids whose masks exclude tokens, such as prompts
    shape: str = ""  # a well-known shape that was converted to the format

    @property
    def whole(self) -> bool:
        return self.masked or self.row_format in WHOLE_FORMATS


@dataclass(frozen=True)
class Mix:
    """Weighted sources: their ``shares`` of the sequences, which sum to one, and the source of each `Origin`."""

    shares: tuple[float, ...]
    source_of: tuple[int, ...]

    @staticmethod
    def of(sources: Sequence[Source]) -> Mix | None:
        """The mix of weighted sources; ``None`` for a single source, and without weights (sources are concatenated)."""
        weights = {source.number: source.weight for source in sources if source.weight is not None}
        if len(weights) < 2:
            return None
        assert len(weights) == len({source.number for source in sources}), "the spec rejects a weight for some alone"
        largest = max(weights.values())  # scaling avoids an infinite sum
        total = sum(weight / largest for weight in weights.values())
        shares = tuple(weights[number] / largest / total for number in sorted(weights))
        return Mix(shares, tuple(source.number for source in sources))


@dataclass(frozen=True)
class TokenFile:
    """Documents as token ids. Document ``d`` has the positions ``offsets[d]`` to ``offsets[d + 1]`` and is never empty.

    `where` maps positions to indices of ``ids`` and ``supervised``. ``supervised`` marks the tokens that are trained
    on, which never include a document's first token; ``None`` means all. A preference pair is two documents, the chosen
    one first. The counts cover all data that was read, even in `parts`. ``num_duplicates`` is ``None`` if unknown.
    """

    ids: Ids
    offsets: NDArray[np.int64]
    largest_id: int
    fingerprint: str
    supervised: NDArray[np.bool_] | None = None
    rows: NDArray[np.int64] | None = None
    hashes: NDArray[np.uint64] | None = None  # per document, of its ids
    groups: NDArray[np.uint64] | None = None  # per document, of its value of group_by
    labels: NDArray[np.bool_] | None = None  # per document, whether it is a desirable answer
    origins: tuple[Origin, ...] = ()
    num_duplicates: int | None = None
    num_empty: int = 0
    num_split: int = 0
    num_control_tokens: int = 0
    first_control_token: str = ""  # the location of the first one
    num_with_unused_turns: int = 0
    unused_columns: tuple[str, ...] = ()
    is_templated: bool = False
    num_untrained: int = 0  # rows that were omitted because none of their tokens is trained on
    num_padding: int = 0  # padding tokens that were removed
    masks: tuple[str, ...] = ()  # the columns of rows of ids that determine which tokens are trained on
    flat: str | None = None  # the name of the .bin file that the ids are in
    shifts: NDArray[np.int64] | None = None  # per document, the index minus the position; None means zero
    mix: Mix | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def formats(self) -> list[str]:
        return sorted({origin.row_format for origin in self.origins})

    @property
    def whole_D(self) -> NDArray[np.bool_]:
        """Whether each document must not be cut to fill a sequence."""
        if not self.origins:
            return np.zeros(self.num_documents, np.bool_)
        return np.repeat([origin.whole for origin in self.origins], [o.num_documents for o in self.origins])

    @property
    def source_bounds(self) -> NDArray[np.int64]:
        """The first document of each weighted source, and the total number. Without weights, there is one source."""
        if self.mix is None:
            return np.array([0, self.num_documents], dtype=np.int64)
        counts = np.zeros(len(self.mix.shares), dtype=np.int64)
        np.add.at(counts, np.array(self.mix.source_of), [origin.num_documents for origin in self.origins])
        return np.cumsum(np.concatenate(([0], counts)), dtype=np.int64)

    @property
    def has_whole_documents(self) -> bool:
        """Whether there are documents that must not be cut to fill a sequence: conversations and pairs."""
        return any(origin.whole for origin in self.origins)

    @property
    def has_pairs(self) -> bool:
        return any(origin.row_format == "preference" for origin in self.origins)

    def mixed(self, mix: Mix | None) -> TokenFile:
        """These tokens with weighted sources. The fingerprint then includes the weights."""
        if mix is None:
            return self
        identity = f"{self.fingerprint} {mix.shares} {mix.source_of}"
        return replace(self, mix=mix, fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32])

    def where(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices of positions."""
        if self.shifts is None:
            return at
        return at + self.shifts[np.searchsorted(self.offsets, at, "right") - 1]

    def parts(self, starts: NDArray[np.int64], ends: NDArray[np.int64], fingerprint: str) -> TokenFile:
        """The ranges from ``starts`` to ``ends``, each within a document, as documents that share the same arrays."""
        owner = np.searchsorted(self.offsets, starts, "right") - 1
        offsets = np.cumsum(np.concatenate(([0], ends - starts)), dtype=np.int64)
        of_source = np.repeat(np.arange(len(self.origins)), [origin.num_documents for origin in self.origins])
        taken = np.bincount(of_source[owner], minlength=len(self.origins)) if self.origins else ()
        return replace(
            self,
            offsets=offsets,
            fingerprint=fingerprint,
            rows=None if self.rows is None else self.rows[owner],
            hashes=None if self.hashes is None else self.hashes[owner],
            groups=None if self.groups is None else self.groups[owner],
            labels=None if self.labels is None else self.labels[owner],
            origins=tuple(
                replace(origin, num_documents=int(count)) for origin, count in zip(self.origins, taken, strict=True)
            ),
            shifts=self.where(starts) - offsets[:-1],
        )

    def location(self, document: int) -> str:
        """The file and line that a document came from."""
        number = int(self.rows[document]) if self.rows is not None else 0
        for origin in self.origins:
            if document < origin.num_documents:
                return f"{origin.name}, {origin.word} {number}" if number else origin.name
            document -= origin.num_documents
        return f"document {document + 1}"
