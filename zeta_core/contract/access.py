"""API keys with their scopes, secrets of workers, projects with their limits, and the audit log, as in the API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from zeta_core.contract.text import ShortLine
from zeta_core.contract.wire.signatures import WORKER_NAME_PATTERN

DEFAULT_PROJECT = "default"
PROJECT_HEADER = "Zeta-Project"
PROJECT_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
MAX_GRACE_SECONDS = 30 * 24 * 3600
MAX_LIMIT = 2**53 - 1  # the largest number that every JSON parser keeps exactly

ProjectName = Annotated[
    str,
    StringConstraints(pattern=PROJECT_PATTERN),
    Field(description="lower-case letters, digits and hyphens, at most 63 characters"),
]


class Scope(StrEnum):
    """What a key may do."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"
    METRICS = "metrics"


SCOPE_SENTENCES: Mapping[Scope, str] = {
    Scope.READ: "read everything in the project, checkpoints included, but not the content of data files",
    Scope.SUBMIT: "everything that `read` allows; submit and control jobs, upload and download files",
    Scope.ADMIN: "everything, in all projects; manage keys, projects and workers; read the audit log",
    Scope.METRICS: "only read /metrics, which counts the jobs of all projects",
}
_INCLUDED: Mapping[Scope, frozenset[Scope]] = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.SUBMIT: frozenset({Scope.SUBMIT, Scope.READ}),
    Scope.ADMIN: frozenset(Scope),
    Scope.METRICS: frozenset({Scope.METRICS}),
}


def allows(granted: Iterable[str], required: Scope) -> bool:
    """Whether a key with the scopes ``granted`` may do what requires this scope. Unknown scopes allow nothing."""
    return any(required in _INCLUDED[Scope(scope)] for scope in granted if scope in _INCLUDED)


class _Response(BaseModel):
    """Frozen. A client keeps the fields of a newer server."""

    model_config = ConfigDict(frozen=True, extra="allow")


class _RequestBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# --- Keys -------------------------------------------------------------------------------------------------------------


class NewKey(_RequestBody):
    """A request to create a key. A project that doesn't exist yet is created with it."""

    name: ShortLine = Field(description="who or what uses the key")
    project: ProjectName = DEFAULT_PROJECT
    scopes: list[Scope] = Field(min_length=1, max_length=len(Scope), description="what the key may do")
    expires_at: AwareDatetime | None = Field(default=None, description="when the key stops working; default: never")


