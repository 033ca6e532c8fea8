"""Browser sessions: an API key is exchanged for a random token, which the browser keeps in a cookie.

Guarantees: only the SHA-256 of a token is stored. A session ends when its user logs out, when it expires, and within
`KEY_CACHE_SECONDS` when its key is revoked, replaced or expires. A login link works once and for `LINK_MINUTES`. A
request with the cookie can change something only if it also carries the session's CSRF token, which another site can't
read.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import KEY_CACHE_SECONDS, Caller, Keys, sha256
from server.database.access_tables import LoginLinkRow, SessionRow
from server.database.connections import Database
from zeta_core.contract.errors import AuthenticationFailed, NotFound, PermissionDenied
from zeta_core.contract.job.events import utc_now

SESSION_DAYS = 7
LINK_MINUTES = 10
CSRF_HEADER = "X-CSRF-Token"
MAX_CACHED_SESSIONS = 10_000  # sessions that are kept in memory
_COOKIE_PREFIX = "zeta_session_"
_TOKEN_BYTES = 32


@dataclass(frozen=True)
class NewToken:
    """The token of a new session or login link, which is not stored."""

    token: str
    expires_at: datetime


@dataclass(frozen=True)
class BrowserSession:
    """The session of a request; ``csrf_token`` must accompany every request that changes something."""

    caller: Caller
    csrf_token: str
    expires_at: datetime

    def require_csrf(self, token: str | None) -> None:
        """Raise `PermissionDenied` unless ``token`` is the session's CSRF token."""
        if token is None or not hmac.compare_digest(token.encode(), self.csrf_token.encode()):
            raise PermissionDenied(
                f"The request changes something and is authenticated by a cookie, but its CSRF token is missing or "
                f"wrong; reload the page, or send an API key instead of the cookie (header {CSRF_HEADER}).",
                code="invalid_csrf_token",
            )


@dataclass(frozen=True)
class _KnownSession:
    key_sha256: str
    project: str | None
    expires_at: datetime
    read_at: float  # monotonic


class Sessions:
    """The browser sessions in the database. Valid ones are kept in memory for `KEY_CACHE_SECONDS`."""

    def __init__(
        self, database: Database, keys: Keys, service_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._keys = keys
        self._clock = clock
        self._known: dict[str, _KnownSession] = {}  # by the SHA-256 of their tokens
        # Cookies don't distinguish ports, so services on one host need different names.
        self.cookie_name = _COOKIE_PREFIX + sha256(service_id)[:8]

    async def start(self, key: str) -> NewToken:
        """Start a session with this valid API key."""
        async with self._database.write() as session:
            return await self._start(session, sha256(key))

    async def find(self, token: str) -> BrowserSession:
        """The session with this token. Raises `AuthenticationFailed` if it has ended or its key is invalid."""
        known = await self._read(sha256(token))
        if known.expires_at <= utc_now():
            raise _session_ended()
        caller = await self._keys.authenticate_digest(known.key_sha256)
        if known.project is not None:
            caller = await self._in_project(caller, known.project)
        return BrowserSession(caller, csrf_token=sha256(f"csrf:{token}"), expires_at=known.expires_at)

    async def choose_project(self, token: str, caller: Caller, project: str) -> None:
        """Let the session of an admin key act in this project from now on. Raises `NotFound`."""
        await self._keys.in_project(caller, project)
        digest = sha256(token)
        async with self._database.write() as session:
            await session.execute(update(SessionRow).where(SessionRow.token_sha256 == digest).values(project=project))
        self._known.pop(digest, None)

    async def _in_project(self, caller: Caller, project: str) -> Caller:
        try:
            return await self._keys.in_project(caller, project)
        except NotFound:  # the project was deleted, or the key is no longer an admin key
            return caller

    async def end(self, token: str) -> None:
        """Log out. Ending a session that has already ended has no effect."""
        digest = sha256(token)
        self._known.pop(digest, None)
        async with self._database.write() as session:
            await session.execute(delete(SessionRow).where(SessionRow.token_sha256 == digest))

    async def create_link(self, caller: Caller) -> NewToken:
        """Create a login link for the text of the key that the caller sent, which may be a replaced one."""
        now = utc_now()
        new = NewToken(secrets.token_urlsafe(_TOKEN_BYTES), now + timedelta(minutes=LINK_MINUTES))
        async with self._database.write() as session:
            await session.execute(delete(LoginLinkRow).where(LoginLinkRow.expires_at <= now))
            session.add(
                LoginLinkRow(
                    token_sha256=sha256(new.token),
                    key_sha256=caller.key_sha256,
                    created_at=now,
                    expires_at=new.expires_at,
                )
            )
        return new

    async def use_link(self, token: str) -> NewToken:
        """Start a session with a login link. Raises `AuthenticationFailed` if the link was used or has expired."""
        async with self._database.write() as session:
            used = delete(LoginLinkRow).where(
                LoginLinkRow.token_sha256 == sha256(token), LoginLinkRow.expires_at > utc_now()
            )
            key_sha256 = await session.scalar(used.returning(LoginLinkRow.key_sha256))
            if key_sha256 is None:
                raise AuthenticationFailed(
                    f"This login link was already used or is older than {LINK_MINUTES} minutes; "
                    "log in with an API key, or create a new link with `zeta dashboard`.",
                    code="invalid_login_link",
                )
            return await self._start(session, key_sha256)

    async def _start(self, session: AsyncSession, key_sha256: str) -> NewToken:
        now = utc_now()
        new = NewToken(secrets.token_urlsafe(_TOKEN_BYTES), now + timedelta(days=SESSION_DAYS))
        await session.execute(delete(SessionRow).where(SessionRow.expires_at <= now))
        session.add(
            SessionRow(token_sha256=sha256(new.token), key_sha256=key_sha256, created_at=now, expires_at=new.expires_at)
        )
        return new

    async def _read(self, digest: str) -> _KnownSession:
        now = self._clock()
        known = self._known.get(digest)
        if known is not None and now - known.read_at < KEY_CACHE_SECONDS:
            return known
        self._known.pop(digest, None)
        async with self._database.read() as session:
            row = await session.get(SessionRow, digest)
        if row is None:
            raise _session_ended()
        if len(self._known) >= MAX_CACHED_SESSIONS:
            self._known.clear()
        known = self._known[digest] = _KnownSession(row.key_sha256, row.project, row.expires_at, now)
        return known


def _session_ended() -> AuthenticationFailed:
    return AuthenticationFailed("The browser session has ended; log in again.", code="session_ended")
