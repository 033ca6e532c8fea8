"""Rows of data as training reads them: the page of an uploaded file, and a part of the form for a new job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fastapi import Response

from server import files
from server.estimates.data_preview import preview
from server.routes.routing import TheService
from server.web.new_job import read_spec_form
from server.web.pages import PageRouter, SubmitPage
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.job.data_preview import ShownDocument, ShownRow, ShownToken

router = PageRouter()
MAX_TABLE_ROWS = 500  # of a document's table of tokens
USES: Mapping[str, str] = {"trained": "trained on", "context": "context", "truncated": "cut off"}


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens with the same use in training."""

    use: str  # a key of `USES`
    texts: list[str]


@dataclass(frozen=True)
class DocumentView:
    """A document, its name within its row, and its tokens."""

    name: str
    document: ShownDocument
    runs: list[TokenRun]
    table: list[tuple[ShownToken, str]]

    @property
    def num_hidden(self) -> int:
        return self.document.num_tokens - len(self.document.tokens)


@dataclass(frozen=True)
class RowView:
    row: ShownRow
    documents: list[DocumentView]


@router.get("/files/{file_id}/rows")
async def show_rows(service: TheService, page: SubmitPage, file_id: str) -> Response:
    """The rows of an uploaded data file, with the settings that decide how they are read."""
    file = await files.get_file(service, page.caller, file_id)
    return page.render("file_rows.html", file=file)


@router.post("/new/preview")
async def show_preview(service: TheService, page: SubmitPage) -> Response:
    """The rows of the data that a form for a job describes, whose model may be missing."""
    values: dict[str, Any] = {"rows": [], "shown": None, "error": None, "uses": USES}
    try:
        spec = await read_spec_form(service, page.form)
        if "model" not in spec:
            spec.pop("lora", None)  # how weights are trained doesn't change the rows
        shown = await preview(service, page.caller, {"spec": spec, **_selection(page.form)})
        values |= {"shown": shown, "rows": [_row_view(row) for row in shown.data]}
    except ZetaError as error:
        values["error"] = error
    return page.render("data_preview.html", **values)


def _selection(form: Mapping[str, str]) -> dict[str, int]:
    """The rows that the form asks for. Raises `InvalidRequest`."""
    chosen: dict[str, int] = {}
    for name in ("rows", "row"):
        text = form.get(f"preview_{name}", "").strip()
        if text and not (text.isdecimal() and len(text) < 16):
            raise InvalidRequest(f"{text[:40]!r} is not a number of a row.", param=name)
        if text:
            chosen[name] = int(text)
    return chosen


def _row_view(row: ShownRow) -> RowView:
    return RowView(row, list(_document_views(row)))


def _document_views(row: ShownRow) -> Iterator[DocumentView]:
    for number, document in enumerate(row.documents):
        is_preference = row.format == "preference" and number < 2
        name = ("Chosen answer", "Rejected answer")[number] if is_preference else f"Document {number + 1}"
        table = [(token, _use(token)) for token in document.tokens[:MAX_TABLE_ROWS]]
        yield DocumentView(name if len(row.documents) > 1 else "", document, list(_runs(document.tokens)), table)


def _runs(tokens: Sequence[ShownToken]) -> Iterator[TokenRun]:
    for use, group in groupby(tokens, key=_use):
        yield TokenRun(use, [token.text.replace("\n", "↵\n").replace("\t", "→\t") for token in group])


def _use(token: ShownToken) -> str:
    return "truncated" if token.truncated else "trained" if token.trained else "context"
