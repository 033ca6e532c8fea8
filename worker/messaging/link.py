"""The worker's connections to Redis: a sending thread and a receiving thread, each with its own connection.

The supervising loop never waits for Redis: it posts messages and reads its inbox. A posted message replaces an unsent
one with the same key, so messages don't accumulate during an outage; senders repeat theirs until they are answered.
Invalid entries are removed with a warning. Replies stay bytes, so that an entry that can't be decoded doesn't affect
others.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import Any

import redis
from pydantic import BaseModel
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.utils import str_if_bytes

from worker.threads import RetryingThread
from zeta_core.contract.wire.messages import DURABLE, LAST_STREAM_ID, SERVER_STREAM, TO_WORKER, worker_stream
from zeta_core.contract.wire.signatures import BadMessage, WorkerKey, read_envelope, sign
from zeta_core.system.log_throttle import LogThrottle
from zeta_core.system.outage import error_text
from zeta_core.system.redis_access import SOCKET_TIMEOUT_SECONDS, calling_redis, open_client
from zeta_core.system.replay_guard import ReplayGuard

BLOCK_MILLISECONDS = 500
SERVER_STREAM_LENGTH = 100_000  # maximum backlog while no server is running; all messages are repeated
UNREAD_SECONDS = 60  # after which the stream of a single server process is removed, because that process is gone

logger = logging.getLogger(__name__)


def connect(url: str) -> redis.Redis:
    """A client whose calls take at most two seconds, without retries (`open_client`). Use one per thread."""
    client: redis.Redis = open_client(url, redis, Retry(NoBackoff(), 0))
    return client


def remove_wrong_type(client: redis.Redis, key: str, expected: str, error: redis.ResponseError) -> bool:
    """Remove a key that holds an unexpected type; returns whether that was the cause of the error.

    Removing it is safe: all data in Redis is sent again.
    """
    if "WRONGTYPE" not in str(error):  # a pipeline prepends text to the message
        return False
    kind = str_if_bytes(client.type(key))
    if kind not in (expected, "none"):
        logger.warning("The key %s in Redis held a %s instead of a %s and was removed.", key, kind, expected)
        client.unlink(key)
    return True


class InvalidEntryCounter:
    """The invalid entries removed from one stream or queue: counted, and logged at most once a minute."""

    def __init__(self, source: str) -> None:
        """``source`` names the stream or queue in the log."""
        self.count = 0
        self._source = source
        self._throttle = LogThrottle(logger, action="bad_message")

    def removed(self, reason: BaseException) -> None:
        self.count += 1
        message = f"Removed an invalid entry from {self._source} in Redis: {error_text(reason)}"
        self._throttle.log(self._source, logging.WARNING, message)


class RedisLink:
    """``inbox`` receives every valid message for this worker."""

    def __init__(self, url: str, key: WorkerKey, inbox: SimpleQueue[Any]) -> None:
        self._stream = worker_stream(key.worker)
        self._key = key
        self._guard = ReplayGuard()
        self._inbox = inbox
        self._outgoing: dict[tuple[object, ...], tuple[BaseModel, str]] = {}  # messages with their streams
        self._changed = threading.Condition()
        self._writer, self._reader = connect(url), connect(url)
        self.invalid = InvalidEntryCounter(f"the stream {self._stream}")
        self.threads = (
            RetryingThread("link-send", "Redis cannot be written", self._send),
            RetryingThread("link-receive", "Redis cannot be read", self._receive),
        )

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Stop both threads; unsent messages are dropped."""
        for thread in self.threads:
            thread.stopped.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self.threads:
            thread.stop(SOCKET_TIMEOUT_SECONDS * 2)
        self._writer.close()
        self._reader.close()

    def post(self, key: tuple[object, ...], message: BaseModel, stream: str = SERVER_STREAM) -> None:
        """Send ``message`` as soon as possible; it replaces an unsent message with the same key."""
        with self._changed:
            self._outgoing[key] = message, stream
            self._changed.notify()

    def _send(self) -> None:
        """Send one message, if there is one within a second."""
        with self._changed:
            if not self._outgoing:
                self._changed.wait(1.0)
                return
            key = next(iter(self._outgoing))
            message, stream = self._outgoing.pop(key)
        # A message that can't be serialized is dropped, because it would block all others.
        fields: dict[Any, Any] = {**sign(message, self._key, channel=stream)}
        try:
            with calling_redis():
                self._writer.xadd(stream, fields, maxlen=SERVER_STREAM_LENGTH, approximate=True)
                if stream != SERVER_STREAM:
                    self._writer.expire(stream, UNREAD_SECONDS)
        except Exception:
            with self._changed:
                self._outgoing.setdefault(key, (message, stream))
            raise

    def _receive(self) -> None:
        """Read from the start of the stream and delete what was read, so that no position can be lost in FLUSHALL."""
        with calling_redis():
            entries = self._read()
            if entries:
                self._reader.xdel(self._stream, *[message_id for message_id, _ in entries])
            if any(message_id == LAST_STREAM_ID for message_id, _ in entries):
                self._reader.unlink(self._stream)
        for message_id, fields in entries:
            self._take_in(message_id, fields)

    def _read(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        try:
            return _entries(self._reader.xread({self._stream: "0"}, count=100, block=BLOCK_MILLISECONDS))
        except redis.ResponseError as error:
            if not remove_wrong_type(self._reader, self._stream, "stream", error):
                raise
            self.invalid.count += 1
            return []

    def _take_in(self, message_id: bytes, fields: dict[bytes, bytes]) -> None:
        try:
            envelope = read_envelope(fields)
            message = envelope.open(TO_WORKER, self._key, channel=self._stream)
            if not isinstance(message, DURABLE):
                self._guard.check(envelope, message_id)
        except BadMessage as error:
            self.invalid.removed(error)
        else:
            self._inbox.put(message)


def _entries(answer: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The entries of the stream in a reply of either RESP version."""
    streams = list(answer.values()) if isinstance(answer, dict) else [entries for _, entries in answer or []]
    entries = streams[0] if streams else []
    return entries[0] if entries and isinstance(entries[0], list) else entries
