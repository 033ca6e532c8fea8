"""Rows of a dataset, token by token, as training reads them: ``POST /v1/jobs/preview`` and `zeta data show`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


MAX_PREVIEW_ROWS = 20


class RowSelection(BaseModel):
    """The rows of a preview: the first ``rows``, or only the one with the number ``row``, as in error messages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(default=3, ge=1, le=MAX_PREVIEW_ROWS, description="the number of rows, from the beginning")
    row: int | None = Field(default=None, ge=0, lt=2**53, description="only the row or line with this number")


class PreviewRequest(RowSelection):
    """``spec`` contains the fields of a job that decide how its data is read; ``model`` and ``tokenizer`` may be unset.

    Without them, each byte is a token.
    """

    spec: dict[str, JsonValue] = Field(description="the fields of a job; `model` may be unset")


class ShowRequest(_Shown):
    """The rows to show: the first ``rows`` of the dataset, or the one with the number ``row``, as in error messages.

    ``spec`` contains the fields of a job, with local paths instead of uploaded files.
    """

    spec: dict[str, Any]
    rows: int = 3
    row: int | None = None


class ShownToken(_Shown):
    """A token and its decoded ``text``, which is ``<ID>`` if the token is only a part of a character.

    ``truncated``: the token is beyond ``seq_len``, so it is cut off.
    """

    id: int
    text: str
    trained: bool
    truncated: bool = False


class ShownDocument(_Shown):
    """One document: usually one for each row; two for a preference row, the chosen and the rejected answer.

    The numbers are those of the whole document; ``tokens`` may be only its beginning. ``num_trained`` tokens are
    trained on, and ``num_truncated`` are cut off. A document that is ``split`` continues in further sequences.
    """

    num_tokens: int
    num_trained: int
    num_truncated: int = 0
    split: bool = False
    tokens: list[ShownToken]


class ShownRow(_Shown):
    """A row with its format and unused columns, or with the ``error`` for which it is rejected."""

    place: str
    format: str | None = None
    shape: str | None = None
    documents: list[ShownDocument] = []
    unused_columns: list[str] = []
    notes: list[str] = []
    error: str | None = None


class ShownRows(_Shown):
    object: Literal["shown_rows"] = "shown_rows"
    tokenizer: str
    seq_len: int
    notes: list[str] = []
    data: list[ShownRow]
