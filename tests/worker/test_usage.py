"""The usage of this machine: cores and memory, measured for real, and the lines of the journal that it is added to."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psutil
import pytest

from tests.harness.waiting import wait_until
from worker.machine.devices import memory_bytes
from worker.machine.usage import CoreTime, UsageMeter, used_memory_bytes
from zeta_core.contract.job.events import ProgressLine, utc_now


@pytest.fixture
def meter() -> UsageMeter:
    """A meter that has measured this machine, which may have no GPU."""
    with ThreadPoolExecutor(1) as executor:
        meter = UsageMeter([], executor)

        def has_measured() -> bool:
            meter.step()
            return meter.latest is not None

        wait_until(has_measured, 10, "the first measurement")
    return meter


def progress(**fields: Any) -> dict[str, Any]:
    return ProgressLine(phase="training", step=1, **fields).model_dump(mode="json", exclude_none=True)


def test_a_busy_core_is_measured() -> None:
    core_time = CoreTime()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass
    assert 0.5 / (psutil.cpu_count() or 1) * 0.5 < core_time.share() <= 1


def test_the_memory_in_use_is_part_of_the_memory() -> None:
    assert 2**20 < used_memory_bytes() < memory_bytes()


def test_progress_gets_the_use_of_the_machine_when_it_was_written(meter: UsageMeter) -> None:
    latest = meter.latest
    assert latest is not None
    line = meter.with_usage(progress(loss=1.0), [])
    assert line["worker_memory_bytes"] == latest.memory_bytes
    assert line["worker_cpu"] == round(latest.cpu, 3)
    assert "gpu_utilization" not in line
    assert ProgressLine.model_validate(line).worker_memory_bytes == latest.memory_bytes


def test_other_and_earlier_lines_are_published_unchanged(meter: UsageMeter) -> None:
    earlier = utc_now() - timedelta(minutes=1)
    unreadable = {**progress(loss=1.0), "created_at": "yesterday"}
    for line in (progress(), progress(loss=1.0, created_at=earlier), {"type": "log", "message": "m"}, unreadable):
        assert meter.with_usage(line, []) == line
