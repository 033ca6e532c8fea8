"""Authenticates API keys, and checks their scopes. Only the SHA-256 of a key is stored.

A key's text is never stored or logged. Keys are looked up by their hash, so the response time reveals nothing about how
much of a guess is correct.

A valid key is looked up again after `KEY_CACHE_SECONDS`, so a key that another server has revoked is accepted for at
most that long. The last use of a key is recorded at most once per `USE_RECORD_SECONDS`, by a background loop, so that a
request that only reads causes no write.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import or_, select, update

from server.database.access_tables import AuditRow, KeyRow, ProjectRow
from server.database.connections import Database
from server.database.nul_characters import replace_nul
from zeta_core.contract.access import DEFAULT_PROJECT, NO_LIMITS, PROJECT_HEADER, ProjectLimits, Scope, allows
from zeta_core.contract.errors import AuthenticationFailed, InvalidSettings, NotFound, PermissionDenied
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.spec.validation import shown

KEY_CACHE_SECONDS = 1.0
USE_RECORD_SECONDS = 60.0
RECORD_USES_SECONDS = 5.0  # the interval of `Keys.record_uses`
CREATED_BY_SETTINGS = "settings"  # `created_by` of the key in ZETA_API_KEY


@dataclass(frozen=True)
class Caller:
    """Who makes a request: the API key, the project in which the request acts, and the client's network address.

    The project is the key's, unless an admin key names another one (`Keys.in_project`). ``expires_at`` is when the key
    stops working. ``limits`` are those of the project. ``key_sha256`` identifies the text of the key that was sent: an
    old one that still works after a rotation, or the new one.
    """

    key_id: str
    key_name: str
    project: str
    scopes: frozenset[str]
    expires_at: datetime | None = None
    address: str | None = None
    limits: ProjectLimits = NO_LIMITS
    key_sha256: str = field(kw_only=True, repr=False)

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    def allows(self, scope: Scope) -> bool:
        """Whether the key has this scope, or one that includes it."""
        return allows(self.scopes, scope)

    def require(self, scope: Scope, purpose: str) -> None:
        """Raise `PermissionDenied` unless the key has the scope; ``purpose`` is what requires it."""
        if not self.allows(scope):
            granted = ", ".join(sorted(self.scopes)) or "none"
            raise PermissionDenied(
                f"{purpose} requires the scope '{scope}', and this API key has: {granted}; use a key with '{scope}', "
                "which an administrator creates with `zeta keys create`.",
                code="insufficient_scope",
            )

    def not_found(self, kind: str, object_id: str, project: str | None) -> NotFound:
        """The error for an object that isn't in the caller's project.

        ``project`` is the one that contains it, if any; the message names it only to an admin key.
        """
        if project is not None and self.is_admin:
            advice = f"it is in project {project!r}; send the header '{PROJECT_HEADER}: {project}' (ZETA_PROJECT)"
        else:
            advice = f"GET /v1/{kind}s lists your {kind}s"
        return NotFound(f"{kind.capitalize()} {shown(object_id)} not found; {advice}.", code=f"{kind}_not_found")

    def audit_row(self, action: str, object_id: str, *, project: str | None, **details: Any) -> AuditRow:
        """The entry of the audit log for a change; add it in the transaction of the change."""
        return AuditRow(
            created_at=utc_now(),
            project=project,
            key_id=self.key_id,
            key_name=self.key_name,
            address=self.address,
            action=action,
            object_id=object_id,
            details=details,
        )


@dataclass(frozen=True)
class _KnownKey:
    caller: Caller
    read_at: float  # monotonic


class Keys:
    """The API keys in the database; valid ones are kept in memory for `KEY_CACHE_SECONDS`, by their hash."""

    def __init__(
        self,
        database: Database,
        clock: Callable[[], float] = time.monotonic,
        *,
        default_limits: ProjectLimits = NO_LIMITS,
    ) -> None:
        """``default_limits`` are those of a project for which none were set."""
        self._database = database
        self._default_limits = default_limits
        self._clock = clock
        self._known: dict[str, _KnownKey] = {}
        self._used_at: dict[str, datetime] = {}  # uses that are not recorded yet, by key id
        self._recorded_at: dict[str, datetime] = {}

    async def authenticate(self, secret: str | None) -> Caller:
        """The caller with this key, which is the Bearer token of a request. Raises `AuthenticationFailed`."""
        if not secret:
            raise AuthenticationFailed(
                "The request has no API key; send the header 'Authorization: Bearer <key>'.", code="missing_api_key"
            )
        return await self.authenticate_digest(sha256(secret))

    async def authenticate_digest(self, digest: str) -> Caller:
        """The caller with the key of this SHA-256, for a browser session. Raises `AuthenticationFailed`."""
        now = self._clock()
        known = self._known.get(digest)
        if known is None or now - known.read_at >= KEY_CACHE_SECONDS:
            self._known.pop(digest, None)
            known = self._known[digest] = await self._read(digest, now)
        caller = known.caller
        if caller.expires_at is not None and caller.expires_at <= utc_now():
            raise AuthenticationFailed("The API key has expired; use another one.", code="expired_api_key")
        self._used_at[caller.key_id] = utc_now()
        return caller

    async def in_project(self, caller: Caller, project: str) -> Caller:
        """The caller acting in this project, which is another one than the key's only for an admin key.

        Raises `NotFound`, whether the project doesn't exist or belongs to others.
        """
        if project == caller.project:
            return caller
        if caller.is_admin:
            async with self._database.read() as session:
                row = await session.get(ProjectRow, replace_nul(project))
            if row is not None:
                return replace(caller, project=project, limits=self._default_limits.with_own(row.limits))
        raise project_not_found(project)

    def clear_cache(self) -> None:
        """Look up every key again at its next use, because a key or the limits of a project were changed."""
        self._known.clear()

    async def record_uses(self) -> None:
        """Store when keys were last used, unless that was recorded less than `USE_RECORD_SECONDS` ago."""
        now, interval = utc_now(), timedelta(seconds=USE_RECORD_SECONDS)
        never = now - 2 * interval
        due = {key: at for key, at in self._used_at.items() if now - self._recorded_at.get(key, never) >= interval}
        if not due:
            return
        async with self._database.write() as session:
            for key_id, used_at in sorted(due.items()):  # in a fixed order, to avoid deadlocks of several servers
                is_later = or_(KeyRow.last_used_at.is_(None), KeyRow.last_used_at < used_at)
                await session.execute(update(KeyRow).where(KeyRow.id == key_id, is_later).values(last_used_at=used_at))
        for key_id, used_at in due.items():
            self._recorded_at[key_id] = now
            if self._used_at[key_id] == used_at:
                del self._used_at[key_id]

    async def _read(self, digest: str, now: float) -> _KnownKey:
        query = select(KeyRow).where(or_(KeyRow.secret_sha256 == digest, KeyRow.old_secret_sha256 == digest))
        async with self._database.read() as session:
            row = await session.scalar(query)
            project = None if row is None else await session.get(ProjectRow, row.project)
        if row is None or row.revoked_at is not None:
            raise AuthenticationFailed("The API key is unknown or revoked; use another one.")
        ends = [row.expires_at] if row.secret_sha256 == digest else [row.expires_at, row.old_expires_at]
        caller = Caller(
            key_id=row.id,
            key_name=row.name,
            project=row.project,
            scopes=frozenset(str(scope) for scope in row.scopes),
            expires_at=min((end for end in ends if end is not None), default=None),
            limits=self._default_limits if project is None else self._default_limits.with_own(project.limits),
            key_sha256=digest,
        )
        return _KnownKey(caller, read_at=now)


async def register_admin_key(database: Database, secret: str | None) -> None:
    """Make ``secret`` the admin key of the settings, and revoke an earlier one.

    Raises `InvalidSettings` if there would be no usable key at all, or if ``secret`` is the text of a key that was
    created through the API: that key has its own scopes, project and revocation, which the settings must not change.
    """
    async with database.write() as session:
        if secret is None:
            usable = or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > utc_now())
            if await session.scalar(select(KeyRow.id).where(KeyRow.revoked_at.is_(None), usable).limit(1)) is None:
                raise InvalidSettings("ZETA_API_KEY is not set and there is no key yet; set it to the admin key.")
            return
        digest = sha256(secret)
        has_text = or_(KeyRow.secret_sha256 == digest, KeyRow.old_secret_sha256 == digest)
        created = await session.scalar(select(KeyRow).where(has_text, KeyRow.created_by != CREATED_BY_SETTINGS))
        if created is not None:
            raise InvalidSettings(
                f"ZETA_API_KEY is the text of key {created.id}, which was created with `zeta keys create` or rotated; "
                "set it to another text, such as the output of `openssl rand -hex 32`.",
                param="ZETA_API_KEY",
                code="api_key_in_use",
            )
        await session.execute(
            update(KeyRow)
            .where(
                KeyRow.created_by == CREATED_BY_SETTINGS, KeyRow.secret_sha256 != digest, KeyRow.revoked_at.is_(None)
            )
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
                created_by=CREATED_BY_SETTINGS,
                name="admin",
                scopes=[Scope.ADMIN],
                secret_sha256=digest,
                created_at=utc_now(),
            )
        )


def project_not_found(name: str) -> NotFound:
    return NotFound(
        f"Project {shown(name)} not found; GET /v1/projects lists the projects of this API key.",
        code="project_not_found",
    )


def sha256(secret: str) -> str:
    """The digest under which a key is stored."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
