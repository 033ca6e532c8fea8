"""Claims the database for the servers on one Redis database, so that a server on another Redis refuses to use it.

A server sees only the workers on its own Redis. It would count the workers on another Redis as lost and start second
attempts of their jobs. Every `RENEW_SECONDS`, one of the servers adds a new random token to a list in Redis
and then stores it in the database. A server that finds the stored token in its own Redis belongs to the same group of
servers. Otherwise it waits to see whether the claim is renewed. If it is, the server refuses to start or, if it was
running already, reads and sends nothing; a claim that is no longer renewed is replaced.

Tokens are never reused, so a copy of a Redis database is recognized as another one. A Redis that lost its data gets the
next token. Only this server's monotonic clock is used, never the time of another machine.

An outage of Redis does not release the claim: a server whose group holds it keeps renewing it in the database. Such a
claim is the token before the outage with a random suffix, so that servers that still reach the same Redis recognize it.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections import deque
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError
from redis.utils import str_if_bytes
from sqlalchemy import CursorResult, select, update

from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.tables import ServiceRow
from server.engine.redis_client import remove_wrong_type
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.wire.messages import DATABASE_KEY
from zeta_core.system.redis_access import RedisAddress, RedisUnavailable, calling_redis

RENEW_SECONDS = 3.0  # each renewal is one small write, which SQLite syncs to disk
EXPIRY_SECONDS = 10.0
POLL_SECONDS = 0.25
SUFFIX = "."  # separates a token from the suffix of a claim that was renewed without Redis
NUM_TOKENS = 16  # recent ones that Redis keeps; two servers may renew the claim at the same time


class DatabaseClaim:
    """Call `take` before the first message is read or sent, then `one_pass` repeatedly."""

    def __init__(self, database: Database, redis: Redis, redis_url: str) -> None:
        address = RedisAddress.parse(redis_url)
        self._database = database
        self._redis = redis
        self._redis_location = f"Redis database {address.database} of {address.location}"
        self._known: deque[str] = deque(maxlen=NUM_TOKENS)  # tokens of servers on this Redis, including this server
        self._last: str | None = None  # the current claim
        self._own: str | None = None  # the last claim that this server stored
        self._confirmed_at: float | None = None  # monotonic: when the claim was last known to be held
        self._read_at = 0.0  # monotonic: the last time that the stored claim was read
        self._refusal: str | None = None
        self._other: str | None = None  # the claim of a server on another Redis
        self._other_seen_at = 0.0  # monotonic: when it was first seen

    def require(self) -> None:
        """Raise `RedisUnavailable` unless the database is claimed for the servers on this Redis."""
        if self._refusal is not None:
            raise RedisUnavailable(self._refusal)
        if self._confirmed_at is None or time.monotonic() - self._confirmed_at >= EXPIRY_SECONDS:
            raise RedisUnavailable("the database is not claimed for the servers on this Redis")

    async def take(self) -> None:
        """Claim the database now, if Redis is reachable. Raises `InvalidSettings` if it is in use with another one."""
        with suppress(RedisUnavailable, DatabaseUnavailable):
            while True:
                if await self._claim():
                    break
                await asyncio.sleep(POLL_SECONDS)
        if self._refusal is not None:
            raise InvalidSettings(f"{self._refusal}.", param="ZETA_DATABASE_URL", code="database_taken")

    async def one_pass(self) -> None:
        """Renew the claim, or make it once it is possible. Raises `RedisUnavailable` and `DatabaseUnavailable`."""
        await self._claim()

    async def release(self) -> None:
        """Release a claim that this server renewed last; other servers on this Redis claim the database again.

        Otherwise a service that is moved to another Redis would wait `EXPIRY_SECONDS` at its start. In
        return, a server on another Redis that starts before the others' next renewal takes the database.
        """
        if self._confirmed_at is not None and self._own is not None:
            self._confirmed_at = None
            await self._replace(self._own, None)

    async def _claim(self) -> bool:
        """Make, renew or confirm the claim; returns whether the servers on this Redis now hold it."""
        now, last_read_at = time.monotonic(), self._read_at
        async with self._database.read() as session:
            claim, claimed_by = (await session.execute(select(ServiceRow.claim, ServiceRow.claimed_by))).one()
        self._read_at = now
        if claim is not None and not await self._is_known(claim):
            if not self._may_replace(claim, claimed_by, now):
                return False
        elif self._confirmed_at is not None and claim is not None and claim != self._last:
            # Another server on this Redis renewed it, at some time since the last read.
            self._last, self._confirmed_at = claim, last_read_at
            return True
        new = secrets.token_hex(8)
        try:
            await self._add(new)
            self._known.append(new)  # even if it isn't stored: the answer to a successful write may be lost
        except RedisUnavailable:
            if claim is None or self._confirmed_at is None:
                raise
            new = f"{_token(claim)}{SUFFIX}{new}"
        if not await self._replace(claim, new):
            return False
        self._own = self._last = new
        self._confirmed_at, self._other, self._refusal = now, None, None
        return True

    async def _is_known(self, claim: str) -> bool:
        """Whether a server on this Redis stored the claim."""
        token = _token(claim)
        if token not in self._known:
            if token not in await self._tokens():
                return False
            self._known.append(token)
        self._other, self._refusal = None, None
        return True

    def _may_replace(self, claim: str, claimed_by: str | None, now: float) -> bool:
        """Whether the claim of servers on another Redis is no longer renewed. Raises `RedisUnavailable` if it is."""
        self._confirmed_at = None
        before, self._other = self._other, claim
        if before != claim:
            self._other_seen_at = now
            if before is not None:
                self._refusal = (
                    f"ZETA_DATABASE_URL is {self._database.address.location}, which is in use by the server on "
                    f"{claimed_by}; this server has another ZETA_REDIS_URL, {self._redis_location}. Give every server "
                    "of one database the same ZETA_REDIS_URL, or give this service its own database"
                )
        if now - self._other_seen_at >= EXPIRY_SECONDS:
            return True
        if self._refusal is not None:
            raise RedisUnavailable(self._refusal)
        return False

    async def _replace(self, former: str | None, new: str | None) -> bool:
        """Store the new claim; returns whether the claim was still ``former``."""
        claimed_by = None if new is None else f"{socket.gethostname()} with {self._redis_location}"
        async with self._database.write() as session:
            changed = await session.execute(
                update(ServiceRow)
                .where(ServiceRow.claim.is_not_distinct_from(former))
                .values(claim=new, claimed_by=claimed_by)
            )
        assert isinstance(changed, CursorResult)
        return changed.rowcount == 1

    async def _tokens(self) -> list[str]:
        with calling_redis():
            try:
                tokens: list[Any] = await self._redis.lrange(DATABASE_KEY, 0, -1)  # pyright: ignore[reportGeneralTypeIssues]
            except ResponseError as error:
                if not await remove_wrong_type(self._redis, DATABASE_KEY, "list", error):
                    raise
                return []
        return [str_if_bytes(token) for token in tokens]

    async def _add(self, token: str) -> None:
        with calling_redis():
            try:
                await self._push(token)
            except ResponseError as error:
                if not await remove_wrong_type(self._redis, DATABASE_KEY, "list", error):
                    raise
                await self._push(token)

    async def _push(self, token: str) -> None:
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.lpush(DATABASE_KEY, token)
            pipeline.ltrim(DATABASE_KEY, 0, NUM_TOKENS - 1)
            await pipeline.execute()


def _token(claim: str) -> str:
    """The token in Redis that identifies the group of the servers that made the claim."""
    return claim.partition(SUFFIX)[0]
