"""Fixtures: a browser for all tests of this folder, and a project with jobs in every state."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.harness.browser import Visitor, visiting
from tests.harness.valkey import ValkeyServer
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess, running_server
from zeta_core.contract.job.status import JobStatus, StatusReason

LEASE_SECONDS = 86_400


@dataclass(frozen=True)
class Jobs:
    """The ids of jobs by state."""

    running: str
    succeeded: str
    failed: str
    queued: str
    file: str  # the id of an uploaded data file
    webhook: str


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that never queues the running jobs of `Rows` again, although their worker does not exist."""
    home, url = tmp_path_factory.mktemp("server"), shared_valkey.second_url
    with running_server(home, url, ZETA_LEASE_SECONDS=str(LEASE_SECONDS)) as process:
        yield process


@pytest.fixture(scope="module")
def jobs(rows: Rows, server: ServerProcess) -> Jobs:
    running, succeeded, failed, queued = (rows.job(spec={"entity_name": name}) for name in ("a", "b", "c", "d"))
    rows.attempt(running, progress=curve(1, 60), to=JobStatus.QUEUED, reason=StatusReason.PROCESS_KILLED, log="one\n")
    rows.attempt(running, progress=curve(41, 80), log="two\nWARNING three\n")
    rows.change(running, progress=curve(80, 80)[0], worker="w1")
    rows.attempt(succeeded, progress=curve(1, 100), to=JobStatus.SUCCEEDED, log="a line\n" * 30)
    rows.change(succeeded, progress=curve(100, 100)[0], result={"train_loss": 2.0, "eval_loss": 2.1})
    rows.checkpoint(succeeded, "final", 100, {"model.safetensors": ("weights", b"x" * 5000)})
    rows.attempt(failed, progress=curve(1, 3), to=JobStatus.FAILED, reason=StatusReason.OUT_OF_MEMORY, log="boom\n")
    warning = {"code": "few_steps", "message": "Few steps.", "patch": {"epochs": 2}}
    rows.change(failed, error=ERROR, warnings=[warning, warning])  # as of two attempts
    for job_id, name in zip((running, succeeded, failed, queued), ("alpha", "beta", "gamma", "delta"), strict=True):
        rows.change(job_id, entity_name=name)
    with server.http() as http:
        uploaded = http.post(
            "/v1/files", files={"file": ("rows.jsonl", b'{"text": "a"}\n')}, data={"purpose": "dataset"}
        )
        webhook = http.post("/v1/webhooks", json={"url": "https://hooks.example.org/x"}).raise_for_status()
    ids = (uploaded.raise_for_status().json()["id"], webhook.json()["id"])
    return Jobs(running, succeeded, failed, queued, *ids)


ERROR: dict[str, Any] = {
    "code": "out_of_memory",
    "message": "Memory ran out in step 4.",
    "hint": "Use a smaller batch; see `zeta rerun`.",
    "patch": {"batch_size": 2},
    "evidence": {"log_tail": "torch.OutOfMemoryError"},
}


def curve(first: int, last: int, total: int = 100) -> list[dict[str, Any]]:
    """The progress of a run from one step to another, with an evaluation every ten steps."""
    events: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        fields = {"phase": "training", "step": step, "total_steps": total, "tokens": step * 512, "loss": 1 + 5 / step}
        events.append({**fields, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0, "eta_seconds": 9})
        if step % 10 == 0:
            events.append({"phase": "evaluating", "step": step, "eval_loss": 1.1 + 5 / step})
    return events


@pytest.fixture
def visit(chromium: Browser, server: ServerProcess) -> Iterator[Callable[..., Visitor]]:
    """Opens a window that is logged in; at the end of the test, no window may have had an error."""
    visitors: list[Visitor] = []
    with ExitStack() as windows:

        def open_window(**options: Any) -> Visitor:
            visitor = windows.enter_context(visiting(chromium, server.url, **options))
            visitor.log_in(API_KEY)
            visitors.append(visitor)
            return visitor

        yield open_window
        for visitor in visitors:
            visitor.check()
