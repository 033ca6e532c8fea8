"""POST /v1/jobs/preview: its request is checked like a submission, and a worker must render the rows."""

from typing import Any

import httpx
import pytest

from tests.server.rows import Rows
from tests.server.server_process import error_of

DATA: dict[str, Any] = {"dataset": {"builtin": "python-docs"}}


def test_rows_need_a_worker(http: httpx.Client) -> None:
    response = http.post("/v1/jobs/preview", json={"spec": DATA})
    assert response.status_code == 503
    assert "No connected worker" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({}, "spec"),
        ({"spec": DATA, "rows": 21}, "rows"),
        ({"spec": DATA, "row": -1}, "row"),
        ({"spec": DATA, "tokens": 5}, "tokens"),
        ({"spec": {**DATA, "seq_len": 0}}, "seq_len"),
        ({"spec": {"dataset": {"file": "file_01k00000000000000000000000"}}}, "dataset.file"),
    ],
)
def test_an_invalid_request_names_its_field(http: httpx.Client, request_: dict[str, Any], param: str) -> None:
    response = http.post("/v1/jobs/preview", json=request_)
    assert (response.status_code, error_of(response)["param"]) == (422, param)


def test_a_key_that_only_reads_sees_no_rows(http: httpx.Client, rows: Rows) -> None:
    rows.key("reader", scopes=("read",))
    headers = {"Authorization": "Bearer reader"}
    assert http.post("/v1/jobs/preview", json={"spec": DATA}, headers=headers).status_code == 403
