"""Secrets of users are not stored or shown: specs with one are refused, and errors and events are masked."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.engine.apply_journal import parse_line
from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, submit
from zeta_core.contract.job.events import LogLine, SampleLine, utc_now

TOKEN = "hf_" + "Abcd1234" * 4
KEY = "sk-proj-" + "Abcd1234" * 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"note": f"token {TOKEN}"}}, "metadata.note"),
        ({"metadata": {TOKEN: "x"}}, "metadata"),
        ({"entity_name": TOKEN}, "entity_name"),
        ({"dataset": {"hub": "owner/name", "config": KEY}}, "dataset.config"),
        ({"api_key": KEY}, "api_key"),
        ({"tracker": {"url": "https://me:secret-word@tracker.example.org"}}, "tracker.url"),
    ],
)
def test_a_spec_with_a_secret_is_refused_without_repeating_it(
    server: ServerProcess, http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    requests = [
        ("/v1/jobs", {**SPEC, **fields}),
        ("/v1/jobs/validate", {**SPEC, **fields}),
        ("/v1/sweeps", {"spec": {**SPEC, **fields}, "grid": {"seed": [1, 2]}}),
    ]
    for path, body in requests:
        response = http.post(path, json=body)
        error = error_of(response)
        assert (response.status_code, error["details"][0]["code"]) == (422, "secret_in_spec"), path
        assert error["details"][0]["param"].endswith(param)
        for secret in (TOKEN, KEY, "secret-word"):
            assert secret not in response.text
            assert secret not in server.log()


def test_a_rerun_cannot_add_a_secret(http: httpx.Client) -> None:
    job_id = submit(http)["id"]
    response = http.post(f"/v1/jobs/{job_id}/rerun", json={"patch": {"metadata": {"note": TOKEN}}})
    assert (response.status_code, error_of(response)["code"]) == (422, "secret_in_spec")


def test_a_spec_that_was_stored_by_an_earlier_version_is_shown_masked(http: httpx.Client, rows: Rows) -> None:
    job_id = submit(http)["id"]
    noted = {"note": f"token {TOKEN}"}
    rows.change(job_id, spec={**SPEC, "metadata": noted}, resolved_spec_json={**SPEC, "note": KEY}, job_metadata=noted)
    for path in (f"/v1/jobs/{job_id}", "/v1/jobs", f"/jobs/{job_id}"):
        response = http.get(path)
        assert TOKEN not in response.text
        assert KEY not in response.text
    shown = http.get(f"/v1/jobs/{job_id}").json()
    assert shown["spec"]["metadata"] == shown["metadata"] == {"note": "token ***"}
    assert shown["resolved_spec"]["note"] == "***"


def test_an_error_that_quotes_a_value_masks_secrets(http: httpx.Client) -> None:
    for path in (f"/v1/jobs/{TOKEN}", f"/v1/files?after={TOKEN}", f"/v1/jobs?status={KEY}", f"/unknown/{KEY}"):
        response = http.get(path)
        assert response.status_code in (404, 422)
        assert TOKEN not in response.text
        assert KEY not in response.text
        assert "***" in response.text


def test_events_of_a_run_are_masked_except_the_text_that_a_model_generated() -> None:
    now = utc_now().isoformat()
    log = parse_line({"type": "log", "level": "info", "message": f"Using {TOKEN}.", "created_at": now})
    assert isinstance(log, LogLine)
    assert log.message == "Using ***."
    sample = {"type": "sample", "step": 1, "prompt": "p", "text": f"It is {TOKEN}.", "created_at": now}
    parsed = parse_line(sample)
    assert isinstance(parsed, SampleLine), parsed
    assert TOKEN in parsed.model_dump_json()
    unreadable = parse_line({"type": "log", "level": TOKEN})
    assert TOKEN not in unreadable.model_dump_json()
