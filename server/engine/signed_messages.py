"""Reads the signed messages of workers, and rejects those with an invalid secret, and old or repeated ones."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter
from redis.asyncio import Redis

from server.engine.worker_secrets import WorkerSecrets
from zeta_core.contract.wire.messages import DURABLE
from zeta_core.contract.wire.signatures import CLOCK_WINDOW_SECONDS, Replayed, read_envelope
from zeta_core.system.redis_access import calling_redis
from zeta_core.system.replay_guard import ReplayGuard

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
        self, redis: Redis, kind: TypeAdapter[Message], entry: bytes, fields: dict[bytes, bytes], *, channel: str
    ) -> tuple[str, Message]:
        """As `read`, for a stream that several servers read. It also rejects what another server has read.

        The nonces are in Redis, in keys that a worker's own Redis user can't remove. Raises `BadMessage` and
        `RedisUnavailable`.
        """
        sender, message = self.read(kind, entry, fields, channel=channel)
        if isinstance(message, DURABLE):
            return sender, message
        key = f"{NONCE_PREFIX}{read_envelope(fields).nonce}"
        with calling_redis():
            earlier: Any = await redis.set(key, entry, nx=True, get=True, ex=math.ceil(2 * CLOCK_WINDOW_SECONDS))
        if earlier not in (None, entry):
            raise Replayed(f"the message of worker {sender} was received before, by this or another server")
        return sender, message
