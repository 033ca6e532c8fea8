"""Counts of requests that all server processes of a service share, in Redis."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from zeta_core.system.redis_access import RedisUnavailable, calling_redis

TIMEOUT_SECONDS = 0.25  # of Redis; requests must not wait when it is overloaded
PREFIX = "zeta:requests"


class SharedCounts:
    """Counters by name and window of time. If Redis loses them, counting starts again at 0."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def add(self, name: str, window: int, window_seconds: int) -> tuple[int, int]:
        """Count one more in this window; returns its count, and that of the window before it.

        Raises `RedisUnavailable`.
        """
        key, before = (f"{PREFIX}:{name}:{number}" for number in (window, window - 1))
        try:
            with calling_redis():
                async with asyncio.timeout(TIMEOUT_SECONDS), self._redis.pipeline(transaction=False) as calls:
                    calls.incr(key)
                    calls.expire(key, 2 * window_seconds)
                    calls.get(before)
                    count, _, earlier = await calls.execute()
        except TimeoutError as error:
            raise RedisUnavailable("it did not answer in time") from error
        return int(count), int(earlier or 0)

    async def remove(self, name: str, window: int) -> None:
        """Undo one `add`, because the request was refused. Raises `RedisUnavailable`."""
        with calling_redis():
            await self._redis.decr(f"{PREFIX}:{name}:{window}")
