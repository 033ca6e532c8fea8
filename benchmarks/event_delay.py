"""Time from a step to its arrival at a client that follows the job: ten jobs with ten steps per second each.

The server, Valkey and the worker are real. Only the training is a small program that writes one progress line to its
journal after each step, so the measured time covers the whole path of a line: journal, worker, Valkey, database and
event stream. A separate process follows all jobs.
"""

from __future__ import annotations

import signal
import statistics
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

from benchmarks.result import BenchmarkResult
from benchmarks.services import databases, zeta_server
from benchmarks.viewers import Viewers
from benchmarks.workload import Size
from tests.harness.children import start_child, stop_child
from tests.harness.fleet import SMALL_WORKER
from tests.harness.service import clean_environment
from tests.harness.waiting import wait_until
from tests.server.server_process import REPOSITORY, SECRET, ServerProcess, submit

NUM_JOBS, STEPS_PER_SECOND = 10, 10
ROUNDS, ROUND_SECONDS, START_SECONDS = 4, 15, 120.0
TARGET_MILLISECONDS = 150


def measure(size: Size) -> BenchmarkResult:
    num_jobs = size.of(NUM_JOBS, 2)
    p99: list[float] = []
    medians: list[float] = []
    num_events = 0
    with (
        databases("sqlite") as made,
        zeta_server(made.folder, None) as server,
        _worker(server, num_jobs),
        server.http() as http,
    ):
        metadata = {"steps": str(10**6), "seconds_per_step": str(1 / STEPS_PER_SECOND)}
        jobs = [submit(http, metadata=metadata)["id"] for _ in range(num_jobs)]
        wait_until(
            lambda: all((http.get(f"/v1/jobs/{job}").json()["progress"] or {}).get("step") for job in jobs),
            START_SECONDS,
            "all jobs to run",
        )
        for _ in range(size.of(ROUNDS, 1)):
            with Viewers(http, jobs, 1) as viewers:
                threading.Event().wait(size.of(ROUND_SECONDS, 2))
            delays = sorted(1000 * delay for delay in viewers.delays)
            num_events += len(delays)
            p99.append(delays[int(0.99 * len(delays))])
            medians.append(statistics.median(delays))
        for job in jobs:
            http.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        wait_until(
            lambda: all(http.get(f"/v1/jobs/{job}").json()["status"] == "cancelled" for job in jobs),
            START_SECONDS,
            "all jobs to be cancelled",
        )
    return BenchmarkResult(
        title=f"p99 from a step to a client that follows its job ({num_jobs} jobs, {STEPS_PER_SECOND} steps/s each), "
        f"relative to {TARGET_MILLISECONDS} ms",
        unit="ms",
        figures={"p99": p99, "median": medians},
        ratio=statistics.median(p99) / TARGET_MILLISECONDS,
        target=1.0,
        target_is="maximum",
        notes=f"{num_events} events in {len(p99)} rounds. SQLite; server, worker, Valkey, {num_jobs} small "
        "programs and the client share the machine.",
        details={"events": num_events},
    )


@contextmanager
def _worker(server: ServerProcess, num_slots: int) -> Generator[None]:
    """A worker whose runs are `tests.worker.small_training`."""
    environment = {
        **clean_environment(),
        "PYTHONPATH": str(REPOSITORY),
        "ZETA_HOME": str(server.home),
        "ZETA_REDIS_URL": server.settings.redis_url,
        "ZETA_WORKER_SECRET": SECRET,
        "ZETA_WORKER_NAME": "benchmark",
        "ZETA_WORKER_SLOTS": str(num_slots),
    }
    process = start_child([sys.executable, SMALL_WORKER], log_file=server.home / "worker.log", environment=environment)
    try:
        yield
    finally:
        stop_child(process, stop_signal=signal.SIGTERM)
