"""A Redis database belongs to one service: its servers claim it, and a second service refuses to use it.

All names in Redis are fixed, so two services on one Redis database would read each other's messages; with a common
``ZETA_WORKER_SECRET``, as in a clone, the second would end the trainings of the first. Every server renews the claim
every `RENEW_SECONDS` with a new token. A server that finds the claim of another service waits to see whether it is
renewed; if so, the service that comes later gives way. The claim of a service that is gone is replaced.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from server.engine.link import remove_wrong_type
from server.engine.loops import rest
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.messages import SERVICE_KEY
from zeta_core.contract.redis_access import RedisAddress, RedisUnavailable, calling_redis

RENEW_SECONDS = 2.0
DOUBT_SECONDS = 2.5 * RENEW_SECONDS
LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class _Claim:
    service: str
    host: str
    since: float  # seconds since 1970
    token: str


class RedisClaim:
    """`take` before the first message is read or sent, then `one_pass` again and again."""

    def __init__(self, redis: Redis, redis_url: str, service: str) -> None:
        self._redis = redis
        self._address = RedisAddress.parse(redis_url)
        self._service = service
        self._since = time.time()
        self._is_held = False
        self._refusal: str | None = None  # for as long as this process lives
        self._met: str | None = None  # the token of the other service's claim
        self._met_at = 0.0  # monotonic: when it was seen first

    def require(self) -> None:
        """Raise `RedisUnavailable` unless Redis is claimed for this service."""
        if not self._is_held:
            raise RedisUnavailable(self._refusal or "Redis is not claimed for this service yet")

    async def take(self) -> None:
        """Claim Redis now, if it can be reached. Raises `InvalidSettings` where another service uses it."""
        never = asyncio.Event()
        with suppress(RedisUnavailable):
            while not await self._claim():
                await rest(never, LOOK_SECONDS)
        if self._refusal is not None:
            raise InvalidSettings(f"{self._refusal}.", param="ZETA_REDIS_URL", code="redis_taken")

    async def one_pass(self) -> None:
        """Renew the claim, or make it as soon as Redis can be reached. Raises `RedisUnavailable`."""
        await self._claim()

    async def release(self) -> None:
        """Let another service have it at once; a further server of this one claims it again."""
        if self._is_held:
            self._is_held = False
            with calling_redis():
                found = _parsed(await self._redis.get(SERVICE_KEY))
                if found is not None and found.service == self._service:
                    await self._redis.delete(SERVICE_KEY)

    async def _claim(self) -> bool:
        """Claim or renew; whether it is ours now."""
        if self._refusal is not None:
            raise RedisUnavailable(self._refusal)
        with calling_redis():
            found = _parsed(await self._read())
        if found is not None and found.service == self._service:
            self._since = min(self._since, found.since)
        elif found is not None and not self._may_replace(found):
            return False
        mine = _Claim(self._service, socket.gethostname(), self._since, secrets.token_hex(8))
        with calling_redis():
            await self._redis.set(SERVICE_KEY, json.dumps(asdict(mine)))
        self._met, self._is_held = None, True
        return True

    def _may_replace(self, other: _Claim) -> bool:
        """Whether the other service is gone, or came later. Raises `RedisUnavailable`, for good, where it was first."""
        before, self._met = self._met, other.token
        if before is None:
            self._met_at = time.monotonic()
            return False
        if before == other.token:
            return time.monotonic() - self._met_at >= DOUBT_SECONDS
        if self._is_held and (self._since, self._service) < (other.since, other.service):
            return True
        self._is_held = False
        self._refusal = (
            f"ZETA_REDIS_URL is database {self._address.database} of {self._address.place}, which the service "
            f"{other.service} on {other.host} uses, with another database than this one ({self._service}); "
            "give each service a Redis database of its own, such as redis://HOST:PORT/1"
        )
        raise RedisUnavailable(self._refusal)

    async def _read(self) -> Any:
        try:
            return await self._redis.get(SERVICE_KEY)
        except ResponseError as error:
            if not await remove_wrong_type(self._redis, SERVICE_KEY, "string", error):
                raise
            return None


def _parsed(text: Any) -> _Claim | None:
    """The claim; ``None`` for anything else, which nobody holds."""
    try:
        values = json.loads(text)
        return _Claim(str(values["service"]), str(values["host"]), float(values["since"]), str(values["token"]))
    except (TypeError, ValueError, KeyError):
        return None
