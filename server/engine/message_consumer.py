"""Reads the workers' messages from the Redis stream, applies them to the database and replies after the commit.

Any number of servers may read the same stream: the consumer group delivers each message to one of them, and the job's
row lock serializes them. Guarantees: a reply is sent only after the transaction was committed; a message that can't be
applied is removed and counted, and doesn't block the others. Workers repeat messages that are lost with a server or
with Redis.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from secrets import token_hex
from typing import Any

from pydantic import BaseModel
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.engine.apply_journal import apply_batch
from server.engine.attempt_claims import answer_claim
from server.engine.event_signal import EventSignal
from server.engine.job_traces import JobTraces
from server.engine.nodes.starts import answer_prepared
from server.engine.redis_client import DroppedMessages, remove_wrong_type, send_to_worker
from server.engine.signed_messages import SignedMessages
from server.engine.spec_checks import store_result
from server.engine.worker_secrets import WorkerSecrets
from server.settings import ServerSettings
from zeta_core.contract.wire.messages import (
    FROM_WORKER,
    LAST_STREAM_ID,
    SERVER_GROUP,
    SERVER_STREAM,
    CheckResult,
    Claim,
    FromWorker,
    JournalBatch,
    Prepared,
)
from zeta_core.contract.wire.signatures import BadMessage, BadSender
from zeta_core.system.outage import error_text
from zeta_core.system.redis_access import RedisUnavailable, calling_redis

READ_COUNT = 64
BLOCK_MILLISECONDS = 500  # far below the socket timeout, even on an overloaded machine
ABANDONED_MILLISECONDS = 30_000  # a message that was pending this long is taken over from its reader
MAX_TRIES = 20  # for a message that the database keeps rejecting although it is writable

logger = logging.getLogger(__name__)
Entry = tuple[bytes, dict[bytes, bytes]]


class MessageConsumer:
    """One consumer of the group; ``attempt_ended`` is called after a commit that freed a slot."""

    def __init__(
        self,
        database: Database,
        redis: Redis,
        settings: ServerSettings,
        secrets: WorkerSecrets,
        event_signal: EventSignal,
        dropped: DroppedMessages,
        attempt_ended: Callable[[], None],
        traces: JobTraces,
    ) -> None:
        self._database = database
        self._redis = redis
        self._secrets = secrets
        self._messages = SignedMessages(secrets)
        self._max_events = settings.max_job_events
        self._event_signal = event_signal
        self._dropped = dropped
        self._attempt_ended = attempt_ended
        self._traces = traces
        self._name = f"{socket.gethostname()}-{os.getpid()}-{token_hex(3)}"
        self._has_group = False
        self._has_pending = False  # messages that were read while the database was unavailable
        self._take_over_at = 0.0  # monotonic: when to look for abandoned messages again
        self._tries: tuple[bytes, int] = (b"", 0)  # the last message that the database rejected, and how often

    async def one_pass(self) -> None:
        """Read some messages and apply them. Raises `RedisUnavailable` and `DatabaseUnavailable`."""
        try:
            entries = await self._read()
        except RedisUnavailable:
            self._has_group = False  # after FLUSHALL or a restart without persistence, the group must be created again
            raise
        for message_id, fields in entries:
            await self._handle(message_id, fields)

    async def leave(self) -> None:
        """Remove this consumer and its pending messages from the group; the workers repeat those messages."""
        with calling_redis():
            pending: Any = await self._redis.xpending_range(
                SERVER_STREAM, SERVER_GROUP, "-", "+", READ_COUNT, consumername=self._name
            )
            for entry in pending:
                await self._remove(entry["message_id"])
            await self._redis.xgroup_delconsumer(SERVER_STREAM, SERVER_GROUP, self._name)

    async def _read(self) -> list[Entry]:
        """The next entries. If the stream's key holds another type, it is removed."""
        with calling_redis():
            try:
                return await self._read_stream()
            except ResponseError as error:
                if str(error).startswith("NOGROUP"):
                    self._has_group = False
                elif await remove_wrong_type(self._redis, SERVER_STREAM, "stream", error):
                    self._has_group = False
                    self._dropped.counts["stream"] += 1
                else:
                    raise
                return []

    async def _read_stream(self) -> list[Entry]:
        if not self._has_group:
            try:
                await self._redis.xgroup_create(SERVER_STREAM, SERVER_GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise
            self._has_group = True
        if time.monotonic() >= self._take_over_at:
            taken: Any = await self._redis.xautoclaim(
                SERVER_STREAM, SERVER_GROUP, self._name, min_idle_time=ABANDONED_MILLISECONDS, count=READ_COUNT
            )
            if taken[1]:
                return [(message_id, fields) for message_id, fields in taken[1] if fields]
            self._take_over_at = time.monotonic() + ABANDONED_MILLISECONDS / 1000
        position = "0" if self._has_pending else ">"
        answer: Any = await self._redis.xreadgroup(
            SERVER_GROUP, self._name, {SERVER_STREAM: position}, count=READ_COUNT, block=BLOCK_MILLISECONDS
        )
        streams = list(answer.values()) if isinstance(answer, dict) else [entries for _, entries in answer or []]
        entries = streams[0] if streams else []
        # RESP3 wraps the entries of a stream in one more list.
        entries = entries[0] if entries and isinstance(entries[0], list) else entries
        self._has_pending = position == "0" and len(entries) == READ_COUNT
        for message_id, fields in entries:
            if not fields:  # trimmed from the stream; it would be delivered again and again
                await self._remove(message_id)
        return [(message_id, fields) for message_id, fields in entries if fields]

    async def _handle(self, message_id: bytes, fields: dict[bytes, bytes]) -> None:
        """Apply one message and reply. It stays in the stream only while the database is unavailable."""
        replies: list[tuple[str, BaseModel]] = []
        try:
            sender, message = await self._messages.read_once(
                self._redis, FROM_WORKER, message_id, fields, channel=SERVER_STREAM
            )
            if message.worker != sender:
                raise BadSender(f"worker {sender} sent a {message.kind} in the name of worker {message.worker!r}")
            replies = await self._apply(message)
        except BadMessage as error:
            self._dropped.invalid("stream", error)
        except RedisUnavailable:
            self._has_pending = True
            raise
        except DatabaseUnavailable as error:
            self._has_pending = True
            if not await self._has_tried_enough(message_id):
                raise
            self._dropped.unapplied(
                f"Removed a message that the writable database rejected {MAX_TRIES} times ({error_text(error)}). "
                "Workers repeat claims and events until they are answered.",
                error,
            )
        except Exception as error:  # noqa: BLE001 - the messages behind it must not be blocked
            self._dropped.unapplied(
                f"Removed a message because of a defect in this server ({type(error).__name__}: {error_text(error)}). "
                "Workers repeat claims and events until they are answered.",
                error,
            )
        with calling_redis():
            for worker, answer in replies:
                await send_to_worker(self._redis, answer, self._secrets.key_for_sending(worker))
            await self._remove(message_id)
            if message_id == LAST_STREAM_ID:
                await self._redis.unlink(SERVER_STREAM)

    async def _has_tried_enough(self, message_id: bytes) -> bool:
        """Count a rejected try of this message. Raises `DatabaseUnavailable` if the database isn't writable at all.

        Then the message is not the cause, and tries don't count, however long the outage lasts.
        """
        try:
            await self._database.check_writable()
        except DatabaseUnavailable:
            self._tries = (b"", 0)
            raise
        last, tries = self._tries
        self._tries = (message_id, tries + 1 if last == message_id else 1)
        return self._tries[1] >= MAX_TRIES

    async def _remove(self, message_id: bytes) -> None:
        await self._redis.xack(SERVER_STREAM, SERVER_GROUP, message_id)
        await self._redis.xdel(SERVER_STREAM, message_id)

    async def _apply(self, message: FromWorker) -> list[tuple[str, BaseModel]]:
        """Apply a message in its own transaction; returns the replies with the workers that receive them."""
        match message:
            case Claim():
                return [await self._claim(message)]
            case Prepared():
                async with self._database.write() as session:
                    replies = await answer_prepared(session, message)
                self._event_signal.notify(message.job_id)
                return replies
            case JournalBatch():
                return [await self._batch(message)]
            case CheckResult():
                async with self._database.write() as session:
                    is_expected = await store_result(session, message)
                if not is_expected:
                    raise BadSender(f"worker {message.worker} sent the result of a check that it was not asked for")
                return []

    async def _claim(self, claim: Claim) -> tuple[str, BaseModel]:
        async with self._database.write() as session:
            answer = await answer_claim(session, claim)
        logger.info(
            "Attempt %d of %s on %s: %s.",
            claim.attempt,
            claim.job_id,
            claim.worker,
            "granted" if answer.granted else f"denied, {answer.reason}",
            extra={"action": "claim", "job_id": claim.job_id, "attempt": claim.attempt},
        )
        self._event_signal.notify(claim.job_id)
        return claim.worker, answer

    async def _batch(self, batch: JournalBatch) -> tuple[str, BaseModel]:
        async with self._database.write() as session:
            applied = await apply_batch(session, batch, max_events=self._max_events)
        if applied.holder is not None:
            error = BadSender(
                f"worker {batch.worker} reported on attempt {batch.attempt} of {batch.job_id}, which worker "
                f"{applied.holder} holds"
            )
            self._dropped.invalid("stream", error)
        if applied.num_applied:
            self._event_signal.notify(batch.job_id)
        if applied.attempt_ended:
            self._attempt_ended()
        if applied.is_first_step or applied.ended_before_first_step:
            await self._traces.record(batch.job_id, batch.attempt)
        return batch.worker, applied.ack
