"""Whole services (``zeta up``) for benchmarks of the time that users wait for a job."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from zeta_core.system.settings import process_environment

Found = TypeVar("Found")
START_SECONDS = 180.0
POLL_SECONDS = 0.005
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 128,
}
SPEC: dict[str, Any] = {
    "model": {"config": TINY_LLAMA},
    "dataset": {"builtin": "python-docs"},
    "seq_len": 64,
    "batch_size": 4,
    "gradient_accumulate_every": 1,
    "learning_rate": 0.003,
    "max_steps": 1,
    "checkpointing_steps": 100,
}


@dataclass(frozen=True)
class Service:
    """A running service: its home, a client with its key, and the process of ``zeta up``."""

    home: Path
    http: httpx.Client
    process: psutil.Process

    def submit(self, **changes: Any) -> str:
        answer = self.http.post("/v1/jobs", json={**SPEC, **changes}).raise_for_status()
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/jobs/{job_id}").raise_for_status().json()

    def wait_for_status(self, job_id: str, status: str) -> None:
        wait_until(lambda: self.job(job_id)["status"] == status)

    def first_step_at(self, job_id: str, attempt: int = 1) -> float | None:
        """When the attempt finished its first step, by the clock of this machine; ``None`` if it has not yet."""
        events = self.http.get(f"/v1/jobs/{job_id}/events?limit=1000").raise_for_status().json()["data"]
        times = [
            datetime.fromisoformat(event["created_at"]).timestamp()
            for event in events
            if event["type"] == "progress" and event.get("step") and event.get("attempt") == attempt
        ]
        return min(times, default=None)

    def first_process(self, job_id: str) -> psutil.Process:
        """The first process of the job's present attempt."""
        marked = [process for process in self._worker().children(recursive=True) if _is_of(process, job_id)]
        return min(marked, key=lambda process: process.create_time())

    def idle_figures(self, seconds: float) -> dict[str, float]:
        """Share of a core that each process of the service uses while it is idle, in percent, and memory in MiB."""
        processes = {_role(process): process for process in self.process.children(recursive=True)}
        before = {role: sum(process.cpu_times()[:2]) for role, process in processes.items()}
        threading.Event().wait(seconds)
        figures: dict[str, float] = {}
        for role, process in processes.items():
            figures[f"{role}: % of a core"] = 100 * (sum(process.cpu_times()[:2]) - before[role]) / seconds
            figures[f"{role}: MiB"] = process.memory_full_info().uss / 2**20
        return figures

    def _worker(self) -> psutil.Process:
        return next(process for process in self.process.children(recursive=True) if _role(process) == "worker")


@contextmanager
def running_service(folder: Path, *, warm: bool) -> Generator[Service]:
    """Run ``zeta up`` until the block ends; it starts when a worker, and its fork server if ``warm``, are ready."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: value for name, value in process_environment().items() if not name.startswith("ZETA_")}
    with (folder / "up.out").open("wb") as log:
        started = subprocess.Popen(
            [Path(sys.executable).with_name("zeta"), "up", "--home", folder / "home", "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**own, "ZETA_WARM_START": "yes" if warm else "no"},
        )
    home = folder / "home"
    try:
        wait_until((home / "admin.key").exists)
        key = (home / "admin.key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False) as http:
            wait_until(lambda: _has_worker(http))
            if warm:
                wait_until(lambda: "fork server is ready" in (home / "logs" / "worker.log").read_text())
            yield Service(home, http, psutil.Process(started.pid))
    finally:
        started.send_signal(signal.SIGINT)
        started.wait(60)


def wait_until(condition: Callable[[], Found]) -> Found:
    """Wait until ``condition`` returns something true, and return that."""
    deadline, pause = time.monotonic() + START_SECONDS, threading.Event()
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("the service is not ready")
        pause.wait(POLL_SECONDS)
    return found


def _has_worker(http: httpx.Client) -> bool:
    try:
        return bool(http.get("/v1/workers").raise_for_status().json()["data"])
    except httpx.HTTPError:
        return False


def _is_of(process: psutil.Process, job_id: str) -> bool:
    try:
        return process.environ().get("ZETA_JOB_ID") == job_id
    except psutil.Error:
        return False


def _role(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    names = {"fork-server": "fork server", "worker": "worker", "server": "server", "valkey": "Valkey", "redis": "Redis"}
    return next((role for word, role in names.items() if word in words), process.name())
