"""The server's line to Redis: one way to make clients, and one sentence per outage.

redis-py's own retries can block a call for over half a minute on a cut network, so there are none: every call ends
within two seconds, and the loops that make them go round again.
"""

from __future__ import annotations

import logging

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

SOCKET_TIMEOUT_SECONDS = 2.0
# What an outage looks like: no connection, no answer in time, or a server that is still loading or has no disk left.
REDIS_AWAY = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, ResponseError, OSError)

logger = logging.getLogger(__name__)


def connect(url: str) -> Redis:
    """A client whose calls take two seconds at most and are never repeated by the client itself."""
    return Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        url,
        decode_responses=True,
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        socket_connect_timeout=SOCKET_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )


class Outage:
    """Logs the beginning and the end of an outage, and nothing in between."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.under_way = False

    def began(self, error: BaseException) -> None:
        if not self.under_way:
            logger.warning(
                "%s: %s. Trying again until it is back.", self._what, str(error).rstrip("."), extra={"action": "outage"}
            )
        self.under_way = True

    def ended(self) -> None:
        if self.under_way:
            logger.info("%s: it is back.", self._what, extra={"action": "outage_over"})
        self.under_way = False
