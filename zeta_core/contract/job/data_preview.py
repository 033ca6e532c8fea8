"""The output of ``python -m zeta_core show``: rows of a dataset, token by token, as training reads them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


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
