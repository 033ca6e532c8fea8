"""Time from the submission of a job with one step to its success, relative to a job of Ray that does nothing.

Ray is installed in an environment that the benchmark removes afterwards. Its cluster has one node and its own folder.
Both services run side by side, and the submissions alternate. Both clients ask for the status every 5 ms.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.job_start import WARM, one_step
from benchmarks.result import ZETA, BenchmarkResult, Skipped, ratio_of_rounds
from benchmarks.whole_service import running_service, wait_until
from benchmarks.workload import Size
from tests.harness.ports import free_loopback_port
from zeta_core.system.settings import process_environment

ROUNDS = 7
RAY = "ray[default]==2.60.0"
PEER = "Ray Jobs"
INSTALL_SECONDS, STOP_SECONDS = 600, 60
OBJECT_STORE_BYTES = 100_000_000


def measure(size: Size) -> BenchmarkResult:
    figures: dict[str, list[float]] = {ZETA: [], PEER: []}
    # Ray's sockets are in the folder, and their paths must have fewer than 108 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        program = install_ray(Path(folder) / "environment")
        with (
            running_service(Path(folder) / WARM, warm=True) as service,
            running_ray(program, Path(folder) / "ray") as ray,
        ):
            for turn in range(size.of(ROUNDS, 1) + 1):
                for name in list(figures)[:: 1 if turn % 2 == 0 else -1]:
                    seconds = one_step(service)[1] if name == ZETA else no_op_seconds(ray)
                    if turn:  # the first turn warms up
                        figures[name].append(seconds)
    return BenchmarkResult(
        title="From the submission of a job with one step to its success, relative to a no-op in Ray Jobs",
        unit="s",
        figures=figures,
        ratio=ratio_of_rounds(figures[ZETA], figures[PEER]),
        target=1.0,
        target_is="maximum",
        notes="One step of a tiny model, its checkpoint and its upload, through a whole service with warm starts; "
        f"{RAY} runs the command `true`.",
    )


def install_ray(environment: Path) -> Path:
    """Install Ray, and return its program. Raises `Skipped` if it can't be installed."""
    uv = Path(sys.executable).with_name("uv")
    commands: list[list[str | Path]] = [
        [uv, "venv", "--quiet", "--python", sys.executable, environment],
        [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", environment / "bin" / "python", RAY],
    ]
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Skipped(f"{RAY} could not be installed: {error}") from error
        except subprocess.CalledProcessError as error:
            raise Skipped(f"{RAY} could not be installed: {error.stderr.strip()}") from error
    return environment / "bin" / "ray"


@contextmanager
def running_ray(program: Path, folder: Path) -> Generator[httpx.Client]:
    """Run a cluster of one node; yields a client of its job server."""
    folder.mkdir()
    port = free_loopback_port()
    options: dict[str, object] = {
        "node-ip-address": "127.0.0.1",
        "port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "dashboard-agent-listen-port": free_loopback_port(),
        "ray-client-server-port": free_loopback_port(),
        "include-dashboard": "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": folder,
    }
    command = [program, "start", "--head", "--block", "--disable-usage-stats"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            stdout=output,
            stderr=output,
            env=process_environment(),
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            wait_until(lambda: _is_ready(http, process))
            yield http
    finally:
        process.send_signal(signal.SIGTERM)  # it ends the processes of the node
        process.wait(STOP_SECONDS)


def no_op_seconds(ray: httpx.Client) -> float:
    """From the submission of a job that does nothing to its success."""
    started = time.time()
    job_id = ray.post("/api/jobs/", json={"entrypoint": "true"}).raise_for_status().json()["submission_id"]

    def has_ended() -> bool:
        status = ray.get(f"/api/jobs/{job_id}").raise_for_status().json()["status"]
        assert status not in ("FAILED", "STOPPED"), status
        return status == "SUCCEEDED"

    wait_until(has_ended)
    return time.time() - started


def _is_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise Skipped(f"{RAY} exited with {process.returncode} at its start")
    try:
        return http.get("/api/jobs/").status_code == 200
    except httpx.HTTPError:
        return False
