"""The pages of workers in a real browser: devices, the usage of the machine now and over time, and draining."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
import redis
from playwright.sync_api import expect

from server.database.usage_table import UsageRow
from server.engine.usage_history import COARSE, FINE
from tests.harness.browser import Visitor
from tests.harness.page_inspector import PageInspector
from tests.harness.simulated_worker import signed_heartbeat
from tests.server.rows import Rows
from tests.server.server_process import SECRET, ServerProcess
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.machine_usage import GpuUsage, MachineUsage
from zeta_core.contract.wire.messages import WORKERS_HASH

Visit = Callable[..., Visitor]
NAME = "gpu-box"
GIB = 2**30
BEATS = count(1)


@pytest.fixture(scope="module")
def history(rows: Rows) -> None:
    """The usage of a worker with two GPUs, which was disconnected for some time."""
    for resolution in (FINE, COARSE):
        now = resolution.start_of(utc_now().timestamp())
        numbers = [*range(1, 40), *range(80, 150)]
        ages = {number: number * resolution.interval_seconds for number in numbers}
        times = {number: datetime.fromtimestamp(now - age, UTC) for number, age in ages.items()}
        rows.usage(*(usage_row(resolution.interval_seconds, times[number], number) for number in numbers))


@pytest.fixture
def worker(server: ServerProcess, history: None) -> Iterator[str]:
    """The name of the worker, which is connected."""
    gpus = [GpuUsage(device=str(device), utilization=0.9 - device / 10, memory_bytes=60 * GIB) for device in range(2)]
    usage = MachineUsage(measured_at=utc_now(), cpu=0.42, memory_bytes=100 * GIB, gpus=gpus)
    with redis.Redis.from_url(server.settings.redis_url) as client:
        client.hset(WORKERS_HASH, NAME, signed(next(BEATS), usage))
        yield NAME
        client.hdel(WORKERS_HASH, NAME)


def signed(beat: int, usage: MachineUsage) -> str:
    return signed_heartbeat(
        SECRET,
        NAME,
        beat,
        slots=2,
        cores=64,
        kind="cuda",
        name="NVIDIA H100 80GB HBM3",
        devices=["0", "1"],
        memory_bytes=80 * GIB,
        machine_bytes=512 * GIB,
        usage=usage,
    )


def usage_row(interval_seconds: int, started_at: datetime, number: int) -> UsageRow:
    row = UsageRow(worker=NAME, interval_seconds=interval_seconds, started_at=started_at)
    row.cpu, row.memory_bytes = 0.2 + (number % 10) / 50, 90 * GIB + number * GIB // 10
    row.gpus = [
        GpuUsage(device=str(device), utilization=0.7 + (number + device) % 7 / 30, memory_bytes=60 * GIB).model_dump()
        for device in range(2)
    ]
    return row


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_the_use_of_a_machine_is_shown_now_and_over_time(
    visit: Visit, worker: str, inspector: PageInspector, color_scheme: str
) -> None:
    visitor = visit(color_scheme=color_scheme, bypass_csp=True)
    page = visitor.page
    visitor.open("/workers")
    card = page.locator("section", has=page.get_by_role("heading", name=worker))
    expect(card.locator(".meters")).to_contain_text("42 %")
    expect(card.locator(".meters")).to_contain_text("100 GiB of 512 GiB")
    expect(card.locator("tbody tr").first).to_contain_text("90 % busy · 60.0 GiB")
    inspector.inspect(visitor, f"{color_scheme}:workers with GPUs")
    card.get_by_role("link", name="Usage over time").click()
    expect(page.locator("#figure-utilization-0")).to_contain_text("lowest 70 %")
    expect(page.locator("#figure-cpu")).to_contain_text("lowest 20 %")
    expect(page.locator("#figure-memory canvas")).to_be_visible()
    page.locator("#figure-cpu summary").click()
    expect(page.locator("#figure-cpu tbody tr")).to_have_count(12)
    inspector.inspect(visitor, f"{color_scheme}:use of a worker")
    page.get_by_role("radio", name="Week").check(force=True)
    day_before = f"{utc_now() - timedelta(hours=12):%-d %b}"
    expect(page.locator("#figure-cpu")).to_contain_text(day_before)


def test_an_unknown_worker_has_no_page(visit: Visit) -> None:
    visitor = visit()
    visitor.open("/workers/none/use")
    expect(visitor.page.get_by_text("Worker 'none' not found")).to_be_visible()
    visitor.faults.clear()  # of the page that does not exist
