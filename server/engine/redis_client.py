"""The server's connection to Redis: creating clients, sending messages to workers, and removing invalid entries.

Clients don't retry, because redis-py's retries can block a call for over half a minute when the network is cut. Every
call ends within two seconds, and the loops retry instead. Replies stay bytes, so that an entry that can't be
decoded doesn't affect others.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio
from pydantic import BaseModel
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.utils import str_if_bytes

from zeta_core.contract.wire.messages import worker_stream
from zeta_core.contract.wire.signatures import BadMessage, WorkerKey, sign
from zeta_core.system.log_throttle import LogThrottle
from zeta_core.system.outage import error_text
from zeta_core.system.redis_access import calling_redis, open_client

WORKER_STREAM_LENGTH = 10_000  # unread messages for each worker; dropped ones are sent again anyway
UNAPPLIED = "unapplied"

logger = logging.getLogger(__name__)
SendToWorker = Callable[[str, BaseModel], Awaitable[None]]  # sends a message to the worker of this name


def connect(url: str) -> Redis:
    """A client whose calls take at most two seconds, without retries (`open_client`)."""
    client: Redis = open_client(url, redis.asyncio, Retry(NoBackoff(), 0))
    return client


async def send_to_worker(redis: Redis, message: BaseModel, key: WorkerKey) -> None:
    """Put one message, signed with the key of the worker, into its stream. Raises `RedisUnavailable`."""
    stream = worker_stream(key.worker)
    fields: dict[Any, Any] = {**sign(message, key, channel=stream)}
    with calling_redis():
        try:
            await redis.xadd(stream, fields, maxlen=WORKER_STREAM_LENGTH, approximate=True)
        except ResponseError as error:
            if not await remove_wrong_type(redis, stream, "stream", error):
                raise
            await redis.xadd(stream, fields, maxlen=WORKER_STREAM_LENGTH, approximate=True)


async def send_to_workers(redis: Redis, messages: Sequence[tuple[BaseModel, WorkerKey]]) -> None:
    """As `send_to_worker`, for many messages with one request to Redis. Each has the key of its worker."""
    if not messages:
        return
    with calling_redis():
        async with redis.pipeline(transaction=False) as pipeline:
            for message, key in messages:
                stream = worker_stream(key.worker)
                fields: dict[Any, Any] = {**sign(message, key, channel=stream)}
                pipeline.xadd(stream, fields, maxlen=WORKER_STREAM_LENGTH, approximate=True)
            results: list[Any] = await pipeline.execute(raise_on_error=False)
    for (message, key), result in zip(messages, results, strict=True):
        if isinstance(result, Exception):  # for example, because the key holds another type
            await send_to_worker(redis, message, key)


async def remove_wrong_type(redis: Redis, key: str, expected: str, error: Exception) -> bool:
    """Remove a key that holds an unexpected type; returns whether that was the cause of the error.

    Removing it is safe: all data in Redis is sent again.
    """
    if "WRONGTYPE" not in str(error):  # a pipeline prepends text to the message
        return False
    kind = str_if_bytes(await redis.type(key))
    if kind not in (expected, "none"):
        logger.warning("The key %s in Redis held a %s instead of a %s and was removed.", key, kind, expected)
        await redis.unlink(key)
    return True


class DroppedMessages:
    """Counts the messages that were removed from Redis without effect.

    They are logged at most once a minute for each source and reason.

    A source is the stream or hash that contained an invalid entry, or `UNAPPLIED` for valid messages that this server
    failed to apply. ``rejected`` counts the invalid messages by their `RejectionReason`.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self._throttle = LogThrottle(logger, action="dropped")

    def count_invalid(self, source: str, error: BadMessage) -> None:
        """Count an invalid message in the stream or hash ``source``."""
        self.rejected[error.reason] += 1
        message = f"Rejected a message from {source} in Redis: {error_text(error)}"
        self._add(source, logging.WARNING, message, None, cause=error.reason)

    def count_unapplied(self, sentence: str, error: BaseException) -> None:
        """Count a valid message that was removed because this server failed to apply it."""
        self._add(UNAPPLIED, logging.ERROR, sentence, error)

    def _add(self, source: str, level: int, message: str, error: BaseException | None, *, cause: str = "") -> None:
        self.counts[source] += 1
        self._throttle.log(f"{source} {cause}", level, message, error)
