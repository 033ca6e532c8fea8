"""A training process knows its worker's last sign of life, even if it starts late."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.waiting import wait_until
from zeta_core.contract.wire.run_directory import ALIVE_FILE, RunFile
from zeta_core.process.worker_monitor import WorkerMonitor

LATE = """
import sys, threading
from pathlib import Path
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.process.worker_monitor import WorkerMonitor
run_file = RunFile.model_validate_json(sys.argv[2])
WorkerMonitor(Path(sys.argv[1])).start(run_file, lambda: print("ends", flush=True))
threading.Event().wait(30)
"""


def run_file(*, self_stop_seconds: float, end_seconds: float) -> RunFile:
    return RunFile(
        job_id="job_1",
        attempt=1,
        spec={},
        output_dir="/",
        artifacts_root="/",
        self_stop_seconds=self_stop_seconds,
        end_seconds=end_seconds,
    )


@pytest.fixture
def alive(tmp_path: Path) -> Path:
    return tmp_path / ALIVE_FILE


@pytest.fixture
def monitor(alive: Path) -> Iterator[WorkerMonitor]:
    with closing(WorkerMonitor(alive)) as monitor:
        yield monitor


def test_silence_counts_from_the_last_sign_of_life_until_the_worker_returns(
    alive: Path, monitor: WorkerMonitor
) -> None:
    alive.write_text(f"{time.monotonic() - 5:020.3f}\n")
    monitor.start(run_file(self_stop_seconds=4, end_seconds=1000), lambda: None)
    wait_until(lambda: monitor.is_lost, 2, "the process to detect the loss")
    alive.write_text(f"{time.monotonic():020.3f}\n")
    os.utime(alive, (0, 0))  # the modification time does not matter
    wait_until(lambda: not monitor.is_lost, 2, "the process to detect that the worker is back")


def test_without_a_file_silence_counts_from_the_start_of_the_process(monitor: WorkerMonitor) -> None:
    monitor.start(run_file(self_stop_seconds=0.3, end_seconds=1000), lambda: None)
    wait_until(lambda: monitor.is_lost, 5, "the process to give up on its worker")


def test_a_process_that_starts_after_its_deadline_exits_immediately(alive: Path) -> None:
    alive.write_text(f"{time.monotonic() - 60:020.3f}\n")
    limits = run_file(self_stop_seconds=20, end_seconds=50).model_dump_json()
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", LATE, str(alive), limits], capture_output=True, text=True, timeout=25, check=False
    )
    assert (process.returncode, process.stdout) == (1, "ends\n"), process.stderr
    assert time.monotonic() - started < 20
