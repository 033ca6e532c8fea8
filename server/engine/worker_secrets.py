"""The secrets of the workers: which ones are valid, and the keys that follow from them.

The database contains the ids of individual secrets (`WorkerSecretRow`); the keys are derived from the server's
``ZETA_WORKER_SECRET``, so a copy of the database contains no secret. A loop reads the table every `REFRESH_SECONDS`, so
a secret that another server has revoked is accepted for about that long. Messages are not read before the first load.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select

from server.database.access_tables import WorkerSecretRow
from server.database.connections import Database
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.signatures import SHARED, BadSender, Envelope, WorkerKey, derive_key
from zeta_core.system.redis_access import RedisUnavailable

REFRESH_SECONDS = 1.0


@dataclass(frozen=True)
class IndividualSecret:
    """The state of a worker's individual secret; the old one is valid until ``old_expires_at``."""

    secret_id: str
    old_secret_id: str | None = None
    old_expires_at: datetime | None = None
    is_revoked: bool = False

    def accepts(self, secret_id: str) -> bool:
        if self.is_revoked:
            return False
        is_old = secret_id == self.old_secret_id and self.old_expires_at is not None and self.old_expires_at > utc_now()
        return secret_id == self.secret_id or is_old


class WorkerSecrets:
    def __init__(self, server_secret: str, *, allow_shared: bool = True) -> None:
        """``server_secret`` is ``ZETA_WORKER_SECRET``; ``allow_shared`` is ``ZETA_SHARED_WORKER_SECRET``."""
        self._server_secret = server_secret
        self._allow_shared = allow_shared
        self._individual: Mapping[str, IndividualSecret] = {}
        self._in_use: dict[str, str] = {}  # by worker: the id of the secret of its newest message
        self._keys: dict[tuple[str, str], WorkerKey] = {}
        self._loaded_at: float | None = None  # monotonic: when the newest table was requested

    async def load(self, database: Database) -> None:
        """Read the table. Raises `DatabaseUnavailable`; the state that was read before stays valid."""
        began = time.monotonic()
        async with database.read() as session:
            rows = list(await session.scalars(select(WorkerSecretRow)))
        self._individual = {
            row.worker: IndividualSecret(
                row.secret_id, row.old_secret_id, row.old_expires_at, is_revoked=row.revoked_at is not None
            )
            for row in rows
        }
        self._loaded_at = began

    def require(self) -> None:
        """Raise `RedisUnavailable` until the secrets were read once: no message can be verified before."""
        if self._loaded_at is None:
            raise RedisUnavailable("the secrets of the workers were not read from the database yet")

    def is_newer_than(self, moment: float) -> bool:
        """Whether the table was read after this time (monotonic)."""
        return self._loaded_at is not None and self._loaded_at > moment

    def key_for_reading(self, envelope: Envelope) -> WorkerKey:
        """The key of the message's sender. Raises `BadSender` if its secret is not valid.

        The message itself is not verified yet, so whoever wrote it may not be that worker.
        """
        if (reason := self.rejection(envelope.worker, envelope.secret_id)) is not None:
            raise BadSender(reason)
        return self.derive(envelope.worker, envelope.secret_id)

    def rejection(self, worker: str, secret_id: str) -> str | None:
        """Why the server does not accept this secret of the worker; ``None`` if it does."""
        own = self._individual.get(worker)
        if own is not None and own.is_revoked:
            return f"worker {worker} was revoked; `zeta workers add {worker}` creates a new secret"
        if secret_id == SHARED:
            if own is not None:
                return f"worker {worker} has a secret of its own and can't use the shared one; choose another name"
            if not self._allow_shared:
                return (
                    f"worker {worker} uses the shared secret, which ZETA_SHARED_WORKER_SECRET=off does not allow; "
                    f"`zeta workers add {worker}` creates a secret for it"
                )
            return None
        if own is None:
            return f"worker {worker} is not known; `zeta workers add {worker}` creates a secret for it"
        if not own.accepts(secret_id):
            return f"the secret of worker {worker} was replaced; use the one that `zeta workers rotate` printed"
        return None

    def is_revoked(self, worker: str) -> bool:
        own = self._individual.get(worker)
        return own is not None and own.is_revoked

    def is_individual(self, worker: str) -> bool:
        own = self._individual.get(worker)
        return own is not None and not own.is_revoked

    def note_use(self, key: WorkerKey) -> None:
        """Remember the secret of a verified message, to sign the messages to this worker with it."""
        self._in_use[key.worker] = key.secret_id

    def key_for_sending(self, worker: str) -> WorkerKey:
        """The key that the worker has now: that of its newest message, even if it was revoked since."""
        own = self._individual.get(worker)
        default = SHARED if own is None else own.secret_id
        return self.derive(worker, self._in_use.get(worker, default))

    def derive(self, worker: str, secret_id: str) -> WorkerKey:
        """The key that belongs to this id, valid or not."""
        key = self._keys.get((worker, secret_id))
        if key is None:
            if len(self._keys) > 10_000:  # senders are not verified yet
                self._keys.clear()
            key = self._keys[worker, secret_id] = derive_key(self._server_secret, worker, secret_id)
        return key
