"""The cost of people who watch a running job: how much slower it trains, and when they see each step.

A job trains on a whole service (``zeta up``). In alternating periods, nobody follows its events, or a hundred viewers
do, as the page of the job does in a browser. The viewers are in one separate process on the same machine, so the
slowdown includes the CPU time that they use themselves.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.result import BenchmarkResult, ratio_of_rounds
from benchmarks.whole_service import Service, running_service, wait_until
from benchmarks.workload import Size

NUM_VIEWERS, ROUNDS, PERIOD_SECONDS = 100, 4, 12
SETTLE_SECONDS = 2.0  # after the viewers have connected or left
MAX_COST, MAX_DELAY_SECONDS = 0.02, 1.0
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}


def measure(size: Size) -> BenchmarkResult:
    num_viewers, rounds = size.of(NUM_VIEWERS, 5), size.of(ROUNDS, 1)
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder) / "service", warm=False) as service:
        job_id = service.submit(model={"config": MODEL}, max_steps=10**6, checkpointing_steps=10**6)
        wait_until(lambda: _has_steps(service, job_id, 20))
        periods: dict[str, list[_Period]] = {"alone": [], "watched": []}
        delays: list[float] = []
        viewers_cpu: list[float] = []
        for _ in range(rounds):
            periods["alone"].append(_Period.measure(service, size))
            with Viewers(service.http, [job_id], num_viewers) as viewers:
                periods["watched"].append(_Period.measure(service, size))
                viewers_cpu.append(viewers.cpu_share())
            delays += viewers.delays
        service.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
        progress = _progress(service.http, job_id)
    figures = {name: [period.steps_per_second(progress) for period in each] for name, each in periods.items()}
    service_cpu = {name: statistics.median(period.service_cpu for period in each) for name, each in periods.items()}
    machine_share = (service_cpu["watched"] - service_cpu["alone"]) / (os.cpu_count() or 1)
    cost = 1 - ratio_of_rounds(figures["watched"], figures["alone"])
    slowest = max(delays, default=float("inf"))
    return BenchmarkResult(
        title=f"Cost of {num_viewers} viewers to the job that they watch, relative to 2 % of its steps per second",
        unit="steps/s",
        figures=figures,
        ratio=max(cost / MAX_COST, slowest / MAX_DELAY_SECONDS),
        target=1.0,
        target_is="maximum",
        notes=f"Cost {cost:.1%}; the service uses {machine_share:.1%} more of the machine's CPU time. A viewer gets "
        f"a report of the run {statistics.median(delays):.3f} s (median) to {slowest:.3f} s (slowest) after it was "
        f"written. The viewers themselves use {statistics.median(viewers_cpu):.1%} of a core.",
        details={
            "cost": cost,
            "machine_share": machine_share,
            "service_cpu": service_cpu,
            "slowest_seconds": slowest,
            "reports": len(delays),
            "viewers_cpu": viewers_cpu,
        },
    )


class Viewers:
    """A process with ``number`` viewers of each job; ``delays`` are known after the block, in seconds."""

    def __init__(self, http: httpx.Client, job_ids: Sequence[str], number: int) -> None:
        urls = [f"{http.base_url.join(f'/v1/jobs/{job}/events')}?after={_last_event(http, job)}" for job in job_ids]
        command = [sys.executable, "-m", "benchmarks.event_viewers", str(number), *urls]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{http.headers['Authorization']}\n")
        self._process.stdin.flush()
        self.delays: list[float] = []

    def __enter__(self) -> Viewers:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "connected\n"
        _wait(SETTLE_SECONDS)
        self._cpu, self._since = self._cpu_seconds(), time.monotonic()
        return self

    def cpu_share(self) -> float:
        """The share of a core that the viewers have used."""
        return (self._cpu_seconds() - self._cpu) / (time.monotonic() - self._since)

    def __exit__(self, *_: object) -> None:
        output = self._process.communicate("stop\n", timeout=30)[0]
        self.delays = [float(line) for line in output.split()]
        _wait(SETTLE_SECONDS)

    def _cpu_seconds(self) -> float:
        return float(sum(psutil.Process(self._process.pid).cpu_times()[:2]))


@dataclass(frozen=True)
class _Period:
    """A period, in seconds since 1970, and the share of a core that server, worker and Valkey used in it."""

    start: float
    end: float
    service_cpu: float

    @classmethod
    def measure(cls, service: Service, size: Size) -> _Period:
        start = time.time()
        percent = service.idle_figures(size.of(PERIOD_SECONDS, 3))
        used = sum(percent.get(f"{role}: % of a core", 0.0) for role in ("server", "worker", "Valkey"))
        return cls(start, time.time(), used / 100)

    def steps_per_second(self, progress: Sequence[Mapping[str, Any]]) -> float:
        """The median of the rates between the reports in the period, which ignores single interruptions."""
        reports = [(datetime.fromisoformat(event["created_at"]).timestamp(), event["step"]) for event in progress]
        inside = [report for report in reports if self.start <= report[0] <= self.end]
        return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(inside))


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)


def _has_steps(service: Service, job_id: str, number: int) -> bool:
    return ((service.job(job_id)["progress"] or {}).get("step") or 0) >= number


def _last_event(http: httpx.Client, job_id: str) -> int:
    return int(_events(http, job_id)[-1]["seq"])


def _progress(http: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """The job's progress events that contain a loss."""
    return [event for event in _events(http, job_id) if event["type"] == "progress" and event.get("loss") is not None]


def _events(http: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """All events of the job."""
    events: list[dict[str, Any]] = []
    after: str | None = "0"
    while after is not None:
        page = http.get(f"/v1/jobs/{job_id}/events?limit=1000&after={after}").raise_for_status().json()
        events += page["data"]
        after = page["next_after"]
    return events
