"""Durable submissions per second with 32 concurrent clients, relative to a minimal FastAPI + SQLAlchemy service.

The services run side by side and take turns: while one is measured, the other is idle.
"""

from __future__ import annotations

import statistics
from functools import partial

from benchmarks.http_load import Load, run_load
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.services import DatabaseKind, databases, minimal_service, submission, zeta_server
from benchmarks.workload import Size

CLIENTS, SUBMISSIONS = 32, 600
PEER = "FastAPI + SQLAlchemy"


def measure(size: Size, *, database: DatabaseKind) -> BenchmarkResult:
    loads: dict[str, list[Load]] = {ZETA: [], PEER: []}
    body = submission()
    with (
        databases(database) as made,
        zeta_server(made.folder, made.new_url()) as server,
        minimal_service(made.folder, made.new_url()) as peer_port,
    ):
        ports = {ZETA: server.port, PEER: peer_port}
        for turn in range(size.rounds + 1):
            for name in list(ports)[:: 1 if turn % 2 == 0 else -1]:
                total = size.of(SUBMISSIONS, 40) if turn else 40  # the first turn warms up
                load = run_load(ports[name], lambda _: body, clients=CLIENTS, total=total, expected_status=201)
                if turn:
                    loads[name].append(load)
    rates = {name: [load.per_second for load in each] for name, each in loads.items()}
    p99 = {name: [1000 * load.percentile(0.99) for load in each] for name, each in loads.items()}
    return BenchmarkResult(
        title=f"Durable submissions with {CLIENTS} clients ({database}), relative to a minimal service",
        unit="submissions/s",
        figures=rates,
        ratio=ratio_of_rounds(rates[ZETA], rates[PEER]),
        target=0.6,
        target_is="minimum",
        notes="POST /v1/jobs: validated, with its first event, on disk before the 201. The peer inserts one row.",
        details={
            "p99_milliseconds": p99,
            "median_p99_milliseconds": {name: statistics.median(values) for name, values in p99.items()},
            "target_p99_milliseconds": 100,
        },
    )


on_sqlite = partial(measure, database="sqlite")
on_postgresql = partial(measure, database="postgresql")
