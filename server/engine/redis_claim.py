"""Claims a Redis database for one service, so that a second service refuses to use it.

All key names in Redis are fixed, so two services on one Redis database would read each other's messages. If they
shared a ``ZETA_WORKER_SECRET``, as a clone does, the second would end the runs of the first. Every server renews
the claim with a new token every `RENEW_SECONDS`. A server that finds another service's claim waits to see whether it is
renewed. If it is, the service that started later gives way; otherwise the claim is replaced.
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

from server.engine.redis_client import remove_wrong_type
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.wire.messages import SERVICE_KEY
from zeta_core.system.redis_access import RedisAddress, RedisUnavailable, calling_redis

RENEW_SECONDS = 2.0
EXPIRY_SECONDS = 2.5 * RENEW_SECONDS
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class _Claim:
    service: str
    host: str
    since: float  # seconds since 1970
    token: str


class RedisClaim:
    """Call `take` before the first message is read or sent, then `one_pass` repeatedly."""

    def __init__(self, redis: Redis, redis_url: str, service: str) -> None:
        self._redis = redis
        self._address = RedisAddress.parse(redis_url)
        self._service = service
        self._since = time.time()
        self._is_held = False
        self._refusal: str | None = None  # permanent for this process
        self._other_token: str | None = None  # the token of the other service's claim
        self._other_seen_at = 0.0  # monotonic: when it was first seen

    def require(self) -> None:
        """Raise `RedisUnavailable` unless Redis is claimed for this service."""
        if not self._is_held:
            raise RedisUnavailable(self._refusal or "Redis is not claimed for this service yet")

    async def take(self) -> None:
        """Claim Redis now, if it is reachable. Raises `InvalidSettings` if another service uses it."""
        with suppress(RedisUnavailable):
            while True:
                if await self._claim():
                    break
                await asyncio.sleep(POLL_SECONDS)
        if self._refusal is not None:
            raise InvalidSettings(f"{self._refusal}.", param="ZETA_REDIS_URL", code="redis_taken")

    async def one_pass(self) -> None:
        """Renew the claim, or make it once Redis is reachable. Raises `RedisUnavailable`."""
        await self._claim()

    async def release(self) -> None:
        """Release the claim, so that another service can use Redis; other servers of this service claim it again."""
        if self._is_held:
            self._is_held = False
            with calling_redis():
                claim = _parse_claim(await self._redis.get(SERVICE_KEY))
                if claim is not None and claim.service == self._service:
                    await self._redis.delete(SERVICE_KEY)

    async def _claim(self) -> bool:
        """Make or renew the claim; returns whether this service now holds it."""
        if self._refusal is not None:
            raise RedisUnavailable(self._refusal)
        with calling_redis():
            present = _parse_claim(await self._read())
        if present is not None and present.service == self._service:
            self._since = min(self._since, present.since)
        elif present is not None and not self._may_replace(present):
            return False
        mine = _Claim(self._service, socket.gethostname(), self._since, secrets.token_hex(8))
        with calling_redis():
            await self._redis.set(SERVICE_KEY, json.dumps(asdict(mine)))
        self._other_token, self._is_held = None, True
        return True

    def _may_replace(self, other: _Claim) -> bool:
        """Whether the other service is gone or started later.

        Raises `RedisUnavailable` if it is active and started first; this refusal is permanent.
        """
        before, self._other_token = self._other_token, other.token
        if before is None:
            self._other_seen_at = time.monotonic()
            return False
        if before == other.token:
            return time.monotonic() - self._other_seen_at >= EXPIRY_SECONDS
        if self._is_held and (self._since, self._service) < (other.since, other.service):
            return True
        self._is_held = False
        self._refusal = (
            f"ZETA_REDIS_URL is database {self._address.database} of {self._address.location}, which is in use by "
            f"service {other.service} on {other.host}; this service is {self._service}, with a different SQL database. "
            "Give each service its own Redis database, such as redis://HOST:PORT/1"
        )
        raise RedisUnavailable(self._refusal)

    async def _read(self) -> Any:
        try:
            return await self._redis.get(SERVICE_KEY)
        except ResponseError as error:
            if not await remove_wrong_type(self._redis, SERVICE_KEY, "string", error):
                raise
            return None


def _parse_claim(text: Any) -> _Claim | None:
    """The claim; ``None`` for a value that isn't a valid claim."""
    try:
        values = json.loads(text)
        return _Claim(str(values["service"]), str(values["host"]), float(values["since"]), str(values["token"]))
    except (TypeError, ValueError, KeyError):
        return None
