"""A job's output over HTTP: pages and live streams of events, metrics and logs."""

import json
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.jobs.training_curves import thin_out
from tests.harness.service import parse_sse
from tests.harness.waiting import wait_until
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess, error_of, running_server, submit
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import log_key

STREAM = {"Accept": "text/event-stream"}


class StreamReader:
    """Reads a stream in a thread until it ends, so that a test can examine what has arrived."""

    def __init__(self, http: httpx.Client, path: str, headers: dict[str, str]) -> None:
        self.text = ""
        self.broke = False
        self.ended_at: float | None = None
        self._open = http.stream("GET", path, headers=headers, timeout=60)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def events(self) -> list[dict[str, Any]]:
        return parse_sse(self.text[: self.text.rfind("\n\n") + 2])

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(self.events) >= count, 30, f"{count} events")
        return self.events

    def wait_for_end(self) -> list[dict[str, Any]]:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the stream has not ended"
        return self.events

    def _read(self) -> None:
        try:
            with self._open as response:
                for chunk in response.iter_text():
                    self.text += chunk
        except httpx.TransportError:
            self.broke = True
        self.ended_at = time.monotonic()


@contextmanager
def open_stream(server: ServerProcess, job_id: str, **headers: str) -> Generator[StreamReader]:
    with server.http() as http:
        yield StreamReader(http, f"/v1/jobs/{job_id}/events", {**STREAM, **headers})


@pytest.fixture(scope="module", autouse=True)
def idle_stream(server: ServerProcess, rows: Rows) -> Iterator[StreamReader]:
    """The stream of a job without events, open from the first test of this file to its last."""
    with open_stream(server, rows.job()) as reader:
        yield reader


@pytest.fixture(scope="module", autouse=True)
def quiet_log(server: ServerProcess, rows: Rows) -> Iterator[StreamReader]:
    """The followed log of a job that has written one line, open from the first test of this file to its last."""
    job_id = rows.job()
    rows.attempt(job_id, log="loading\n")
    with server.http() as http:
        yield StreamReader(http, f"/v1/jobs/{job_id}/logs?follow=true", {})


def test_events_are_paged_oldest_first(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    rows.log_events(job_id, *(str(number) for number in range(2, 8)))
    first = http.get(f"/v1/jobs/{job_id}/events?limit=3").json()
    assert [event["seq"] for event in first["data"]] == [1, 2, 3]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, "1", "3")
    rest = http.get(f"/v1/jobs/{job_id}/events?after=3").json()
    assert [(event["seq"], event["message"]) for event in rest["data"]] == [(4, "4"), (5, "5"), (6, "6"), (7, "7")]
    assert rest["has_more"] is False
    assert http.get(f"/v1/jobs/{job_id}/events?after=7").json()["data"] == []


def test_a_stream_sends_stored_and_new_events_and_the_end(
    server: ServerProcess, rows: Rows, http: httpx.Client
) -> None:
    job_id = rows.job()
    rows.log_events(job_id, "a line\nof two, and é 日本  ")
    with open_stream(server, job_id) as reader:
        stored = reader.wait_for(2)
        assert [(event["sse_id"], event["sse_event"]) for event in stored] == [("1", "status"), ("2", "log")]
        assert stored[1]["message"] == "a line\nof two, and é 日本  "
        assert http.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
        events = reader.wait_for_end()
    assert [(event["sse_id"], event["sse_event"]) for event in events[2:]] == [("3", "status"), (None, "end")]
    assert (events[2]["status"], events[3]["status"]) == ("cancelled", "cancelled")
    assert reader.text.startswith("retry: 2000\n\n")
    page = http.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert page == [{name: value for name, value in event.items() if "sse" not in name} for event in events[:-1]]


@pytest.mark.extended
def test_events_stored_by_another_process_are_streamed(server: ServerProcess, rows: Rows) -> None:
    job_id = rows.job()
    with open_stream(server, job_id) as reader:
        reader.wait_for(1)
        rows.log_events(job_id, "from elsewhere")
        assert reader.wait_for(2)[1]["message"] == "from elsewhere"


