"""Many workers with scripted trainings in one process.

``python -m benchmarks.scripted_fleet REDIS_URL SECRET COUNT FILE``. Each worker speaks the real protocol through the
real Redis: signed heartbeats, dispatches from its Celery queue, claims, and journals in batches. Only the training is a
script: it reports that it runs, then one step, and succeeds after `TRAINING_SECONDS`. While the key `HOLD_KEY` exists
in Redis, no training ends.

The workers of one process share connections, which saves sockets and costs the server nothing. On SIGTERM, the process
writes one `Record` per attempt to the file and ends.
"""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from redis.asyncio import Redis

from tests.harness.simulated_worker import progress, signed_heartbeat, status
from zeta_core.contract.wire.messages import (
    HEARTBEAT_SECONDS,
    SERVER_STREAM,
    TO_WORKER,
    WORKERS_HASH,
    Claim,
    ClaimAnswer,
    Dispatch,
    JournalAck,
    JournalBatch,
    StopRequest,
    worker_queue,
    worker_stream,
)
from zeta_core.contract.wire.signatures import WorkerKey, derive_key, read_envelope, sign

HOLD_KEY = "benchmark:hold"
TRAINING_SECONDS = 1.0
WORKERS_PER_CONNECTION = 100
TICK_SECONDS = 0.05  # between two rounds of heartbeats, each of the workers whose beat is due
REPEAT_SECONDS = 5.0  # a message without an answer is sent again
SCRIPT_LINES = 3  # running, one step, succeeded

DISPATCH = TypeAdapter(Dispatch)
Attempt = tuple[str, int]  # job and number


@dataclass
class Record:
    """The times of one attempt in seconds since 1970. At ``free_since``, Redis got the heartbeat with the free slot."""

    worker: str
    job_id: str
    attempt: int
    free_since: float
    dispatched_at: float
    granted_at: float | None = None
    ended_at: float | None = None
    num_grants: int = 0


@dataclass
class ScriptedWorker:
    """One worker with one slot. ``unanswered`` is the message that it repeats until it is answered."""

    key: WorkerKey
    beats: int = 0
    beat_due: float = 0.0  # monotonic
    free_since: float = 0.0
    record: Record | None = None
    unanswered: BaseModel | None = None
    sent_at: float = 0.0  # monotonic
    records: list[Record] = field(default_factory=list[Record])

    @property
    def name(self) -> str:
        return self.key.worker

    @property
    def incarnation(self) -> str:
        return f"{self.name}-1"

    def heartbeat(self) -> str:
        """The next signed heartbeat."""
        self.beats += 1
        running = self.record is not None and self.record.num_grants > 0
        listed = [(self.record.job_id, self.record.attempt)] if self.record is not None and running else []
        return signed_heartbeat(self.key, self.name, self.beats, running=listed, incarnation=self.incarnation)


