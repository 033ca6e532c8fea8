"""Authenticates API keys. Only the SHA-256 of a key is stored.

A key's text is never stored or logged. Keys are looked up by their hash, so the response time reveals nothing about how
much of a guess is correct.

A valid key is looked up again after `KEY_SECONDS`, so a revoked one is accepted for at most that long.

Currently the only key is the one in the settings, with the scope ``admin``, which draining workers requires. A key
without this scope can do everything else in its project. There is no route that creates keys yet
(`contract.spec.availability`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import or_, select, update

from server.database.connections import Database
from server.database.tables import KeyRow
from zeta_core.contract.errors import AuthenticationFailed, InvalidSettings
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now

DEFAULT_PROJECT = "default"
ADMIN_SCOPE = "admin"
KEY_SECONDS = 1.0
FROM_SETTINGS = "settings"  # `created_by` of the key in ZETA_API_KEY


@dataclass(frozen=True)
class Caller:
    """The API key of a request."""

    key_id: str
    project: str
    scopes: frozenset[str]


@dataclass(frozen=True)
class _KnownKey:
    caller: Caller
    expires_at: datetime | None
    read_at: float  # monotonic


class Keys:
    """The API keys in the database; valid ones are kept in memory for `KEY_SECONDS`, by their hash."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._known: dict[str, _KnownKey] = {}

    async def authenticate(self, secret: str | None) -> Caller:
        """The caller with this Bearer token. Raises `AuthenticationFailed`."""
        if not secret:
            raise AuthenticationFailed(
                "The request has no API key; send the header 'Authorization: Bearer <key>'.", code="missing_api_key"
            )
        digest, now = _sha256(secret), self._clock()
        known = self._known.get(digest)
        if known is None or now - known.read_at >= KEY_SECONDS:
            self._known.pop(digest, None)
            known = self._known[digest] = await self._read(digest, now)
        if known.expires_at is not None and known.expires_at <= utc_now():
            raise AuthenticationFailed("The API key has expired; use another one.", code="expired_api_key")
        return known.caller

    async def _read(self, digest: str, now: float) -> _KnownKey:
        async with self._database.read() as session:
            row = await session.scalar(select(KeyRow).where(KeyRow.secret_sha256 == digest))
        if row is None or row.revoked_at is not None:
            raise AuthenticationFailed("The API key is unknown or revoked; use another one.")
        caller = Caller(row.id, row.project, frozenset(str(scope) for scope in row.scopes))
        return _KnownKey(caller, row.expires_at, read_at=now)


async def register_admin_key(database: Database, secret: str | None) -> None:
    """Make ``secret`` the admin key of the settings, and revoke an earlier one.

    Raises `InvalidSettings` if there would be no usable key at all.
    """
    async with database.write() as session:
        if secret is None:
            usable = or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > utc_now())
            if await session.scalar(select(KeyRow.id).where(KeyRow.revoked_at.is_(None), usable).limit(1)) is None:
                raise InvalidSettings("ZETA_API_KEY is not set and there is no key yet; set it to the admin key.")
            return
        digest = _sha256(secret)
        await session.execute(
            update(KeyRow)
            .where(KeyRow.created_by == FROM_SETTINGS, KeyRow.secret_sha256 != digest, KeyRow.revoked_at.is_(None))
            .values(revoked_at=utc_now())
        )
        row = await session.scalar(select(KeyRow).where(KeyRow.secret_sha256 == digest))
        if row is not None:
            row.revoked_at = None
            return
        session.add(
            KeyRow(
                id=new_id("key"),
                project=DEFAULT_PROJECT,
                created_by=FROM_SETTINGS,
                name="admin",
                scopes=[ADMIN_SCOPE],
                secret_sha256=digest,
                created_at=utc_now(),
            )
        )


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
