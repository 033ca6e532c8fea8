"""The worker's lines to Redis: a sending thread and a receiving thread, each with a connection of its own.

The supervising loop never waits for Redis: it posts messages and takes what came from its inbox. A posted message
replaces an earlier one by the same key that is not sent yet, so an outage piles nothing up; senders repeat theirs until
they are answered. Messages with a bad signature are dropped with a warning.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import Any

import redis
from pydantic import BaseModel, ValidationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.outage import Outage
from zeta_core.contract.messages import SERVER_STREAM, TO_WORKER, BadSignature, sign, verify, worker_stream

SOCKET_TIMEOUT_SECONDS = 2.0
BLOCK_MILLISECONDS = 500
OUTAGE_REST_SECONDS = 0.5
SERVER_STREAM_LENGTH = 100_000  # what waits at most for a server that is away; all of it is repeated
REDIS_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.ResponseError, OSError)

logger = logging.getLogger(__name__)


def connect(url: str) -> redis.Redis:
    """A client whose calls end within two seconds and are never repeated by the client; one per thread."""
    return redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        url,
        decode_responses=True,
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        socket_connect_timeout=SOCKET_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )


class Link:
    """``inbox`` receives every valid message for this worker."""

    def __init__(self, url: str, worker: str, secret: str, inbox: SimpleQueue[Any]) -> None:
        self._url = url
        self._stream = worker_stream(worker)
        self._secret = secret
        self._inbox = inbox
        self._outgoing: dict[tuple[object, ...], BaseModel] = {}
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_all, name="link-send", daemon=True),
            threading.Thread(target=self._receive_all, name="link-receive", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads; what is not sent yet is dropped."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(SOCKET_TIMEOUT_SECONDS * 2)

    def post(self, key: tuple[object, ...], message: BaseModel) -> None:
        """Send ``message`` as soon as Redis takes it, instead of one by the same key that still waits."""
        with self._changed:
            self._outgoing[key] = message
            self._changed.notify()

    def _send_all(self) -> None:
        outage = Outage("Redis cannot be written")
        with connect(self._url) as client:
            while not self._stopped.is_set():
                with self._changed:
                    if not self._outgoing:
                        self._changed.wait(1.0)
                        continue
                    key = next(iter(self._outgoing))
                    message = self._outgoing.pop(key)
                fields: dict[Any, Any] = {**sign(message, self._secret, channel=SERVER_STREAM)}
                try:
                    client.xadd(SERVER_STREAM, fields, maxlen=SERVER_STREAM_LENGTH, approximate=True)
                    outage.ended()
                except REDIS_AWAY as error:
                    outage.began(error)
                    with self._changed:
                        self._outgoing.setdefault(key, message)
                    self._stopped.wait(OUTAGE_REST_SECONDS)

    def _receive_all(self) -> None:
        """Read from the stream's beginning and delete what was read: no position to lose in FLUSHALL or a restart."""
        outage = Outage("Redis cannot be read")
        with connect(self._url) as client:
            while not self._stopped.is_set():
                try:
                    answer: Any = client.xread({self._stream: "0"}, count=100, block=BLOCK_MILLISECONDS)
                    entries = _entries(answer)
                    if entries:
                        client.xdel(self._stream, *[message_id for message_id, _ in entries])
                    outage.ended()
                except REDIS_AWAY as error:
                    outage.began(error)
                    self._stopped.wait(OUTAGE_REST_SECONDS)
                    continue
                for _, fields in entries:
                    self._take_in(fields)

    def _take_in(self, fields: dict[str, str]) -> None:
        try:
            self._inbox.put(TO_WORKER.validate_python(verify(fields, self._secret, channel=self._stream)))
        except (BadSignature, ValidationError, ValueError) as error:
            logger.warning("A message from the server was dropped: %s", error, extra={"action": "bad_message"})


def _entries(answer: Any) -> list[tuple[str, dict[str, str]]]:
    """The entries of the one stream that was read, in the shape of either protocol version."""
    streams = list(answer.values()) if isinstance(answer, dict) else [entries for _, entries in answer or []]
    entries = streams[0] if streams else []
    return entries[0] if entries and isinstance(entries[0], list) else entries
