"""Requests with excessive contents are rejected and cost the server little processor time."""

import itertools
import json
import string
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.harness.valkey import ValkeyServer
from tests.server.rows import Rows
from tests.server.server_process import SPEC, ServerProcess, error_of, running_server, submit
from tests.zeta_core.contract.test_bounds import LARGE
from zeta_core.contract.identifiers import new_id

MAX_SPEC_BYTES = 64 * 1024
MAX_WORK_SECONDS = 2.0  # of all threads; the slowest of these tests takes 0.4 s
MAX_EVENT_LOOP_SECONDS = 0.2  # of the event loop's thread alone; the slowest takes 0.05 s


@contextmanager
def limited_processor_time(server: ServerProcess) -> Generator[None]:
    """Fail if the requests of the block use too much processor time of the server."""
    process = psutil.Process(server.pid)

    def used() -> tuple[float, float]:
        times = process.cpu_times()
        (event_loop,) = [thread for thread in process.threads() if thread.id == process.pid]
        return times.user + times.system, event_loop.user_time + event_loop.system_time

    all_before, loop_before = used()
    yield
    all_after, loop_after = used()
    assert all_after - all_before < MAX_WORK_SECONDS
    assert loop_after - loop_before < MAX_EVENT_LOOP_SECONDS, "other requests wait for the event loop"


