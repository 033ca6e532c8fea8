"""Reads the signed messages of workers, and rejects those with an invalid secret, and old or repeated ones."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, TypeAdapter

from server.engine.worker_secrets import WorkerSecrets
from zeta_core.contract.wire.messages import DURABLE
from zeta_core.contract.wire.signatures import read_envelope
from zeta_core.system.replay_guard import ReplayGuard

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
