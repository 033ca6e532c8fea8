"""Requests to served models: choosing a worker, sending the request, and receiving the parts of the answer.

Every server process has a stream of its own, which only it reads, so an answer reaches the process that holds the
client's connection. Parts are passed on in order and once. The worker learns which parts have arrived, and which the
client has taken. Nothing is stored: a request ends with the connection of its client, or with this process.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError
from sqlalchemy import select

from server.database.connections import Database
from server.database.draining import drained_workers
from server.database.tables import JobRow
from server.engine.known_workers import KnownWorkers
from server.engine.redis_client import DroppedMessages, SendToWorker, remove_wrong_type
from server.engine.signed_messages import SignedMessages
from zeta_core.contract.errors import Unavailable
from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.answers import (
    ANSWER_PART,
    MAX_AHEAD,
    REPEAT_SECONDS,
    SILENCE_SECONDS,
    AnswerControl,
    AnswerOptions,
    AnswerPart,
    AnswerRequest,
    Failure,
    Prompt,
    ServedWeights,
    answer_stream,
)
from zeta_core.contract.wire.messages import ANSWER_VERSION, Heartbeat
from zeta_core.contract.wire.signatures import BadMessage, BadSender
from zeta_core.system.redis_access import RedisUnavailable, calling_redis

BLOCK_MILLISECONDS = 500
READ_COUNT = 100
MAX_OPEN = 256  # requests of one server process
KEEP_ALIVE_PACE_SECONDS = 0.5
FREEING_SECONDS = 6.0  # how long a request waits for a worker to report the device of an ended job as free
FREEING_POLL_SECONDS = 0.2


class OpenAnswer:
    """An answer that is arriving."""

    def __init__(self, request: AnswerRequest, worker: str, send: SendToWorker) -> None:
        self.request = request
        self.worker = worker
        self._send = send
        self._parts: asyncio.Queue[AnswerPart] = asyncio.Queue()
        self._has_started = False
        self._received = 0
        self._consumed = 0
        self._sent_consumed = 0  # the newest value that the worker knows
        self._last_contact = self._sent_at = time.monotonic()
        self._is_complete = False

    async def next_part(self, timeout_seconds: float) -> AnswerPart | None:
        """The next part; ``None`` if none arrives in time. The last one has ``is_last``."""
        try:
            async with asyncio.timeout(timeout_seconds):
                part = await self._parts.get()
        except TimeoutError:
            return None
        self._consumed = part.number
        if self._consumed - self._sent_consumed >= MAX_AHEAD // 2 and not self._is_complete:
            with suppress(RedisUnavailable):  # it is repeated
                await self._send_control()
        return part

    async def receive(self, part: AnswerPart) -> None:
        """Accept a part from the worker, and acknowledge it. Repeated ones and those far ahead are dropped."""
        self._has_started = True
        self._last_contact = time.monotonic()
        has_space = self._received - self._consumed < MAX_AHEAD  # always, if the worker keeps to the protocol
        if part.number == self._received + 1 and has_space and not self._is_complete:
            self._received = part.number
            self._is_complete = part.is_last
            self._parts.put_nowait(part)
        if part.number:
            await self._send_control()

    async def keep_alive(self) -> None:
        """Repeat the request or a sign of life if it is due. Ends the answer if the worker is silent.

        Raises `RedisUnavailable`.
        """
        now = time.monotonic()
        if self._is_complete:
            return
        if now - self._last_contact > SILENCE_SECONDS:
            message = f"Lost contact with worker {self.worker}, which was answering; send the request again."
            self._fail(Failure(code="process_ended", message=message))
        elif now - self._sent_at >= REPEAT_SECONDS:
            if self._has_started:
                await self._send_control()
            else:
                self._sent_at = now
                await self._send(self.worker, self.request)

    async def cancel(self) -> None:
        """Ask the worker to stop, unless the answer is complete. If the message is lost, it stops after a silence."""
        if not self._is_complete:
            self._is_complete = True
            with suppress(RedisUnavailable):
                await self._send_control(cancel=True)

    def _fail(self, failure: Failure) -> None:
        self._is_complete = True
        number = self._received + 1
        self._parts.put_nowait(
            AnswerPart(request_id=self.request.request_id, number=number, is_last=True, failure=failure)
        )

    async def _send_control(self, *, cancel: bool = False) -> None:
        self._sent_at = time.monotonic()
        self._sent_consumed = self._consumed
        control = AnswerControl(
            request_id=self.request.request_id, received=self._received, consumed=self._consumed, cancel=cancel
        )
        await self._send(self.worker, control)


class Answers:
    """The open requests of this server process; ``wake`` lets their loops run now."""

    def __init__(
        self,
        database: Database,
        redis: Redis,
        workers: KnownWorkers,
        send_to_worker: SendToWorker,
        dropped: DroppedMessages,
        messages: SignedMessages,
        wake: Callable[[], None],
    ) -> None:
        self._database = database
        self._redis = redis
        self._workers = workers
        self._send = send_to_worker
        self._dropped = dropped
        self._messages = messages
        self._wake = wake
        self._server = secrets.token_hex(8)
        self._stream = answer_stream(self._server)
        self._open: dict[str, OpenAnswer] = {}

    @asynccontextmanager
    async def ask(self, weights: ServedWeights, prompt: Prompt, options: AnswerOptions) -> AsyncGenerator[OpenAnswer]:
        """Send a request to a worker; it is cancelled at the end of the block.

        Raises `Unavailable` if no worker has a free slot, if Redis is unreachable, or if there are `MAX_OPEN` requests.
        """
        if len(self._open) >= MAX_OPEN:
            raise Unavailable(
                f"This server is answering {MAX_OPEN} requests, its limit; send the request again.",
                code="too_many_requests",
            )
        worker = await self._wait_for_worker(weights)
        request = AnswerRequest(
            request_id=f"req_{secrets.token_hex(12)}",
            server=self._server,
            weights=weights,
            prompt=prompt,
            options=options,
        )
        answer = OpenAnswer(request, worker.worker, self._send)
        self._open[request.request_id] = answer
        self._wake()
        try:
            try:
                await self._send(worker.worker, request)
            except RedisUnavailable as error:
                raise Unavailable("Redis is unreachable, so no worker can answer; send the request again.") from error
            yield answer
        finally:
            del self._open[request.request_id]
            await answer.cancel()

    async def read_parts(self) -> None:
        """Wait briefly for parts, and pass them on. Raises `RedisUnavailable`."""
        with calling_redis():
            entries = await self._read()
            if entries:
                await self._redis.xdel(self._stream, *[entry_id for entry_id, _ in entries])
        for entry_id, fields in entries:
            try:
                worker, part = self._messages.read(ANSWER_PART, entry_id, fields, channel=self._stream)
                answer = self._open.get(part.request_id)
                if answer is not None and answer.worker != worker:
                    raise BadSender(f"worker {worker} answered request {part.request_id} of worker {answer.worker}")
            except BadMessage as error:
                self._dropped.count_invalid("answers", error)
                continue
            if answer is not None:
                await answer.receive(part)

    async def keep_alive(self) -> None:
        """Call `OpenAnswer.keep_alive` for every open request. Raises `RedisUnavailable`."""
        for answer in list(self._open.values()):
            await answer.keep_alive()

    @property
    def has_open(self) -> bool:
        return bool(self._open)

    async def _read(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The entries of the stream, from its start, because entries that were read are deleted."""
        try:
            reply: Any = await self._redis.xread({self._stream: "0"}, count=READ_COUNT, block=BLOCK_MILLISECONDS)
        except ResponseError as error:
            if not await remove_wrong_type(self._redis, self._stream, "stream", error):
                raise
            self._dropped.counts["answers"] += 1
            return []
        streams = list(reply.values()) if isinstance(reply, dict) else [entries for _, entries in reply or []]
        entries = streams[0] if streams else []
        # RESP3 wraps the entries of a stream in one more list.
        return entries[0] if entries and isinstance(entries[0], list) else entries

    async def _wait_for_worker(self, weights: ServedWeights) -> Heartbeat:
        """A worker for these weights, waiting briefly for the device of a job that has ended. Raises `Unavailable`."""
        deadline = time.monotonic() + FREEING_SECONDS
        while True:
            candidates = await self._candidates()
            serving = [beat for beat in candidates if _serves(beat, weights)] or [
                beat for beat in candidates if _has_base(beat, weights)
            ]
            free = [beat for beat in candidates if _free_slots(beat)]
            if serving or free:
                return serving[0] if serving else max(free, key=_free_capacity)
            if time.monotonic() >= deadline or not await self._is_device_freed(candidates):
                raise Unavailable(
                    "All devices are in use by jobs, which come first; send the request again when one of them has "
                    "ended.",
                    code="no_capacity",
                )
            await asyncio.sleep(FREEING_POLL_SECONDS)

    async def _candidates(self) -> list[Heartbeat]:
        """The newest heartbeats of the workers that may answer. Raises `Unavailable` if there are none."""
        async with self._database.read() as session:
            drained = await drained_workers(session)
        candidates = [
            beat
            for beat in self._workers.workers()
            if self._workers.is_alive(beat.worker)
            and not beat.stopping
            and beat.contract_version >= ANSWER_VERSION
            and beat.worker not in drained
        ]
        if not candidates:
            raise Unavailable("No connected worker can answer; start one with `zeta worker`.", code="no_worker")
        return candidates

    async def _is_device_freed(self, candidates: list[Heartbeat]) -> bool:
        """Whether a job has ended whose device a heartbeat still shows as occupied."""
        shown = {slot.job_id for beat in candidates for slot in beat.slots if slot.job_id is not None}
        occupying = select(JobRow.id).where(
            JobRow.id.in_(shown), JobRow.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]), JobRow.worker.is_not(None)
        )
        async with self._database.read() as session:
            return len(set(await session.scalars(occupying))) < len(shown)


def _free_slots(beat: Heartbeat) -> list[DeviceReport]:
    """The slots that no job uses, with or without served models."""
    return [slot for slot in beat.slots if slot.job_id is None and slot.problem is None]


def _serves(beat: Heartbeat, weights: ServedWeights) -> bool:
    return any(
        served.model == weights.name and served.project == weights.project
        for slot in _free_slots(beat)
        for served in slot.served
    )


def _has_base(beat: Heartbeat, weights: ServedWeights) -> bool:
    """Whether a process of the worker holds the base of an adapter, so it only has to load the adapter."""
    return weights.shared_base is not None and any(
        served.base == weights.shared_base and served.project == weights.project
        for slot in _free_slots(beat)
        for served in slot.served
    )


def _free_capacity(beat: Heartbeat) -> tuple[int, int]:
    """The number of free slots without a model, and the negative number of models in the others."""
    free = _free_slots(beat)
    return sum(not slot.served for slot in free), -sum(len(slot.served) for slot in free)
