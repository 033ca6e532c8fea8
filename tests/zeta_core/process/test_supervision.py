"""A training knows its worker's last sign of life, even if it starts late."""

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
from zeta_core.process.supervision import Supervision

LATE = """
import sys, threading
from pathlib import Path
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.process.supervision import Supervision
order = RunFile.model_validate_json(sys.argv[2])
Supervision(Path(sys.argv[1])).watch(order, lambda: print("ends", flush=True))
threading.Event().wait(30)
"""


def order(*, self_stop_seconds: float, end_seconds: float) -> RunFile:
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
def supervision(alive: Path) -> Iterator[Supervision]:
    with closing(Supervision(alive)) as made:
        yield made


def test_silence_is_counted_from_the_workers_last_time_until_it_writes_again(
    alive: Path, supervision: Supervision
) -> None:
    alive.write_text(f"{time.monotonic() - 5:020.3f}\n")
    supervision.watch(order(self_stop_seconds=4, end_seconds=1000), lambda: None)
    wait_until(lambda: supervision.is_lost, 2, "the training to know at once")
    alive.write_text(f"{time.monotonic():020.3f}\n")
    os.utime(alive, (0, 0))  # the time of the file does not count
    wait_until(lambda: not supervision.is_lost, 2, "the training to hear of its worker")


def test_without_a_file_the_count_starts_with_the_process(supervision: Supervision) -> None:
    supervision.watch(order(self_stop_seconds=0.3, end_seconds=1000), lambda: None)
    wait_until(lambda: supervision.is_lost, 5, "the training to stop waiting")


def test_a_process_that_starts_after_its_deadline_exits_at_once(alive: Path) -> None:
    alive.write_text(f"{time.monotonic() - 60:020.3f}\n")
    limits = order(self_stop_seconds=20, end_seconds=50).model_dump_json()
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", LATE, str(alive), limits], capture_output=True, text=True, timeout=25, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "ends\n"), ended.stderr
    assert time.monotonic() - began < 20
