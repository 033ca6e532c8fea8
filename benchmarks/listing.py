"""Time of every list and of /metrics with many jobs and events, relative to 100 jobs, on one server with two databases.

The rows are inserted directly into the databases. A request is measured with each database in turn.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.http_load import request_bytes, run_load
from benchmarks.result import BenchmarkResult
from benchmarks.services import HEADERS, DatabaseKind, databases, zeta_server
from benchmarks.stored_jobs import fill
from benchmarks.workload import Size
from tests.server.server_process import ServerProcess

FEW_JOBS, MANY_JOBS, EVENTS_PER_JOB = 100, 100_000, 100
REQUESTS = 40  # of each kind in a round
PATHS = (
    "/v1/jobs",
    "/v1/jobs?status=failed",
    "/v1/jobs?status=running&status=paused",
    "/v1/jobs?entity_name=name-1",
    "/v1/jobs?entity_name=missing",
    "/v1/jobs?metadata%5Bteam%5D=t1",
    "/v1/jobs?metadata%5Bteam%5D=missing",
    "/v1/jobs?after={middle}",
    "/v1/jobs/{middle}",
    "/v1/jobs/{middle}/events",
    "/v1/files",
    "/v1/workers",
    "/metrics",
)


def measure(size: Size, *, database: DatabaseKind) -> BenchmarkResult:
    many = size.of(MANY_JOBS, 400)
    sizes = {f"{FEW_JOBS} jobs": FEW_JOBS, f"{many:,} jobs": many}
    times: dict[str, dict[str, list[float]]] = {name: {path: [] for path in PATHS} for name in sizes}
    with databases(database) as made, ExitStack() as stack:
        servers: dict[str, tuple[ServerProcess, str]] = {}
        for number, (name, num_jobs) in enumerate(sizes.items()):
            folder = Path(made.folder / str(number))
            folder.mkdir()
            url = made.new_url()
            server = stack.enter_context(zeta_server(folder, url))
            servers[name] = server, fill(server, num_jobs, EVENTS_PER_JOB if num_jobs == many else 10, url)
        for turn in range(size.rounds + 1):
            for path in PATHS:
                for name, (server, middle) in servers.items():
                    request = request_bytes("GET", path.format(middle=middle), HEADERS)
                    load = run_load(server.port, lambda _, sent=request: sent, clients=1, total=size.of(REQUESTS, 3))
                    if turn:
                        times[name][path].append(1000 * statistics.median(load.latencies))
    few, large = times.values()
    medians = {path: (statistics.median(few[path]), statistics.median(large[path])) for path in PATHS}
    ratios = {path: after / before for path, (before, after) in medians.items()}
    worst = max(ratios, key=ratios.__getitem__)
    return BenchmarkResult(
        title=f"Slowest list or /metrics ({database}), {many:,} jobs and {many * EVENTS_PER_JOB:,} events, "
        "relative to 100 jobs",
        unit="ms",
        figures={f"{name}, {worst}": times[name][worst] for name in times},
        ratio=ratios[worst],
        target=1.5,
        target_is="maximum",
        notes=f"The median of {REQUESTS} requests in each round; the list with the largest ratio of medians.",
        details={"ratios": ratios, "milliseconds": medians},
    )


on_sqlite = partial(measure, database="sqlite")
on_postgresql = partial(measure, database="postgresql")