def test_a_reconnect_gets_the_remaining_events_or_204(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    rows.attempt(job_id, progress=[{"step": step} for step in range(1, 1201)], to=JobStatus.SUCCEEDED)
    path = f"/v1/jobs/{job_id}/events"
    whole = parse_sse(http.get(path, headers=STREAM).text)
    assert [event.get("seq") for event in whole] == [*range(1, 1204), None]
    assert whole[-1] == {"status": "succeeded", "last_seq": 1203, "sse_id": None, "sse_event": "end"}
    rest = parse_sse(http.get(path, headers={**STREAM, "Last-Event-ID": "1200"}).text)
    assert rest == whole[1200:]
    assert parse_sse(http.get(f"{path}?after=1200", headers=STREAM).text) == whole[1200:]
    for seen in ("1203", "5000"):
        response = http.get(path, headers={**STREAM, "Last-Event-ID": seen})
        assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize("header", ["x", "-1", "1.5", "9" * 30])
def test_an_invalid_last_event_id_is_rejected(rows: Rows, http: httpx.Client, header: str) -> None:
    response = http.get(f"/v1/jobs/{rows.job()}/events", headers={**STREAM, "Last-Event-ID": header})
    assert (response.status_code, error_of(response)["param"]) == (422, "Last-Event-ID")


@pytest.mark.extended
def test_a_stream_resumed_across_server_kills_sends_every_event_once(tmp_path: Path, redis_url: str) -> None:
    seen: list[int] = []
    with running_server(tmp_path / "home", redis_url) as server:
        rows = Rows(server.settings)
        job_id = rows.job()
        for how in (signal.SIGKILL, signal.SIGTERM):
            with open_stream(server, job_id, **{"Last-Event-ID": str(seen[-1])} if seen else {}) as reader:
                rows.log_events(job_id, "one", "two")
                reader.wait_for(2 if seen else 3)
                server.end(how)
                rows.log_events(job_id, "while it was away")
                seen += [event["seq"] for event in reader.wait_for_end()]
            server.start()
        with server.http() as http:
            http.post(f"/v1/jobs/{job_id}/cancel")
            last = http.get(f"/v1/jobs/{job_id}/events", headers={**STREAM, "Last-Event-ID": str(seen[-1])})
        seen += [event["seq"] for event in parse_sse(last.text)[:-1]]
    assert seen == list(range(1, 9))


@pytest.mark.extended
def test_sigterm_ends_streams_within_a_second_with_exit_code_0(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server, server.http() as http:
        job_id = submit(http)["id"]
        running = Rows(server.settings).job()
        Rows(server.settings).attempt(running, log="a line\n")
        readers = [
            StreamReader(http, f"/v1/jobs/{job_id}/events", STREAM),
            StreamReader(http, f"/v1/jobs/{running}/events", STREAM),
            StreamReader(http, f"/v1/jobs/{running}/logs?follow=true", {}),
        ]
        wait_until(lambda: all(reader.text for reader in readers), 30, "every stream to have begun")
        status = server.end(signal.SIGTERM)
        for reader in readers:
            reader.wait_for_end()
    assert status == 0
    assert not any(reader.broke for reader in readers), "a stream went on until the server cut it off"
    assert not any("event: end" in reader.text for reader in readers)


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_have_each_step_once_from_its_latest_attempt(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    first = [{"phase": "training", "step": step, "loss": 10.0 - step, "tokens": step * 8} for step in range(1, 7)]
    rows.attempt(job_id, progress=[{"phase": "loading_data"}, *first], to=JobStatus.QUEUED)
    usage = {"data_wait_share": 0.01, "memory": {"cuda:0": 3, "cuda:1": 4}}
    shown: dict[str, Any] = {"phase": "training", "learning_rate": 0.1, **usage}
    second: list[dict[str, Any]] = [{**shown, "step": step, "loss": 1.0 * step} for step in (5, 6, 7)]
    second[2]["rewards"] = {"chosen": 0.3, "rejected": 0.1, "margin": 0.2, "accuracy": 0.75}
    evaluated = {"phase": "evaluating", "step": 7, "eval_loss": 0.5, "perplexity": 1.6, "rewards": {"margin": 0.1}}
    rows.attempt(job_id, progress=[*second, evaluated], to=JobStatus.SUCCEEDED)
    metrics = http.get(f"/v1/jobs/{job_id}/metrics").json()
    assert metrics["object"] == "metrics"
    assert metrics["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert metrics["loss"] == [9.0, 8.0, 7.0, 6.0, 5.0, 6.0, 7.0]
    assert metrics["eval_loss"] == [None] * 6 + [0.5]
    assert metrics["learning_rate"] == [None] * 4 + [0.1] * 3
    assert metrics["tokens"] == [8, 16, 24, 32, None, None, None]
    assert metrics["data_wait_share"] == [None] * 4 + [0.01] * 3
    assert metrics["peak_memory_bytes"] == [None] * 4 + [7] * 3
    last = {name: values[-1] for name, values in metrics.items() if "rewards" in name or name == "perplexity"}
    assert {name: value for name, value in last.items() if value is not None} == {
        "perplexity": 1.6,
        "rewards_chosen": 0.3,
        "rewards_rejected": 0.1,
        "rewards_margin": 0.2,
        "rewards_accuracy": 0.75,
        "eval_rewards_margin": 0.1,
    }
    assert {len(values) for name, values in metrics.items() if name != "object"} == {7}
    lines = http.get(f"/v1/jobs/{job_id}/metrics", headers={"Accept": "text/csv"})
    assert lines.headers["content-type"].startswith("text/csv")
    assert lines.text.splitlines()[0].startswith("step,loss,eval_loss,learning_rate")
    assert lines.text.splitlines()[7].startswith("7,7.0,0.5,0.1,")
    assert lines.text.splitlines()[0].split(",")[1:] == [name for name in metrics if name not in ("object", "step")]
    few = http.get(f"/v1/jobs/{job_id}/metrics?max_points=3").json()
    assert few["step"] == [1, 4, 7]
    assert http.get(f"/v1/jobs/{job_id}/metrics?max_points=1").json()["step"] == [7]
    assert http.get(f"/v1/jobs/{job_id}/metrics?max_points=100").json() == metrics


def test_a_line_over_several_steps_adds_each_step_to_the_curves(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    each = [{"step": step, "loss": 10.0 - step, "grad_norm": 1.0 * step, "tokens": step} for step in range(2, 6)]
    line = {"phase": "training", "step": 5, "loss": 6.5, "tokens": 5, "tokens_per_second": 9.0, "steps": each}
    rows.attempt(job_id, progress=[{"phase": "training", "step": 1, "loss": 9.0}, line], to=JobStatus.QUEUED)
    again = {**line, "steps": [{"step": step, "loss": 0.5} for step in (4, 5)]}
    rows.attempt(job_id, progress=[again], to=JobStatus.SUCCEEDED)
    metrics = http.get(f"/v1/jobs/{job_id}/metrics").json()
    assert metrics["step"] == [1, 2, 3, 4, 5]
    assert metrics["loss"] == [9.0, 8.0, 7.0, 0.5, 0.5]
    assert metrics["grad_norm"] == [None, 2.0, 3.0, None, None]
    assert metrics["tokens_per_second"] == [None, None, None, None, 9.0]


def test_thinned_curves_keep_their_ends_and_their_evaluations() -> None:
    steps = list(range(1, 1001))
    evaluated = set(range(30, 1001, 30))
    few = thin_out(steps, 100, evaluated)
    assert (len(few), few[0], few[-1]) == (100, 1, 1000)
    assert few == sorted(set(few))
    assert evaluated <= set(few)
    assert thin_out(steps, 2, evaluated) == [1, 1000]


def test_metrics_without_progress_are_empty_arrays(rows: Rows, http: httpx.Client) -> None:
    metrics = http.get(f"/v1/jobs/{rows.job()}/metrics").json()
    assert all(values == [] for name, values in metrics.items() if name != "object")


# --- Logs -------------------------------------------------------------------------------------------------------------


def test_logs_contain_the_attempts_in_order_with_header_lines(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    rows.attempt(job_id, log="one\ntwo\nthree without an end", to=JobStatus.QUEUED)
    rows.attempt(job_id, log="four\nfive\n", to=JobStatus.SUCCEEDED)
    response = http.get(f"/v1/jobs/{job_id}/logs")
    assert response.headers["content-type"].startswith("text/plain")
    marks = [line for line in response.text.splitlines() if line.startswith("=== attempt")]
    assert [mark[:25] for mark in marks] == ["=== attempt 1 on w1, star", "=== attempt 2 on w1, star"]
    first, second = marks
    assert response.text == f"{first}\none\ntwo\nthree without an end\n{second}\nfour\nfive\n"

    def logs(query: str) -> str:
        return http.get(f"/v1/jobs/{job_id}/logs?{query}").text

    assert logs("attempt=1") == f"{first}\none\ntwo\nthree without an end"
    assert logs("tail=1") == f"{second}\nfive\n"
    assert logs("tail=2") == f"{second}\nfour\nfive\n"
    assert logs("tail=3") == f"{first}\nthree without an end\n{second}\nfour\nfive\n"
    assert logs("tail=99") == response.text
    assert logs("tail=0") == f"{second}\n"
    assert logs("tail=1&attempt=1") == f"{first}\nthree without an end"
    assert logs("follow=true") == response.text
    assert logs("follow=true&attempt=1") == logs("attempt=1")
    missing = http.get(f"/v1/jobs/{job_id}/logs?attempt=3")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "attempt_not_found")


def test_a_tail_starts_at_a_line_boundary(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    lines = [str(number) * (number % 4000) for number in range(300)]
    rows.attempt(job_id, log="\n".join(lines) + "\n", to=JobStatus.SUCCEEDED)
    for count in (1, 7, 60, 299, 300, 301):
        text = http.get(f"/v1/jobs/{job_id}/logs?tail={count}").text
        assert text.split("\n")[1:-1] == lines[-count:]


def test_a_followed_log_continues_across_attempts_until_the_job_ends(
    server: ServerProcess, rows: Rows, http: httpx.Client
) -> None:
    job_id = rows.job()
    with server.http() as reader_http:
        reader = StreamReader(reader_http, f"/v1/jobs/{job_id}/logs?follow=true", {})
        rows.attempt(job_id, log="one\n", to=JobStatus.QUEUED)
        wait_until(lambda: "one\n" in reader.text, 20, "the first attempt's log")
        rows.attempt(job_id, log="two\n")
        wait_until(lambda: "two\n" in reader.text, 20, "the second attempt's log")
        with (rows.artifacts.root / log_key(job_id, 2)).open("a") as log:
            log.write("three\n")
        wait_until(lambda: "three\n" in reader.text, 20, "what was appended")
        http.post(f"/v1/jobs/{job_id}/cancel")
        assert reader.ended_at is None
        rows.end(job_id, JobStatus.CANCELLED)
        reader.wait_for_end()
    assert [line for line in reader.text.splitlines() if "===" not in line] == ["one", "two", "three"]


@pytest.mark.extended
def test_quiet_seconds_ends_a_followed_log_that_offset_continues(
    server: ServerProcess, rows: Rows, http: httpx.Client
) -> None:
    """A reader behind a proxy with an idle timeout gets complete responses, and no byte twice."""
    job_id = rows.job()
    path = f"/v1/jobs/{job_id}/logs"
    assert http.get(f"{path}?follow=true&quiet_seconds=1").content == b""
    rows.attempt(job_id, log="one\nno end")
    read = http.get(f"{path}?follow=true&quiet_seconds=1").content
    assert read.endswith(b"\none\nno end")
    with (rows.artifacts.root / log_key(job_id, 1)).open("a") as log:
        log.write(" yet")
    read += http.get(f"{path}?follow=true&quiet_seconds=1&offset={len(read)}").content
    assert read.endswith(b"no end yet")
    rows.end(job_id, JobStatus.CANCELLED)
    whole = http.get(path).content
    assert read == whole
    for offset in range(len(whole) + 2):
        assert http.get(f"{path}?offset={offset}").content == whole[offset:]


def test_an_offset_counts_across_attempts(rows: Rows, http: httpx.Client) -> None:
    job_id = rows.job()
    rows.attempt(job_id, log="", to=JobStatus.QUEUED)
    rows.attempt(job_id, log="x", to=JobStatus.QUEUED)
    rows.attempt(job_id, log="yz\n", to=JobStatus.SUCCEEDED)
    path = f"/v1/jobs/{job_id}/logs"
    whole = http.get(path).content
    assert [http.get(f"{path}?offset={at}").content for at in range(len(whole))] == [
        whole[at:] for at in range(len(whole))
    ]
    refused = http.get(f"{path}?offset=3&tail=1")
    assert (refused.status_code, error_of(refused)["param"]) == (422, "offset")


def test_an_events_page_is_json_unless_an_event_stream_is_accepted(rows: Rows, http: httpx.Client) -> None:
    response = http.get(f"/v1/jobs/{rows.job()}/events", headers={"Accept": "application/json, */*"})
    assert json.loads(response.text)["object"] == "list"


@pytest.mark.extended
def test_comments_keep_an_idle_event_stream_open(idle_stream: StreamReader) -> None:
    wait_until(lambda: "\n: " in idle_stream.text, 20, "a comment within 15 s and a little")
    assert len(idle_stream.events) == 1
    assert idle_stream.ended_at is None


@pytest.mark.extended
def test_carriage_returns_keep_an_idle_followed_log_open(quiet_log: StreamReader) -> None:
    wait_until(lambda: "loading\n\r" in quiet_log.text, 30, "a carriage return within 15 s and a little")
    assert quiet_log.ended_at is None


@pytest.mark.parametrize("path", ["events", "logs?follow=true"])
def test_disconnected_readers_leave_no_resources_behind(
    server: ServerProcess, rows: Rows, http: httpx.Client, path: str
) -> None:
    job_id = rows.job()

    def num_threads() -> int:
        return len(list(Path("/proc", str(server.pid), "task").iterdir()))

    def read_and_leave() -> None:
        with server.http() as reader, reader.stream("GET", f"/v1/jobs/{job_id}/{path}", headers=STREAM) as response:
            assert response.status_code == 200
            rows.log_events(job_id, "something")

    read_and_leave()
    before = num_threads()
    for _ in range(20):
        read_and_leave()
    wait_until(lambda: num_threads() <= before + 2, 20, "the readers' threads to end")
    assert http.get(f"/v1/jobs/{job_id}").status_code == 200
    assert "ERROR" not in (server.home / "server.log").read_text()