class ScriptedFleet:
    def __init__(self, redis_url: str, secret: str, count: int) -> None:
        names = [f"scripted-{number:04}" for number in range(count)]
        self.workers = {name: ScriptedWorker(derive_key(secret, name)) for name in names}
        for position, worker in enumerate(self.workers.values()):
            worker.beat_due = time.monotonic() + HEARTBEAT_SECONDS * position / count
        self._redis = Redis.from_url(redis_url, max_connections=10_000)  # pyright: ignore[reportUnknownMemberType]
        self._released = asyncio.Event()
        self._tasks = set[asyncio.Task[None]]()

    async def run(self, stopped: asyncio.Event) -> None:
        """Run until ``stopped`` is set. Raises the first error of a loop."""
        names = list(self.workers)
        groups = [
            names[start : start + WORKERS_PER_CONNECTION] for start in range(0, len(names), WORKERS_PER_CONNECTION)
        ]
        loops: list[Coroutine[Any, Any, None]] = [self._beat(), self._watch()]
        loops += [self._take_dispatches(group) for group in groups] + [self._take_messages(group) for group in groups]
        tasks = [asyncio.create_task(loop) for loop in loops]
        waiting = asyncio.create_task(stopped.wait())
        done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in [*tasks, *self._tasks]:
            task.cancel()
        for task in done - {waiting}:
            task.result()

    def records(self) -> list[Record]:
        return [record for worker in self.workers.values() for record in worker.records]

    async def _beat(self) -> None:
        while True:
            now = time.monotonic()
            due = [worker for worker in self.workers.values() if worker.beat_due <= now]
            if due:
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for worker in due:
                        worker.beat_due = now + HEARTBEAT_SECONDS
                        pipeline.hget(WORKERS_HASH, worker.name)  # as a real worker, which detects a second process
                        pipeline.hset(WORKERS_HASH, worker.name, worker.heartbeat())
                    await pipeline.execute()
                for worker in due:
                    if worker.record is None and not worker.free_since:
                        worker.free_since = time.time()
            await asyncio.sleep(TICK_SECONDS)

    async def _watch(self) -> None:
        """Read whether trainings are held, and repeat messages that were not answered."""
        while True:
            if await self._redis.exists(HOLD_KEY):
                self._released.clear()
            else:
                self._released.set()
            late = time.monotonic() - REPEAT_SECONDS
            for worker in self.workers.values():
                if worker.unanswered is not None and worker.sent_at < late:
                    await self._send(worker, worker.unanswered)
            await asyncio.sleep(0.2)

    async def _take_dispatches(self, names: Sequence[str]) -> None:
        queues = {worker_queue(name): self.workers[name] for name in names}
        while True:
            found: Any = await self._redis.brpop(list(queues), timeout=1)
            if found is not None:
                queue, raw = found
                arguments, *_ = json.loads(base64.b64decode(json.loads(raw)["body"]))
                worker = queues[queue.decode()]
                dispatch = read_envelope(arguments[0]).open(DISPATCH, worker.key, channel=queue.decode())
                await self._accept(worker, dispatch)

    async def _accept(self, worker: ScriptedWorker, dispatch: Dispatch) -> None:
        record = worker.record
        if record is not None and record.job_id != dispatch.job_id and record.num_grants:
            raise AssertionError(
                f"{worker.name} runs {record.job_id}, and {dispatch.job_id} was dispatched to its slot"
            )
        worker.record = Record(worker.name, dispatch.job_id, dispatch.attempt, worker.free_since, time.time())
        worker.records.append(worker.record)
        worker.free_since = 0.0
        await self._post(
            worker,
            Claim(job_id=dispatch.job_id, attempt=dispatch.attempt, worker=worker.name, incarnation=worker.incarnation),
        )

    async def _take_messages(self, names: Sequence[str]) -> None:
        streams = {worker_stream(name): self.workers[name] for name in names}
        positions: Any = dict.fromkeys(streams, "0")
        while True:
            answer: Any = await self._redis.xread(positions, count=100, block=500)
            for key, entries in answer.items() if isinstance(answer, dict) else answer or []:
                stream = key.decode()
                listed = entries[0] if entries and isinstance(entries[0], list) else entries
                await self._redis.xdel(stream, *[message_id for message_id, _ in listed])
                for _, fields in listed:
                    message = read_envelope(fields).open(TO_WORKER, streams[stream].key, channel=stream)
                    await self._handle(streams[stream], message)

    async def _handle(self, worker: ScriptedWorker, message: BaseModel) -> None:
        record = worker.record
        match message:
            case ClaimAnswer() | JournalAck() if record is None or message.job_id != record.job_id:
                return
            case ClaimAnswer() if not message.granted:
                self._free(worker)
            case ClaimAnswer():
                assert record is not None
                record.num_grants += 1
                if record.num_grants == 1:
                    record.granted_at = time.time()
                    worker.beat_due = 0.0
                    await self._post(worker, self._batch(record, 1, status("running"), progress(1)))
            case JournalAck() if message.fenced:
                self._free(worker)
            case JournalAck() if message.stored_line == SCRIPT_LINES - 1:
                worker.unanswered = None
                self._start(self._finish(worker))
            case JournalAck() if message.stored_line == SCRIPT_LINES:
                assert record is not None
                record.ended_at = time.time()
                self._free(worker)
            case StopRequest():
                raise AssertionError(f"{worker.name} was asked to stop {message.job_id}: {message.action}")
            case _:
                return

    async def _finish(self, worker: ScriptedWorker) -> None:
        """Report the end of the training when it has run long enough."""
        record = worker.record
        await asyncio.sleep(TRAINING_SECONDS)
        await self._released.wait()
        if record is not None and record is worker.record and worker.unanswered is None:
            await self._post(worker, self._batch(record, SCRIPT_LINES, status("succeeded")))

    def _batch(self, record: Record, first_line: int, *lines: dict[str, Any]) -> JournalBatch:
        return JournalBatch(
            job_id=record.job_id,
            attempt=record.attempt,
            worker=record.worker,
            first_line=first_line,
            lines=list(lines),
        )

    def _free(self, worker: ScriptedWorker) -> None:
        worker.record, worker.unanswered, worker.free_since, worker.beat_due = None, None, 0.0, 0.0

    async def _post(self, worker: ScriptedWorker, message: BaseModel) -> None:
        worker.unanswered = message
        await self._send(worker, message)

    async def _send(self, worker: ScriptedWorker, message: BaseModel) -> None:
        worker.sent_at = time.monotonic()
        fields: dict[Any, Any] = {**sign(message, worker.key, channel=SERVER_STREAM)}
        await self._redis.xadd(SERVER_STREAM, fields, maxlen=100_000, approximate=True)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _run(redis_url: str, secret: str, count: int) -> list[Record]:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    fleet = ScriptedFleet(redis_url, secret, count)
    await fleet.run(stopped)
    return fleet.records()


if __name__ == "__main__":
    found = asyncio.run(_run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    Path(sys.argv[4]).write_text(json.dumps([asdict(record) for record in found]))
