"""What a run's data is, told before its first step: in a ``log`` event, and in ``resolved_spec`` as ``data_report``."""

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
    """A source with a weight: what it holds, and what the whole run sees of it.

    ``seen`` counts sequences, of which ``share`` is asked for; ``passes`` is how often each of its own is seen.
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
    """The documents of a run, whatever is held out aside; the two answers of a preference pair are two of them.

    ``truncated`` documents lost their end to ``seq_len``, ``truncated_tokens`` in all, and ``dropped`` ones are not
    trained on at all. ``empty`` ones held no text; ``split`` conversations became several documents, because the chat
    template writes earlier turns otherwise later; ``duplicates`` are exact copies of an earlier document, null where
    they were not looked for: these three count what is held out, too. ``supervised_share`` is that of the tokens whose
    prediction is learned, ``filled_share`` that of the sequences that is not padding. ``sources`` are those with
    weights. ``control_tokens`` counts the control tokens in the texts of the data, which are text unless the source
    allows them. Of rows of token ids, ``masks`` are the columns that determine which tokens are trained on,
    ``padding_tokens`` were removed, and ``untrained`` rows were left out because no token of them is trained on.
    ``shapes`` are the well-known shapes that rows were converted from, and ``unused_columns`` the columns that were
    present but not used.
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
