"""Reads the signed messages of workers, and rejects those with an invalid secret, and old or repeated ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter
from redis.asyncio import Redis

from server.engine.worker_secrets import WorkerSecrets
from zeta_core.contract.wire.messages import DURABLE
from zeta_core.contract.wire.signatures import CLOCK_WINDOW_SECONDS, BadMessage, Replayed, read_envelope
from zeta_core.system.redis_access import calling_redis
from zeta_core.system.replay_guard import ReplayGuard

Entry = tuple[bytes, dict[bytes, bytes]]  # the id and the fields of an entry in a stream
NONCE_PREFIX = "zeta:nonce:"
Message = TypeVar("Message", bound=BaseModel)


class SignedMessages:
    def __init__(self, secrets: WorkerSecrets) -> None:
        self._secrets = secrets
        self._guard = ReplayGuard()

    def read(
        self, kind: TypeAdapter[Message], entry: bytes, fields: dict[bytes, bytes], *, channel: str
    ) -> tuple[str, Message]:
        """The verified sender and the message. ``entry`` identifies the entry, which may be read again.

        Raises only `BadMessage`, whatever ``fields`` contains.
        """
        envelope = read_envelope(fields)
        message = envelope.open(kind, self._secrets.key_for_reading(envelope), channel=channel)
        if not isinstance(message, DURABLE):
            self._guard.check(envelope, entry)
        return envelope.worker, message

    async def read_once(
        self, redis: Redis, kind: TypeAdapter[Message], entries: Sequence[Entry], *, channel: str
    ) -> list[tuple[str, Message] | BadMessage]:
        """As `read`, for entries of a stream that several servers read. Returns the result or the error of each.

        It also rejects what another server has read. The nonces are in Redis, in keys that a worker's own Redis user
        can't remove. Raises `RedisUnavailable`.
        """
        results = [self._result(kind, entry, fields, channel=channel) for entry, fields in entries]
        checked = [
            number
            for number, result in enumerate(results)
            if not isinstance(result, BadMessage) and not isinstance(result[1], DURABLE)
        ]
        if not checked:
            return results
        with calling_redis():
            async with redis.pipeline(transaction=False) as pipeline:
                for number in checked:
                    entry, fields = entries[number]
                    key = f"{NONCE_PREFIX}{read_envelope(fields).nonce}"
                    pipeline.set(key, entry, nx=True, get=True, ex=math.ceil(2 * CLOCK_WINDOW_SECONDS))
                earlier: list[Any] = await pipeline.execute()
        for number, holder in zip(checked, earlier, strict=True):
            result = results[number]
            if holder not in (None, entries[number][0]) and not isinstance(result, BadMessage):
                reason = f"the message of worker {result[0]} was received before, by this or another server"
                results[number] = Replayed(reason)
        return results

    def _result(
        self, kind: TypeAdapter[Message], entry: bytes, fields: dict[bytes, bytes], *, channel: str
    ) -> tuple[str, Message] | BadMessage:
        try:
            return self.read(kind, entry, fields, channel=channel)
        except BadMessage as error:
            return error
