"""Reads what workers say from the Redis stream, applies it to the database, and answers after the commit.

Any number of servers may read the same stream: the group gives each message to one of them, and the job's row lock
orders them. Guarantees: a message is answered only after its transaction; one that cannot be applied is logged and
dropped and blocks nothing; a message lost with its server or with Redis is repeated by its worker, so nothing is
waited for here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from server.database.db import Database
from server.engine import checks, journal
from server.engine.claims import answer_claim
from server.engine.link import REDIS_AWAY, Outage
from server.engine.stored import Stored
from server.settings import ServerSettings
from zeta_core.contract.messages import (
    FROM_WORKER,
    SERVER_GROUP,
    SERVER_STREAM,
    BadSignature,
    CheckResult,
    Claim,
    FromWorker,
    JournalBatch,
    sign,
    verify,
    worker_stream,
)

READ_COUNT = 64
BLOCK_MILLISECONDS = 500  # far below the socket's time-out, also on a machine that is overloaded
RETRY_SECONDS = 0.5
ABANDONED_MILLISECONDS = 30_000  # a message that its reader left this long is taken over
WORKER_STREAM_LENGTH = 10_000  # unread answers kept for a worker that does not read; they are repeated anyway
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeoutError)

logger = logging.getLogger(__name__)


async def tell_worker(redis: Redis, worker: str, message: BaseModel, secret: str) -> None:
    """Put one signed message into the worker's stream."""
    stream = worker_stream(worker)
    fields: dict[Any, Any] = {**sign(message, secret, channel=stream)}
    await redis.xadd(stream, fields, maxlen=WORKER_STREAM_LENGTH, approximate=True)


class Keeper:
    """One reader of the group; ``attempt_ended`` is called after a commit that freed a slot."""

    def __init__(
        self,
        database: Database,
        redis: Redis,
        settings: ServerSettings,
        stored: Stored,
        attempt_ended: Callable[[], None],
    ) -> None:
        self._database = database
        self._redis = redis
        self._secret = settings.worker_secret
        self._max_events = settings.max_job_events
        self._stored = stored
        self._attempt_ended = attempt_ended
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._redis_outage = Outage("Redis cannot be read")
        self._database_outage = Outage("The database cannot be written")
        self._has_group = False
        self._has_left = False  # messages that it read while the database was away
        self._take_over_at = 0.0  # monotonic: when to look again for what other readers left

    async def run(self, stopping: asyncio.Event) -> None:
        """Read and apply until told to stop."""
        while not stopping.is_set():
            try:
                messages = await self._read()
                self._redis_outage.ended()
            except REDIS_AWAY as error:
                if "NOGROUP" not in str(error):
                    self._redis_outage.began(error)
                    await asyncio.sleep(RETRY_SECONDS)
                self._has_group = False  # after FLUSHALL, or a restart without its file, the group is made again
                continue
            for message_id, fields in messages:
                if not stopping.is_set():
                    await self._handle(message_id, fields)

    async def leave(self) -> None:
        """Remove this reader from the group, and what it had not answered: its workers repeat that."""
        pending: Any = await self._redis.xpending_range(
            SERVER_STREAM, SERVER_GROUP, "-", "+", READ_COUNT, consumername=self._name
        )
        ids = [entry["message_id"] for entry in pending]
        if ids:
            await self._redis.xack(SERVER_STREAM, SERVER_GROUP, *ids)
            await self._redis.xdel(SERVER_STREAM, *ids)
        await self._redis.xgroup_delconsumer(SERVER_STREAM, SERVER_GROUP, self._name)

    async def _read(self) -> list[tuple[str, dict[str, str]]]:
        if not self._has_group:
            try:
                await self._redis.xgroup_create(SERVER_STREAM, SERVER_GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
            self._has_group = True
        if time.monotonic() >= self._take_over_at:
            taken: Any = await self._redis.xautoclaim(
                SERVER_STREAM, SERVER_GROUP, self._name, min_idle_time=ABANDONED_MILLISECONDS, count=READ_COUNT
            )
            if taken[1]:
                return [(message_id, fields) for message_id, fields in taken[1] if fields]
            self._take_over_at = time.monotonic() + ABANDONED_MILLISECONDS / 1000
        position = "0" if self._has_left else ">"
        answer: Any = await self._redis.xreadgroup(
            SERVER_GROUP, self._name, {SERVER_STREAM: position}, count=READ_COUNT, block=BLOCK_MILLISECONDS
        )
        streams = list(answer.values()) if isinstance(answer, dict) else [entries for _, entries in answer or []]
        entries = streams[0] if streams else []
        # RESP3 wraps the entries of a stream in one more list.
        entries = entries[0] if entries and isinstance(entries[0], list) else entries
        self._has_left = position == "0" and len(entries) == READ_COUNT
        return [(message_id, fields) for message_id, fields in entries if fields]  # one that was trimmed has none

    async def _handle(self, message_id: str, fields: dict[str, str]) -> None:
        """Apply one message and answer it. Only a database that is away leaves it in the stream."""
        try:
            message = FROM_WORKER.validate_python(verify(fields, self._secret, channel=SERVER_STREAM))
            answer = await self._apply(message)
            self._database_outage.ended()
        except DATABASE_AWAY as error:
            self._database_outage.began(error)
            self._has_left = True
            await asyncio.sleep(RETRY_SECONDS)
            return
        except BadSignature as error:
            logger.warning("A message from a worker was dropped: %s", error, extra={"action": "bad_signature"})
            answer = None
        except (ValidationError, ValueError) as error:
            logger.warning("A message from a worker cannot be read and was dropped: %s", error)
            answer = None
        except Exception:
            # Whatever it was, the messages behind it must go on; its worker repeats it, and a fixed server takes it.
            logger.exception("A message from a worker could not be applied and was dropped")
            answer = None
        try:
            if answer is not None:
                await tell_worker(self._redis, *answer, self._secret)
            await self._redis.xack(SERVER_STREAM, SERVER_GROUP, message_id)
            await self._redis.xdel(SERVER_STREAM, message_id)
        except REDIS_AWAY as error:
            self._redis_outage.began(error)  # the worker repeats what it hears no answer to

    async def _apply(self, message: FromWorker) -> tuple[str, BaseModel] | None:
        """Apply a message in a transaction of its own; returns the answer and whom it is for."""
        match message:
            case Claim():
                return await self._claim(message)
            case JournalBatch():
                return await self._batch(message)
            case CheckResult():
                async with self._database.write() as session:
                    await checks.keep(session, message)
                return None

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
        self._stored.notify(claim.job_id)
        return claim.worker, answer

    async def _batch(self, batch: JournalBatch) -> tuple[str, BaseModel]:
        async with self._database.write() as session:
            applied = await journal.apply(session, batch, max_events=self._max_events)
        if applied.stored:
            self._stored.notify(batch.job_id)
        if applied.ended:
            self._attempt_ended()
        return batch.worker, applied.ack
