"""Reads the stream with the messages of all workers as one consumer of its group.

The group delivers each message to one consumer. A message stays pending until it is removed; those of a consumer that
has ended are taken over after `ABANDONED_MILLISECONDS`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection
from secrets import token_hex
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from server.engine.redis_client import DroppedMessages, remove_wrong_type
from server.engine.signed_messages import Entry
from zeta_core.contract.wire.messages import LAST_STREAM_ID, SERVER_GROUP, SERVER_STREAM
from zeta_core.system.redis_access import RedisUnavailable, calling_redis

READ_COUNT = 64
BLOCK_MILLISECONDS = 500  # far below the socket timeout, even on an overloaded machine
ABANDONED_MILLISECONDS = 30_000  # a message that was pending this long is taken over from its reader


class MessageStream:
    def __init__(self, redis: Redis, dropped: DroppedMessages) -> None:
        self._redis, self._dropped = redis, dropped
        self._name = f"{socket.gethostname()}-{os.getpid()}-{token_hex(3)}"
        self._has_group = False
        self._has_pending = False  # messages that were read and not removed
        self._take_over_at = 0.0  # monotonic: when to look for abandoned messages again

    async def read(self) -> list[Entry]:
        """The next messages, after waiting for them for a moment. Raises `RedisUnavailable`.

        If the stream's key holds another type, it is removed.
        """
        try:
            with calling_redis():
                return await self._read_or_repair()
        except RedisUnavailable:
            self._has_group = False  # after FLUSHALL or a restart without persistence, the group must be created again
            raise

    def read_again(self) -> None:
        """Let the next `read` return the messages that were read and not removed."""
        self._has_pending = True

    async def remove(self, message_ids: Collection[bytes]) -> None:
        """Remove messages, with their acknowledgement. Raises `RedisUnavailable`."""
        if not message_ids:
            return
        with calling_redis():
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.xack(SERVER_STREAM, SERVER_GROUP, *message_ids)
                pipeline.xdel(SERVER_STREAM, *message_ids)
                await pipeline.execute()
            if LAST_STREAM_ID in message_ids:
                await self._redis.unlink(SERVER_STREAM)

    async def leave(self) -> None:
        """Remove this consumer and its pending messages from the group; the workers repeat those messages."""
        with calling_redis():
            pending: Any = await self._redis.xpending_range(
                SERVER_STREAM, SERVER_GROUP, "-", "+", READ_COUNT, consumername=self._name
            )
            await self.remove([entry["message_id"] for entry in pending])
            await self._redis.xgroup_delconsumer(SERVER_STREAM, SERVER_GROUP, self._name)

    async def _read_or_repair(self) -> list[Entry]:
        try:
            return await self._read()
        except ResponseError as error:
            if str(error).startswith("NOGROUP"):
                self._has_group = False
            elif await remove_wrong_type(self._redis, SERVER_STREAM, "stream", error):
                self._has_group = False
                self._dropped.counts["stream"] += 1
            else:
                raise
            return []

    async def _read(self) -> list[Entry]:
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
        # Trimmed from the stream; such entries would be delivered again and again.
        await self.remove([message_id for message_id, fields in entries if not fields])
        return [(message_id, fields) for message_id, fields in entries if fields]