def _as_integer(value: object) -> object:
    """3600.0 as 3600: JSON does not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class KeyRotation(_RequestBody):
    """A request to replace the text of a key."""

    grace_seconds: Annotated[int, BeforeValidator(_as_integer)] = Field(
        default=0,
        ge=0,
        le=MAX_GRACE_SECONDS,
        strict=True,
        description="for this time, the old text continues to work, too",
    )


class Key(_Response):
    """An API key without its text, which is only shown when the key is created or rotated."""

    id: str
    object: Literal["key"] = "key"
    name: str
    project: str
    scopes: list[str]
    created_by: str = Field(description="id of the key that created it, or `settings` for ZETA_API_KEY")
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = Field(default=None, description="accurate to about a minute")
    old_text_expires_at: datetime | None = Field(
        default=None, description="until then, the text from before the last rotation continues to work"
    )


class CreatedKey(Key):
    """A new or rotated key with its text."""

    key: str = Field(description="the text of the key, which can't be shown again")
    is_new_project: bool = Field(default=False, description="whether the key's project was created with it")


# --- Secrets of workers -----------------------------------------------------------------------------------------------


class NewWorkerSecret(_RequestBody):
    """A request to let a worker join with a secret of its own."""

    name: str = Field(
        pattern=WORKER_NAME_PATTERN,
        description="the worker's name: at most 100 letters, digits, '.', '_' and '-', starting with a letter or digit",
    )


class WorkerSecretRotation(KeyRotation):
    """A request to replace the secret of a worker."""


class WorkerSecret(_Response):
    """The secret of a worker, without its text, which is only shown when the worker is added or the secret rotated."""

    name: str = Field(description="the worker's name")
    object: Literal["worker_secret"] = "worker_secret"
    created_by: str = Field(description="id of the key that created it")
    created_at: datetime = Field(description="when the worker was added, or its secret rotated")
    revoked_at: datetime | None = None
    old_secret_expires_at: datetime | None = Field(
        default=None, description="until then, the secret from before the last rotation continues to work"
    )


class CreatedWorkerSecret(WorkerSecret):
    """A new or rotated secret with its text."""

    secret: str = Field(description="the worker's ZETA_WORKER_SECRET, which can't be shown again")


# --- Projects ---------------------------------------------------------------------------------------------------------


class HubAccess(StrEnum):
    """What the jobs of a project may read from the Hugging Face Hub, within ``ZETA_HUB``."""

    OFF = "off"
    PUBLIC = "public"
    OPERATOR_TOKEN = "operator-token"  # noqa: S105 - the name of a choice


def _limit(description: str, *, least: int = 0, most: int = MAX_LIMIT) -> Any:
    return Field(default=None, ge=least, le=most, strict=True, description=description)


class ProjectLimits(_RequestBody):
    """Limits of a project; ``null`` means the default in the server's settings, or no limit."""

    max_queued_jobs: int | None = _limit("queued jobs; further submissions are rejected")
    max_running_jobs: int | None = _limit("jobs that run at the same time; further jobs wait")
    max_gpus: int | None = _limit("GPUs that running jobs use at the same time; further jobs wait")
    max_stored_bytes: int | None = _limit(
        "total size of uploaded files and checkpoints; further uploads and submissions are rejected"
    )
    max_upload_bytes: int | None = _limit("size of one uploaded file", least=1)
    max_requests_per_minute: int | None = _limit("requests per minute, except with admin keys", least=1)
    max_priority: int | None = _limit("highest priority of a job", least=-100, most=100)
    max_streams: int | None = _limit("open event streams and followed logs per server process, except with admin keys")
    hub: HubAccess | None = Field(
        default=None,
        description="what jobs may read from the Hugging Face Hub: nothing (`off`), what everyone can read (`public`), "
        "or everything that the token of the workers' operator can read (`operator-token`)",
    )

    def with_own(self, own: Mapping[str, Any]) -> ProjectLimits:
        """These default limits, replaced by those of ``own`` that are set."""
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})

    @property
    def hub_access(self) -> HubAccess:
        """Never the operator's token unless it was set."""
        return HubAccess.PUBLIC if self.hub is None else HubAccess(self.hub)


NO_LIMITS = ProjectLimits()


class NewProject(_RequestBody):
    name: ProjectName
    limits: ProjectLimits = NO_LIMITS


class ProjectChange(_RequestBody):
    """A request to change a project: limits that are absent stay, and ``null`` restores the default."""

    limits: ProjectLimits = NO_LIMITS


class ProjectUsage(_Response):
    """What a project uses of its limits now."""

    queued_jobs: int
    running_jobs: int
    gpus: int
    stored_bytes: int = Field(description="uploaded files and checkpoints; logs are not included")


class Project(_Response):
    """A project: a name that separates the jobs, files and keys of one group of users from those of all others."""

    name: str
    object: Literal["project"] = "project"
    created_at: datetime
    created_by: str
    limits: dict[str, int | str | None] = Field(description="the limits that were set; null means the default")
    effective_limits: dict[str, int | str | None] = Field(description="the limits that apply; null means no limit")
    usage: ProjectUsage


# --- Audit log --------------------------------------------------------------------------------------------------------


class AuditEntry(_Response):
    """One change: who made it, what it was, and which object it changed."""

    id: str
    object: Literal["audit_entry"] = "audit_entry"
    created_at: datetime
    project: str | None = Field(description="null for a change of the whole service, such as draining a worker")
    key_id: str
    key_name: str
    address: str | None = Field(description="the client's network address")
    action: str = Field(description="the kind of object and the change, such as `job.cancel`")
    object_id: str
    details: dict[str, Any] = Field(default={}, description="further facts about the change, such as a key's scopes")
