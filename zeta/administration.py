"""Managing keys, workers and projects, and reading the audit log: `Client.admin`. Most of it needs the scope ``admin``.

with Client() as client:
    created = client.admin.create_key("Ada's laptop", project="vision", scopes=["submit"])
    print(created.key)  # can't be shown again
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from urllib.parse import quote

from zeta.errors import parse_response
from zeta.pagination import read_pages
from zeta.transport import HttpTransport
from zeta_core.contract.access import (
    DEFAULT_PROJECT,
    AuditEntry,
    CreatedKey,
    CreatedWorkerSecret,
    Key,
    Project,
    Scope,
    WorkerSecret,
)
from zeta_core.contract.job.responses import DeletedObject


class Administration:
    """Each method calls one route of the API."""

    def __init__(self, transport: HttpTransport) -> None:
        self._transport = transport

    # --- Keys ---------------------------------------------------------------------------------------------------------

    def create_key(
        self,
        name: str,
        *,
        scopes: Iterable[Scope | str],
        project: str = DEFAULT_PROJECT,
        expires_at: datetime | None = None,
    ) -> CreatedKey:
        """Create a key, and its project if that doesn't exist. The result contains the key's text, this one time."""
        body = {
            "name": name,
            "project": project,
            "scopes": [str(scope) for scope in scopes],
            "expires_at": None if expires_at is None else expires_at.isoformat(),
        }
        return parse_response(CreatedKey, self._transport.request("POST", "/v1/keys", json=body))

    def keys(self, *, project: str | None = None, include_revoked: bool = False, limit: int | None = None) -> list[Key]:
        """List the keys of a project, or of all projects, newest first."""
        params = {"project": project, "include_revoked": True if include_revoked else None}
        return list(read_pages(self._transport, Key, "/v1/keys", params, limit))

    def own_key(self) -> Key:
        """The key of this client. Needs the scope ``read``."""
        return parse_response(Key, self._transport.request("GET", "/v1/keys/me"))

    def rotate_key(self, key_id: str, *, grace_seconds: int = 0) -> CreatedKey:
        """Give a key a new text; the old one continues to work for the grace period."""
        body = {"grace_seconds": grace_seconds}
        return parse_response(
            CreatedKey, self._transport.request("POST", f"/v1/keys/{_segment(key_id)}/rotate", json=body)
        )

    def revoke_key(self, key_id: str) -> DeletedObject:
        """Revoke a key; requests with it are rejected from now on."""
        return parse_response(DeletedObject, self._transport.request("DELETE", f"/v1/keys/{_segment(key_id)}"))

    # --- Secrets of workers -------------------------------------------------------------------------------------------

    def add_worker(self, name: str) -> CreatedWorkerSecret:
        """Let a worker join with a secret of its own, which the result contains, this one time."""
        return parse_response(CreatedWorkerSecret, self._transport.request("POST", "/v1/workers", json={"name": name}))

    def worker_secrets(self) -> list[WorkerSecret]:
        """List the workers that have a secret of their own, by name."""
        return list(read_pages(self._transport, WorkerSecret, "/v1/workers/secrets", {}, None))

    def rotate_worker_secret(self, name: str, *, grace_seconds: int = 0) -> CreatedWorkerSecret:
        """Replace the secret of a worker; the old one continues to work for the grace period."""
        body = {"grace_seconds": grace_seconds}
        return parse_response(
            CreatedWorkerSecret, self._transport.request("POST", f"/v1/workers/{_segment(name)}/rotate", json=body)
        )

    def revoke_worker(self, name: str) -> DeletedObject:
        """Revoke the secret of a worker. Its messages are rejected, and its jobs move to other workers."""
        return parse_response(DeletedObject, self._transport.request("DELETE", f"/v1/workers/{_segment(name)}"))

    # --- Projects -----------------------------------------------------------------------------------------------------

    def create_project(self, name: str, limits: Mapping[str, int | str] | None = None) -> Project:
        """Create a project with ``limits`` (`ProjectLimits`)."""
        return parse_response(
            Project, self._transport.request("POST", "/v1/projects", json={"name": name, "limits": dict(limits or {})})
        )

    def project(self, name: str) -> Project:
        """A project with its limits and what it uses of them."""
        return parse_response(Project, self._transport.request("GET", f"/v1/projects/{_segment(name)}"))

    def set_limits(self, name: str, limits: Mapping[str, int | str | None]) -> Project:
        """Set limits of a project (`ProjectLimits`). ``None`` restores the default; absent limits stay."""
        body = {"limits": dict(limits)}
        return parse_response(Project, self._transport.request("PATCH", f"/v1/projects/{_segment(name)}", json=body))

    def projects(self) -> list[Project]:
        """List all projects by name; a key without the scope ``admin`` sees its own."""
        return list(read_pages(self._transport, Project, "/v1/projects", {}, None))

    def delete_project(self, name: str) -> DeletedObject:
        """Delete a project without jobs, files and keys. Its model names are deleted, too."""
        return parse_response(DeletedObject, self._transport.request("DELETE", f"/v1/projects/{_segment(name)}"))

    # --- Audit log ----------------------------------------------------------------------------------------------------

    def audit(
        self,
        *,
        project: str | None = None,
        key_id: str | None = None,
        action: str | None = None,
        object_id: str | None = None,
        limit: int | None = 20,
    ) -> list[AuditEntry]:
        """List changes, newest first; ``limit=None`` lists all of them."""
        params = {"project": project, "key_id": key_id, "action": action, "object_id": object_id}
        return list(read_pages(self._transport, AuditEntry, "/v1/audit", params, limit))


def _segment(text: str) -> str:
    """``text`` as one segment of a URL path."""
    return quote(text, safe="")
