"""The report on a run's data before its first step: in a ``log`` event and as ``data_report`` in ``resolved_spec``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Lengths(BaseModel):
    """The lengths of documents in tokens; ``p90`` and ``p99`` are percentiles."""

    model_config = ConfigDict(frozen=True, extra="allow")

    min: int
    median: int
    mean: float
    p90: int
    p99: int
    max: int


class SourceShare(BaseModel):
    """The content of a source with a weight, and its use in the whole run.

    ``share`` is the requested share of the run's sequences, ``seen`` the number of sequences that the run uses, and
    ``seen_share`` their actual share. ``passes`` is how often each sequence of the source is used.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    documents: int
    tokens: int
    sequences: int
    share: float
    seen: int
    seen_share: float
    passes: float


class DataReport(BaseModel):
    """The documents of a run, without the held-out ones. The two answers of a preference pair are two documents.

    ``truncated`` documents were cut off at ``seq_len`` and lost ``truncated_tokens`` in total; ``dropped`` documents
    are not used. ``empty`` documents contained no text. ``split`` conversations became several documents, because the
    chat template renders earlier turns differently later. ``duplicates`` are exact copies of an earlier document, null
    if they were not counted. These three counts include held-out documents. ``supervised_share`` is the share of tokens
    that are trained on, and ``filled_share`` the share of the sequences that is not padding. ``sources`` are those with
    weights. ``control_tokens`` counts control tokens in the texts of the data, which are plain text unless the source
    allows them. For rows of token ids, ``masks`` are the columns that determine which tokens are trained on,
    ``padding_tokens`` were removed, and ``untrained`` rows were skipped because none of their tokens is trained on.
    ``shapes`` are the well-known row shapes that were converted, and ``unused_columns`` the columns that were present
    but not used.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    formats: list[str]
    documents: int
    tokens: int
    lengths: Lengths
    sequences: int
    supervised_share: float
    filled_share: float
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    empty: int = 0
    split: int = 0
    untrained: int = 0
    padding_tokens: int = 0
    masks: list[str] = []
    duplicates: int | None = None
    control_tokens: int = 0
    shapes: list[str] = []
    unused_columns: list[str] = []
    sources: list[SourceShare] = []
