"""Every error class of the client is raised by the fault that it stands for, and only useful requests are repeated.

`UnprocessableEntityError` (422) is never raised, because OpenAI answers 400 to invalid requests. Errors within a stream
of tokens (`APIError`) are tested with a worker in `tests/end_to_end/test_answers.py`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Model

from tests.harness.openai_client import openai_client
from tests.harness.ports import free_loopback_port
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.openai.data import upload
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess, running_server
from zeta_core.contract.access import Scope
from zeta_core.contract.job.status import JobStatus


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("server")
    with running_server(home, shared_valkey.second_url, ZETA_PROJECT_QUOTA_BYTES="2000") as process:
        yield process


def num_requests(server: ServerProcess, request: str) -> int:
    """The number of requests in the log, such as ``GET /openai/v1/files``."""
    return server.log().count(f"{request} was answered")


def requires_requests(server: ServerProcess, request: str, number: int) -> None:
    """Wait until the server has logged this number of requests; more are an error."""
    wait_until(lambda: num_requests(server, request) >= number, 20, f"{number} x {request}")
    assert num_requests(server, request) == number


def test_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="m", training_file="f", seed=-1)
    assert (caught.value.type, caught.value.param, caught.value.code) == (
        "invalid_request_error",
        "seed",
        "out_of_range",
    )
    assert caught.value.request_id is not None


def test_authentication_error(server: ServerProcess) -> None:
    with openai_client(server.url, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_permission_denied_error(server: ServerProcess, rows: Rows) -> None:
    rows.key("only-read", scopes=[Scope.READ])
    with openai_client(server.url, "only-read") as client:
        assert client.fine_tuning.jobs.list().data == []
        with pytest.raises(openai.PermissionDeniedError) as caught:
            client.fine_tuning.jobs.create(model="m", training_file="f")
    assert caught.value.code == "insufficient_scope"


def test_not_found_error(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.fine_tuning.jobs.retrieve("ftjob-1")
    assert caught.value.code == "job_not_found"


def test_a_conflict_is_not_repeated(server: ServerProcess, rows: Rows) -> None:
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    with openai_client(server.url, API_KEY, max_retries=2) as client, pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job_id)
    requires_requests(server, f"POST /openai/v1/fine_tuning/jobs/{job_id}/cancel", 1)


def test_an_exceeded_quota_is_a_rate_limit_that_is_not_repeated(server: ServerProcess) -> None:
    before = num_requests(server, "POST /openai/v1/files")
    with openai_client(server.url, API_KEY, max_retries=2) as client, pytest.raises(openai.RateLimitError) as caught:
        upload(client, b'{"text": "a"}\n' * 200)
    assert (caught.value.code, caught.value.type) == ("quota_exceeded", "rate_limit_error")
    requires_requests(server, "POST /openai/v1/files", before + 1)


def test_an_outage_is_a_server_error_that_is_repeated(server: ServerProcess) -> None:
    with sqlite3.connect(server.home / "zeta.db") as database:
        database.execute("ALTER TABLE files RENAME TO files_away")
    try:
        with (
            openai_client(server.url, API_KEY, max_retries=1) as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.files.list(purpose="fine-tune")
    finally:
        with sqlite3.connect(server.home / "zeta.db") as database:
            database.execute("ALTER TABLE files_away RENAME TO files")
    assert (caught.value.status_code, caught.value.type) == (503, "server_error")
    assert int(caught.value.response.headers["retry-after"]) <= 120
    requires_requests(server, "GET /openai/v1/files", 2)


def test_connection_errors(server: ServerProcess) -> None:
    nobody = f"http://127.0.0.1:{free_loopback_port()}"
    with openai_client(nobody, API_KEY) as client, pytest.raises(openai.APIConnectionError):
        client.models.list()
    with openai_client(server.url, API_KEY, timeout=0.000001) as client, pytest.raises(openai.APITimeoutError):
        client.models.list()


def test_an_unknown_route_and_a_wrong_method_have_the_format_of_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Not found: GET /openai/v1/assistants") as caught:
        client.get("/assistants", cast_to=object)
    assert (caught.value.type, caught.value.code, caught.value.param) == (
        "invalid_request_error",
        "route_not_found",
        None,
    )
    with pytest.raises(openai.APIStatusError, match="Allowed: GET, HEAD") as wrong:
        client.post("/models", cast_to=object)
    assert (wrong.value.status_code, wrong.value.code) == (405, "method_not_allowed")
    assert wrong.value.response.headers["allow"] == "GET, HEAD"


def test_every_protected_route_and_method_has_the_format_of_the_client(server: ServerProcess) -> None:
    with server.http("wrong") as stranger:
        paths: dict[str, dict[str, Any]] = stranger.get("/openapi.json").json()["paths"]
        openai_paths = {path: of_path for path, of_path in paths.items() if path.startswith("/openai/v1/")}
        assert len(openai_paths) > 15
        for path, of_path in openai_paths.items():
            for method in of_path:
                response = stranger.request(method.upper(), path)
                assert response.status_code == 401, (method, path)
                assert response.json()["error"].keys() == {"message", "type", "param", "code"}
            response = stranger.request("TRACE", path)
            assert response.status_code == 405, path
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_response_that_is_not_json_is_a_validation_error(server: ServerProcess, rows: Rows) -> None:
    with (
        OpenAI(base_url=server.url, api_key=API_KEY, max_retries=0, _strict_response_validation=True) as client,
        pytest.raises(openai.APIResponseValidationError),
    ):
        client.get("/metrics", cast_to=Model)