@pytest.fixture(scope="module")
def large_limit_server(
    shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that accepts specs of 4 MiB, so that only its checks protect it."""
    home = tmp_path_factory.mktemp("large-limit")
    with running_server(home, shared_valkey.url, ZETA_MAX_SPEC_BYTES=str(2**22)) as process:
        yield process


def body_of(name: str, num_bytes: int) -> bytes:
    """A spec with the fields of `LARGE`, of about this size."""
    count = 64
    while len(body := json.dumps({**SPEC, **LARGE[name](count)}).encode()) < num_bytes:
        count = count * 3 // 2
    return body


@pytest.mark.parametrize("name", LARGE)
def test_a_large_spec_costs_little_processor_time(large_limit_server: ServerProcess, name: str) -> None:
    body = body_of(name, 500_000)
    with large_limit_server.http() as http, limited_processor_time(large_limit_server):
        response = http.post("/v1/jobs", content=body)
    assert response.status_code == 422, response.text[:200]
    assert len(response.content) < 8 * 1024


def test_a_duplicate_name_among_many_names_is_found_in_linear_time(large_limit_server: ServerProcess) -> None:
    letters = itertools.product(string.ascii_letters + string.digits, repeat=3)
    names = ["".join(three) for three in itertools.islice(letters, 131_554)]  # with their values, 1 MiB
    body = ("{" + ",".join(f'"{name}":1' for name in [*names, names[-1]]) + "}").encode()
    with large_limit_server.http() as http, limited_processor_time(large_limit_server):
        response = http.post("/v1/jobs", content=body)
    assert (response.status_code, error_of(response)["code"]) == (422, "duplicate_field")


def test_the_limit_of_a_spec_is_reported_when_exceeded(server: ServerProcess, http: httpx.Client) -> None:
    def padded(num_bytes: int) -> bytes:
        body = json.dumps(SPEC).encode()
        return body + b" " * (num_bytes - len(body))

    assert http.post("/v1/jobs/validate", content=padded(MAX_SPEC_BYTES)).status_code == 200
    for path in ("/v1/jobs", "/v1/jobs/validate", f"/v1/jobs/{submit(http)['id']}/rerun"):
        for content in (padded(MAX_SPEC_BYTES + 1), iter([padded(MAX_SPEC_BYTES + 1)])):
            response = http.post(path, content=content)
            assert (response.status_code, error_of(response)["code"]) == (413, "too_large")
            assert f"limit of {MAX_SPEC_BYTES} bytes (ZETA_MAX_SPEC_BYTES)" in response.text


def test_a_fixed_limit_of_a_body_names_no_setting(http: httpx.Client) -> None:
    response = http.post("/v1/webhooks", json={"url": "https://example.com", "description": "x" * 20_000})
    assert response.status_code == 413
    assert "the fixed limit of 16384 bytes" in response.text
    assert "ZETA_" not in response.text


def test_reruns_of_reruns_do_not_grow_beyond_the_limit(http: httpx.Client) -> None:
    def rerun(job_id: str, number: int) -> httpx.Response:
        config = {f"field_{number}_{i}": i for i in range(1_500)}
        return http.post(f"/v1/jobs/{job_id}/rerun", json={"patch": {"model": {"config": config}}})

    first = rerun(submit(http)["id"], 1)
    second = rerun(first.json()["id"], 2)
    third = rerun(second.json()["id"], 3)
    assert [response.status_code for response in (first, second, third)] == [201, 201, 413]
    assert error_of(third)["code"] == "too_large"


def test_a_thousand_files_are_looked_up_by_one_query(server: ServerProcess, http: httpx.Client, rows: Rows) -> None:
    """The files are looked up inside the write transaction, which must stay short."""
    made = http.post("/v1/files", files={"file": ("a.txt", b"text")}, data={"purpose": "dataset"}).json()["id"]
    unknown = [new_id("file") for _ in range(999)]
    with limited_processor_time(server):
        response = http.post("/v1/jobs", json={**SPEC, "dataset": {"file": [made, *unknown]}})
    error = error_of(response)
    assert (response.status_code, error["code"], len(error["details"])) == (422, "file_not_found", 50)
    assert "998 more" in error["message"]
    assert unknown[0] in error["message"]
    repeated = http.post("/v1/jobs", json={**SPEC, "dataset": {"file": [made] * 1000}})
    assert repeated.status_code == 201
    too_many = http.post("/v1/jobs", json={**SPEC, "dataset": {"file": [made] * 1001}})
    assert "at most 1000 entries" in error_of(too_many)["message"]


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/v1/jobs", [(f"metadata[k{i}]", "v") for i in range(2000)]),
        ("/v1/jobs", [(f"stat{i}", "v") for i in range(2000)]),
        ("/v1/jobs", [("status", f"queue{i}") for i in range(2000)]),
        ("/v1/workers", [(f"limi{i}", "1") for i in range(2000)]),
        ("/v1/jobs/validate", [(f"limi{i}", "1") for i in range(2000)]),
        ("/v1/jobs", [("after", "job_" + "0" * 20_000)]),
        ("/v1/jobs", [("limit", "1" * 20_000)]),
        ("/v1/files", [("x" * 20_000, "1")]),
    ],
)
def test_a_query_of_thousands_of_parameters_is_rejected(
    server: ServerProcess, http: httpx.Client, path: str, params: Any
) -> None:
    method = "POST" if path.endswith("validate") else "GET"
    with limited_processor_time(server):
        response = http.request(method, path, params=httpx.QueryParams(params))
    assert response.status_code == 422, response.text[:300]
    assert len(response.content) < 32 * 1024
    assert len(error_of(response)["details"]) <= 50


def test_a_repeated_status_is_one_filter(http: httpx.Client) -> None:
    job_id = submit(http, entity_name="repeated")["id"]
    query = "&".join(["entity_name=repeated", *["status=queued"] * 2500])
    assert [job["id"] for job in http.get(f"/v1/jobs?{query}").json()["data"]] == [job_id]


def test_a_page_of_large_jobs_is_shortened_and_reports_more(server: ServerProcess, http: httpx.Client) -> None:
    config = {"model_type": "llama", "notes": ["x" * 1000] * 60}
    made = [submit(http, model={"config": config}, entity_name="large")["id"] for _ in range(60)]
    listed: list[str] = []
    after: dict[str, str] = {}
    with limited_processor_time(server):
        while True:
            response = http.get("/v1/jobs", params={"entity_name": "large", "limit": 1000, **after})
            page = response.json()
            listed += [job["id"] for job in page["data"]]
            assert len(response.content) < 8 << 20
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
    assert listed == made[::-1]
    assert 20 < len(page["data"]) < 60


def test_a_short_page_of_huge_jobs_is_shortened_too(large_limit_server: ServerProcess) -> None:
    config = {"model_type": "llama", "notes": ["x" * 1000] * 900}
    with large_limit_server.http() as http:
        for _ in range(12):
            submit(http, model={"config": config}, entity_name="huge")
        response = http.get("/v1/jobs", params={"entity_name": "huge"})
    assert response.json()["has_more"]
    assert len(response.content) < 8 << 20


@pytest.mark.extended
def test_listing_huge_jobs_several_times_at_once_takes_little_memory(large_limit_server: ServerProcess) -> None:
    config = {"model_type": "llama", "notes": ["x" * 1000] * 900}
    rows = Rows(large_limit_server.settings)
    for _ in range(150):
        rows.job(spec={"model": {"config": config}})
    before = large_limit_server.peak_memory_bytes()
    with large_limit_server.http() as http, ThreadPoolExecutor(4) as threads:
        pages = [threads.submit(http.get, "/v1/jobs", params={"limit": 1000}) for _ in range(4)]
        assert all(len(page.result().content) < 8 << 20 for page in pages)
    assert large_limit_server.peak_memory_bytes() - before < 400 << 20


def test_long_ids_paths_and_ranges_are_shortened_in_errors(http: httpx.Client) -> None:
    file_id = http.post("/v1/files", files={"file": ("a.txt", b"text")}, data={"purpose": "dataset"}).json()["id"]
    for path in (f"/v1/jobs/{'j' * 20_000}", f"/v1/files/{'f' * 20_000}", f"/{'n' * 20_000}"):
        response = http.get(path)
        assert (response.status_code, len(response.content) < 1000) == (404, True)
    ranges = "bytes=" + ",".join(f"{i}-{i}" for i in range(3000))
    many = http.get(f"/v1/files/{file_id}/content", headers={"Range": ranges})
    assert (many.status_code, many.content) == (200, b"text")
    tags = ",".join(f'"{i}"' for i in range(3000))
    assert http.get(f"/v1/files/{file_id}/content", headers={"If-None-Match": tags}).status_code == 200


def test_a_glob_of_many_stars_is_matched_quickly(server: ServerProcess, http: httpx.Client, rows: Rows) -> None:
    job_id = rows.job()
    files: dict[str, Any] = {"a" * 200: ("weights", b"w")}
    rows.checkpoint(job_id, "step-1", 1, files)
    with limited_processor_time(server):
        response = http.get(f"/v1/jobs/{job_id}/checkpoints/step-1/archive", params={"include": "*a" * 499 + "b"})
    assert (response.status_code, error_of(response)["code"]) == (404, "nothing_included")


@pytest.mark.parametrize(
    ("text", "character"),
    [
        ("\x1b[2J", "U+001B"),
        ("\x9b31m", "U+009B"),
        ("\u202eexe.txt", "U+202E"),
        ("\u2066x", "U+2066"),
        ("over\rwritten", "U+000D"),
        ("bell\x07", "U+0007"),
        ("\x7f", "U+007F"),
    ],
)
def test_control_characters_are_rejected_everywhere(http: httpx.Client, text: str, character: str) -> None:
    for fields, param in (
        ({"entity_name": text}, "entity_name"),
        ({"metadata": {"note": text}}, "metadata.note"),
        ({"metadata": {text: "x"}}, "metadata.(name)"),
        ({"model": {"config": {"model_type": "llama", "names": ["a", text]}}}, "model.config.names.1"),
        ({text: 1}, "(name)"),
    ):
        response = http.post("/v1/jobs", json={**SPEC, **fields})
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (422, "invalid_text", param)
        assert character in error["message"]
        assert text not in response.text


def test_text_of_any_script_is_kept(http: httpx.Client, tmp_path: Path) -> None:
    metadata = {
        "note": "line one\nline two\r\n\tindented",
        "日本\u3000語": "no\u00a0break 👨\u200d👩\u200d👧 שלום\u200f",
    }
    job = submit(http, metadata=metadata, entity_name="e\u0301 日本\u3000語")
    assert (job["metadata"], job["entity_name"]) == (metadata, "e\u0301 日本\u3000語")
    several = http.post("/v1/jobs", json={**SPEC, "entity_name": "two\nlines"})
    assert (several.status_code, error_of(several)["param"]) == (422, "entity_name")
