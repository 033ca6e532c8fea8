"""The usage of workers' machines: recorded from heartbeats, kept for a limited time, and read over HTTP."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest
import redis
from sqlalchemy import func, select

from server.database.connections import Database
from server.database.usage_table import UsageRow
from server.engine.known_workers import KnownWorkers
from server.engine.usage_history import COARSE, FINE, UsageHistory
from server.engine.worker_secrets import WorkerSecrets
from tests.harness.simulated_worker import signed_heartbeat
from tests.harness.waiting import wait_until
from tests.server.server_process import SECRET, ServerProcess, error_of
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.machine_usage import GpuUsage, MachineUsage
from zeta_core.contract.wire.messages import WORKERS_HASH

START = 1_800_000_000 // 300 * 300  # seconds since 1970, the start of an interval of both lengths


class Recording:
    """A history of one worker with a controlled clock, which measures every two seconds."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.now = float(START)
        self.beat = 0
        self.workers = KnownWorkers(WorkerSecrets("secret"))
        self.workers.update({})
        self.history = UsageHistory(database, self.workers, lambda: self.now)

    async def measure(self, *, cpu: float, gpus: list[GpuUsage] | None = None) -> None:
        self.beat += 1
        measured_at = datetime.fromtimestamp(self.now, UTC)
        usage = MachineUsage(measured_at=measured_at, cpu=cpu, memory_bytes=self.beat * 100, gpus=gpus or [])
        self.workers.update({"w": signed_heartbeat("secret", "w", self.beat, usage=usage)})
        await self.history.one_pass()
        self.now += 2

    async def rows(self, interval_seconds: int) -> list[UsageRow]:
        query = select(UsageRow).where(UsageRow.interval_seconds == interval_seconds).order_by(UsageRow.started_at)
        async with self.database.read() as session:
            return list(await session.scalars(query))


@pytest.mark.anyio
async def test_an_interval_is_stored_with_the_means_of_its_measurements(database: Database) -> None:
    recording = Recording(database)
    for cpu, memory in ((0.2, 10), (0.4, 30)):
        gpus = [
            GpuUsage(device="0", utilization=cpu, memory_bytes=memory),
            GpuUsage(device="MIG-a", memory_bytes=memory),
        ]
        await recording.measure(cpu=cpu, gpus=gpus)
        await recording.history.one_pass()  # without a new measurement
    recording.now = START + FINE.interval_seconds
    await recording.measure(cpu=1.0)
    (row,) = await recording.rows(FINE.interval_seconds)
    assert (row.worker, row.started_at) == ("w", datetime.fromtimestamp(START, UTC))
    assert (round(row.cpu, 6), row.memory_bytes) == (0.3, 150)
    first, second = row.gpus
    assert (first["device"], round(first["utilization"], 6), first["memory_bytes"]) == ("0", 0.3, 20)
    assert (second["device"], second["utilization"], second["memory_bytes"]) == ("MIG-a", None, 20)
    assert await recording.rows(COARSE.interval_seconds) == []


@pytest.mark.anyio
async def test_several_servers_store_an_interval_once(database: Database) -> None:
    first, second = Recording(database), Recording(database)
    for recording in (first, second):
        for cpu in (0.5, 0.7):
            await recording.measure(cpu=cpu)
            recording.now += FINE.interval_seconds
        await recording.measure(cpu=0.1)
    assert [row.cpu for row in await first.rows(FINE.interval_seconds)] == [0.5, 0.7]


@pytest.mark.anyio
async def test_the_history_has_a_limited_number_of_rows(database: Database) -> None:
    recording = Recording(database)
    async with database.write() as session:
        for resolution in (FINE, COARSE):
            for age in (timedelta(seconds=30), resolution.kept + timedelta(seconds=30)):
                started_at = datetime.fromtimestamp(START, UTC) - age
                row = UsageRow(worker="w", interval_seconds=resolution.interval_seconds, started_at=started_at)
                row.cpu, row.memory_bytes, row.gpus = 0.5, 1, []
                session.add(row)
    await recording.history.one_pass()
    async with database.read() as session:
        assert await session.scalar(select(func.count()).select_from(UsageRow)) == 2
    assert FINE.kept.total_seconds() / FINE.interval_seconds == 240
    assert COARSE.kept.total_seconds() / COARSE.interval_seconds == 2016


@pytest.mark.anyio
async def test_a_worker_without_measurements_is_not_recorded(database: Database) -> None:
    recording = Recording(database)
    recording.workers.update({"w": signed_heartbeat("secret", "w", 1)})  # as of an older version
    await recording.history.one_pass()
    recording.now += 1000
    await recording.history.one_pass()
    assert await recording.rows(FINE.interval_seconds) == []


@pytest.mark.extended
def test_the_use_of_a_machine_is_read_over_http(server: ServerProcess, http: httpx.Client) -> None:
    with redis.Redis.from_url(server.settings.redis_url) as client:
        beat = 0

        def send() -> None:
            nonlocal beat
            beat += 1
            gpus = [GpuUsage(device="0", utilization=0.75, memory_bytes=2**30)]
            usage = MachineUsage(measured_at=utc_now(), cpu=0.25, memory_bytes=2**31, gpus=gpus)
            signed = signed_heartbeat(SECRET, "gpu-1", beat, kind="cuda", name="H100", devices=["0"], usage=usage)
            client.hset(WORKERS_HASH, "gpu-1", signed)

        def is_recorded() -> bool:
            send()
            response = http.get("/v1/workers/gpu-1/usage")
            return response.status_code == 200 and bool(response.json()["at"])

        wait_until(is_recorded, 60, "the first interval to be stored")
        send()
        worker = http.get("/v1/workers").json()["data"][0]
    assert (worker["usage"]["cpu"], worker["usage"]["gpus"][0]["utilization"]) == (0.25, 0.75)
    usage = http.get("/v1/workers/gpu-1/usage").raise_for_status().json()
    assert (usage["object"], usage["worker"], usage["interval_seconds"]) == ("worker_usage", "gpu-1", 15)
    assert usage["cpu"][0] == 0.25
    assert usage["memory_bytes"][0] == 2**31
    (gpu,) = usage["gpus"]
    assert (gpu["device"], gpu["name"]) == ("0", "H100")
    assert (gpu["utilization"][0], gpu["memory_bytes"][0]) == (0.75, 2**30)
    assert len(usage["at"]) == len(usage["cpu"]) == len(gpu["utilization"])
    day = http.get("/v1/workers/gpu-1/usage?hours=24").raise_for_status().json()
    assert (day["interval_seconds"], day["at"]) == (300, [])
    assert error_of(http.get("/v1/workers/none/usage"))["code"] == "worker_not_found"
    for query in ("hours=0", "hours=169", "days=1"):
        assert http.get(f"/v1/workers/gpu-1/usage?{query}").status_code == 422
