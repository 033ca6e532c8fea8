"""The result of ``python -m zeta_core check``: everything about a spec that requires torch or transformers.

A worker runs the check on request, and the server returns the result (``POST /v1/jobs/validate``). For a field that is
null, ``pending`` contains the reason.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.job.data_preview import ShownRows
from zeta_core.contract.job.memory import MemoryEstimate
from zeta_core.contract.spec.resolved_spec import RecordedSpec


class _CheckModel(BaseModel):
    """Frozen. Readers keep the unknown fields of a newer worker."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Vocabulary(_CheckModel):
    """``fits``: whether the embedding has a row for every id of the tokenizer."""

    embedding_rows: int | None
    tokenizer_size: int
    fits: bool | None


class CheckedData(_CheckModel):
    """The rows of a dataset: all of them were read and checked, and a sample was tokenized.

    ``rows`` counts the rows that were checked; a text file counts as one. If not all of them could be checked in time,
    ``complete`` is false and ``note`` says so. ``shapes`` are well-known shapes that rows are converted from.
    ``trained_share`` is the share of tokens trained on, ``longest_tokens`` the length of the longest document, and
    ``too_long_share`` the share of documents that exceed ``seq_len``, all of the ``sampled_rows``. ``tokens`` is
    estimated from the sample. The sample contains the first rows, rows from the whole data, and every row whose turns
    have roles or fields that no earlier row has.
    """

    rows: int
    complete: bool
    formats: list[str]
    shapes: list[str] = []
    unused_columns: list[str] = []
    sampled_rows: int
    tokens: int
    trained_share: float
    longest_tokens: int
    too_long_share: float
    note: str | None = None


class CheckAnswer(_CheckModel):
    """``ok`` is false if ``details`` lists faults; the other fields then contain what could still be determined.

    ``isolates``: whether the model keeps packed documents apart. ``tokens`` are those of the whole run,
    ``checkpoint_bytes`` is the size of one checkpoint with its training state, and ``data`` describes the rows.
    If rows were requested, the answer contains only them, as ``shown``.
    """

    ok: bool
    details: list[ErrorDetail] = []
    resolved_spec: RecordedSpec | None = None
    num_parameters: int | None = None
    num_trained_parameters: int | None = None
    memory: MemoryEstimate | None = None
    vocabulary: Vocabulary | None = None
    isolates: bool | None = None
    total_steps: int | None = None
    tokens: int | None = None
    checkpoint_bytes: int | None = None
    data: CheckedData | None = None
    shown: ShownRows | None = None
    pending: dict[str, str] = {}
