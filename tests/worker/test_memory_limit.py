"""A run that exceeds its memory limit is ended alone, and the error states the limit."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.harness.fleet import SmallFleet
from tests.harness.waiting import wait_until
from worker.run.memory_watch import MemoryWatch, free_memory_bytes

MEBIBYTE = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory accounting needs Linux")

# Allocates memory, maps a file, and forks a child that shares the pages. Each process prints a line when it is ready.
HOLDER = """
import mmap, os, sys
held = bytearray(b"a" * (int(sys.argv[1]) << 20))
file = open(sys.argv[2], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[at] for at in range(0, len(mapped), 4096))
os.fork()
print(flush=True)
sys.stdin.read()
"""


def holder(mebibytes: int, file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HOLDER, str(mebibytes), str(file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() + process.stdout.readline() == b"\n\n"
    return process


def test_memory_is_counted_once_and_without_mapped_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(MEBIBYTE) * 200)
    with holder(300, tmp_path / "weights") as process:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(tree) == 2

        def watch(limit: int | None, *, share: int = 2**62, free: int = 2**62) -> MemoryWatch:
            return MemoryWatch(
                lambda: tree, limit_bytes=limit, share_bytes=share, free_bytes=lambda: free, reserve_bytes=MEBIBYTE
            )

        assert watch(400 * MEBIBYTE).excess() is None, "counting the shared pages twice would give 600 MiB"
        excess = watch(200 * MEBIBYTE).excess()
        assert excess is not None
        assert 300 * MEBIBYTE <= excess.used_bytes < 400 * MEBIBYTE
        assert "more than its limit of 0.195 GiB (ZETA_JOB_MEMORY_BYTES)" in excess.message
        assert watch(None, share=200 * MEBIBYTE).excess() is None, "the machine has free memory"
        excess = watch(None, share=200 * MEBIBYTE, free=0).excess()
        assert excess is not None
        assert "more than its share of 0.195 GiB" in excess.message
        assert watch(None, share=400 * MEBIBYTE, free=0).excess() is None, "other processes use the memory"
        process.communicate()


def test_free_memory_is_measured_for_the_whole_machine() -> None:
    assert 0 < free_memory_bytes() <= psutil.virtual_memory().total
    with mmap.mmap(-1, MEBIBYTE):  # the machine has at least this much free memory
        assert free_memory_bytes() > MEBIBYTE


@pytest.mark.timeout(180)
def test_a_job_over_its_memory_limit_ends_alone(fleet: SmallFleet) -> None:
    worker = fleet.start_worker(ZETA_WORKER_SLOTS="2", ZETA_JOB_MEMORY_BYTES=str(300 * MEBIBYTE))
    other = fleet.submit(steps="100000")
    fleet.wait_for_step(other, 1)
    job_id = fleet.submit(max_retries=0, steps="2", then="allocate", mebibytes="600")
    job = fleet.wait_for_status(job_id, "failed")
    assert job.status_reason == "out_of_memory"
    assert job.error is not None
    assert "more than its limit of 0.293 GiB (ZETA_JOB_MEMORY_BYTES)" in job.error["message"]
    assert job.error["evidence"]["memory_limit_bytes"] == 300 * MEBIBYTE
    assert job.error["evidence"]["memory_used_bytes"] > 300 * MEBIBYTE
    assert job.error["hint"]
    fleet.check_events(job_id)
    step = max(event.fields.get("step") or 0 for event in fleet.events(other))
    fleet.wait_for_step(other, step + 5)
    assert worker.poll() is None
    fleet.request(other, "cancel")
    fleet.wait_for_status(other, "cancelled")


@pytest.mark.extended
def test_the_kernel_prefers_a_run_when_memory_runs_out(fleet: SmallFleet) -> None:
    worker = fleet.start_worker()
    job_id = fleet.submit(steps="100000")
    fleet.wait_for_step(job_id, 1)
    runs = [child for child in psutil.Process(worker.pid).children() if "small_training" in str(child.cmdline())]

    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    wait_until(lambda: [score(child.pid) for child in runs] == [500], 30, "the run to be preferred")
    assert score(worker.pid) < 500
    fleet.request(job_id, "cancel")
    fleet.wait_for_status(job_id, "cancelled")
