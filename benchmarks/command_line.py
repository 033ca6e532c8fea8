"""Time that short commands of `zeta` take, which is mostly the start of the process.

A small HTTP server in this process responds with a stored page of jobs, so the figures exclude the time of the service.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

from benchmarks.result import BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size
from zeta_core.contract.job.job import Attempt, Job
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.system.settings import process_environment

ROUNDS = 15
TARGET = 1.5  # of a script that sends the same request with httpx and prints the response unformatted
SCRIPT = "import httpx, sys; print(httpx.get(sys.argv[1] + '/v1/jobs').json())"
REFERENCE = "httpx script"


def stored_page() -> bytes:
    """A page with one finished job, as the server sends it."""
    now = datetime.now(UTC)
    job = Job(
        id="job_01k9q5w1dyr7x0x5g6v4h1c2bn",
        project="default",
        created_by="admin",
        status=JobStatus.SUCCEEDED,
        spec={"model": "OWNER/MODEL", "dataset": {"builtin": "python-docs"}},
        resolved_spec=ResolvedSpec(batch_size=8, learning_rate=3e-4),
        attempt=1,
        attempts=[Attempt(attempt=1, worker="gpu-box", started_at=now, finished_at=now)],
        max_retries=2,
        created_at=now,
        progress={"step": 100, "total_steps": 100, "recent_loss": 2.5},
    )
    return Page[Job](data=[job], first_id=job.id, last_id=job.id).model_dump_json().encode()


@contextmanager
def serving(page: bytes) -> Generator[str]:
    """The URL of a server that responds to every request with ``page``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(page)))):
                self.send_header(name, value)
            self.send_header("X-Request-Id", "req_1")  # the client recognizes the service by it
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def measure(size: Size) -> BenchmarkResult:
    python = sys.executable
    figures: dict[str, list[float]] = {}
    with serving(stored_page()) as url:
        environment = {**process_environment(), "ZETA_URL": url, "ZETA_API_KEY": "unused"}
        commands = {
            "zeta jobs": [python, "-m", "zeta", "jobs"],
            REFERENCE: [python, "-c", SCRIPT, url],
            "zeta --help": [python, "-m", "zeta", "--help"],
            "python -c pass": [python, "-c", "pass"],
        }
        for _ in range(size.of(ROUNDS, 3)):
            for name, command in commands.items():
                figures.setdefault(name, []).append(_seconds(command, environment))
    return BenchmarkResult(
        title="Time of a short command",
        unit="s",
        figures=figures,
        ratio=ratio_of_rounds(figures["zeta jobs"], figures[REFERENCE]),
        target=TARGET,
        target_is="maximum",
        notes=f"Median {statistics.median(figures['zeta jobs']):.2f} s for `zeta jobs` (goal 0.2 s) and "
        f"{statistics.median(figures['zeta --help']):.2f} s for `zeta --help` (goal 0.12 s). The commands alternate. "
        "The reference imports httpx and sends the same request, without models, options or a table.",
    )


def _seconds(command: list[str], environment: Mapping[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=dict(environment), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started
