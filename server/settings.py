"""The server's settings: read once from ``ZETA_*`` at the entry point and passed on as one frozen object."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from zeta_core.contract.access import HubAccess, ProjectLimits
from zeta_core.contract.spec.sources import ModelSource
from zeta_core.contract.strict_json import JsonFault, parse_json
from zeta_core.contract.webhooks import check_url
from zeta_core.contract.wire.signatures import INDIVIDUAL_PREFIX
from zeta_core.system.database_url import sqlite_url
from zeta_core.system.exposure import is_loopback
from zeta_core.system.settings import ApiKey, DatabaseUrl, FleetSettings, Settings, StoreSettings

GIBIBYTE = 2**30
MIN_FREE_BYTES = 256 * 2**20
_PATH_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")

_BASE_MODELS: TypeAdapter[dict[str, ModelSource]] = TypeAdapter(dict[str, ModelSource])

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?")

Networks = tuple[IPv4Network | IPv6Network, ...]


def parse_networks(text: str) -> Networks:
    """The addresses and networks of a comma-separated list. Raises `ValueError`."""
    return tuple(ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip())


def parse_origins(text: str) -> tuple[str, ...]:
    """The origins, such as ``https://train.example.org``, of a comma-separated list. Raises `ValueError`."""
    origins = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is not an origin such as https://train.example.org")
    return origins


def _check_origins(value: str) -> str:
    parse_origins(value)
    return value


def parse_path_prefix(text: str) -> str:
    """A path prefix such as ``/zeta`` without its trailing slash; empty for none. Raises `ValueError`."""
    path = text.rstrip("/")
    if path and not _PATH_PREFIX.fullmatch(path):
        raise ValueError("it must be a path such as /zeta")
    return path


def _check_networks(value: str) -> str:
    parse_networks(value)
    return value


def parse_base_models(text: str) -> dict[str, ModelSource]:
    """The sources of models by name, from a JSON object; empty for none. Raises `ValueError`."""
    if not text:
        return {}
    try:
        sources = parse_json(text)
    except JsonFault as fault:
        raise ValueError(f"it {fault.reason}") from fault
    if not isinstance(sources, dict):
        raise ValueError('it must be a JSON object such as {"gpt-4o-mini": "org/name"}')
    try:
        return _BASE_MODELS.validate_python(sources)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise ValueError(f"the source of {name!r} is not a model; use a Hub id or an object as in a spec") from error


def _check_base_models(value: str) -> str:
    parse_base_models(value)
    return value


def _check_engine_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("it must be a URL such as http://127.0.0.1:8000/v1")
    return value.rstrip("/")


def _check_smtp_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError("it must be a URL such as smtps://user:password@mail.example.org")
    return value


def _check_smtp_from(value: str | None, known: ValidationInfo) -> str | None:
    if value is None and known.data.get("smtp_url") is not None:
        raise ValueError("ZETA_SMTP_URL is set, so it must be the address that sends the e-mails")
    if value is not None:
        check_url(f"mailto:{value}")
    return value


class DatabaseSettings(Settings):
    """The settings of the migrations: the location of the database."""

    database_url: DatabaseUrl | None = Field(
        default=None,
        description="`postgresql://` with libpq's options, including several hosts. The URLs of hosting providers "
        "(`postgres://`, `+asyncpg`, `pgbouncer=true`, `ssl=require`) are accepted, and unknown options are rejected "
        "by name. PgBouncer's transaction pooling works; default: SQLite in ZETA_HOME",
    )

    @property
    def database(self) -> str:
        """The URL of the database in use."""
        return self.database_url or sqlite_url(self.home / "zeta.db")


class StorageSettings(DatabaseSettings, StoreSettings):
    """The settings of ``zeta artifacts check``, ``zeta backup`` and ``zeta restore``: the locations of all data."""


class ServerSettings(DatabaseSettings, FleetSettings):
    """The settings of ``zeta server``. ``api_key``, if given, is the admin key."""

    secrets: ClassVar[frozenset[str]] = Settings.secrets | {"serve_api_key", "smtp_url"}

    host: str = Field(default="127.0.0.1", description="address at which the server listens")
    port: int = Field(default=8400, ge=0, le=65535, description="port of the server; 0: any free port")
    root_path: Annotated[str, AfterValidator(parse_path_prefix)] = Field(
        default="",
        description="path prefix under which a reverse proxy publishes the service, such as `/zeta`; the proxy may "
        "strip it or pass it on; default: none",
    )
    trusted_proxies: Annotated[str, AfterValidator(_check_networks)] = Field(
        default="",
        description="addresses and networks (`10.0.0.0/8,::1`) whose headers `Forwarded` and `X-Forwarded-For`, "
        "`-Proto`, `-Host` and `-Prefix` are trusted; default: none",
    )
    tls_cert: Path | None = Field(
        default=None,
        description="PEM file of the certificate and its chain, for HTTPS; without it, a public ZETA_HOST needs "
        "ZETA_BEHIND_PROXY; default: no TLS",
    )
    tls_key: Path | None = Field(default=None, description="PEM file of the certificate's private key; default: no TLS")
    behind_proxy: bool = Field(
        default=False,
        description="`yes`: only a reverse proxy with TLS reaches the server, under any name",
    )
    cors_origins: Annotated[str, AfterValidator(_check_origins)] = Field(
        default="",
        description="origins of web pages that may use the API, such as `https://lab.example.org`, separated by "
        "commas; default: none",
    )
    api_key: ApiKey | None = Field(
        default=None, description="the admin key; default: none, so that only created keys are valid"
    )
    shared_worker_secret: bool = Field(
        default=True,
        description="`no`: workers can't use the server's secret, and each one needs its own (`zeta workers add`); "
        "`zeta up` needs `yes`",
    )
    max_spec_bytes: int = Field(default=64 * 1024, ge=1024, le=2**24, description="maximum size of a JSON request body")
    artifacts_take_over: str | None = Field(
        default=None,
        description="id of the service whose artifact store this service takes over permanently at its next start; "
        "default: the server refuses to start on another service's store",
    )
    max_upload_bytes: int = Field(default=16 * GIBIBYTE, ge=1, description="maximum size of an upload")
    project_quota_bytes: int | None = Field(
        default=None, ge=1, description="total size of a project's files and checkpoints; default: no limit"
    )
    downloads: Literal["server", "redirect"] = Field(
        default="server",
        description="`redirect`: clients download single files from the bucket, with a link that is valid for 5 "
        "minutes, and must be able to reach AWS_ENDPOINT_URL",
    )
    upload_idle_seconds: float = Field(default=60, gt=0, description="idle timeout of an upload")
    upload_max_seconds: float = Field(default=24 * 3600, gt=0, description="maximum duration of an upload")
    server_min_free_bytes: int = Field(
        default=MIN_FREE_BYTES,
        ge=0,
        description="disk space of the artifact store that uploads leave for the database and the workers; if the "
        "store or ZETA_HOME has less, `/readyz` reports the disk",
    )
    project_max_running: int | None = Field(
        default=None,
        ge=1,
        description="maximum number of running jobs per project; further jobs wait; default: no limit",
    )
    project_max_queued: int | None = Field(
        default=None, ge=1, description="maximum number of queued jobs per project; default: no limit"
    )
    project_max_gpus: int | None = Field(
        default=None, ge=0, description="maximum number of GPUs that a project uses at a time; default: no limit"
    )
    project_max_priority: int | None = Field(
        default=None, ge=-100, le=100, description="highest priority of a project's jobs; default: 100"
    )
    fair_share_half_life_seconds: float = Field(
        default=24 * 3600,
        gt=0,
        allow_inf_nan=False,
        description="among jobs of the same priority, the project that used the fewest slots recently comes first; "
        "what it used this long ago counts half",
    )
    project_requests_per_minute: int | None = Field(
        default=None, ge=1, description="maximum number of requests per project and minute; default: no limit"
    )
    project_max_streams: int | None = Field(
        default=1000,
        ge=0,
        description="maximum number of open event streams and followed logs per project and server process",
    )
    project_hub: HubAccess = Field(
        default=HubAccess.PUBLIC,
        description="what the jobs of a project may read from the Hugging Face Hub, within ZETA_HUB: `off`, `public` "
        "or `operator-token`",
    )
    key_max_streams: int = Field(
        default=200, ge=0, description="maximum number of open event streams and followed logs per API key and process"
    )
    max_job_events: int = Field(
        default=200_000,
        ge=1,
        description="maximum number of stored log, sample and progress events per job; a warning marks the first "
        "dropped event, and other events are always stored",
    )
    check_seconds: float = Field(default=30, gt=0, description="time to wait for a worker's check of a spec")
    claim_seconds: float = Field(
        default=10, gt=0, description="time for a worker to claim a dispatched job before it is dispatched again"
    )
    prepare_seconds: float = Field(
        default=600,
        gt=0,
        allow_inf_nan=False,
        description="time for the workers of a job on several machines to fetch their inputs before the start is given "
        "up and repeated",
    )
    openai_models: Annotated[str, AfterValidator(_check_base_models)] = Field(
        default="",
        description="names of base models for the `openai` client, as a JSON object such as "
        '`{"gpt-4o-mini": "org/name"}`; default: none',
    )

    serve_url: Annotated[str, AfterValidator(_check_engine_url)] | None = Field(
        default=None,
        description="an engine with OpenAI's interface, such as `http://127.0.0.1:8000/v1`: it answers chats and "
        "completions instead of the workers; default: none",
    )
    serve_seconds: float = Field(
        default=300, gt=0, allow_inf_nan=False, description="time without a byte after which that engine is given up"
    )
    serve_api_key: ApiKey | None = Field(default=None, description="the key of that engine; default: none")

    webhook_networks: Annotated[str, AfterValidator(_check_networks)] = Field(
        default="",
        description="addresses and networks (`10.1.2.0/24,127.0.0.1`) to which webhooks may be sent besides the public "
        "internet; default: none",
    )
    webhook_seconds: float = Field(
        default=10, gt=0, le=60, allow_inf_nan=False, description="time limit of one attempt to send a message"
    )
    webhook_disable_days: float = Field(
        default=5, gt=0, allow_inf_nan=False, description="a webhook that only fails for this long is disabled"
    )
    webhook_wait_seconds: float = Field(
        default=900, gt=0, allow_inf_nan=False, description="a job that is queued for longer causes `job.waiting`"
    )
    smtp_url: Annotated[str, AfterValidator(_check_smtp_url)] | None = Field(
        default=None,
        description="SMTP server of notifications by e-mail, `smtps://user:password@mail.example.org`, or `smtp://` "
        "with STARTTLS; default: no e-mail",
    )
    smtp_from: Annotated[str | None, AfterValidator(_check_smtp_from)] = Field(
        default=None, validate_default=True, description="sender address of these e-mails, required with ZETA_SMTP_URL"
    )
    smtp_domains: str = Field(
        default="",
        description="domains of the recipients (`example.org,example.com`, or `*`); default: that of ZETA_SMTP_FROM",
    )

    @field_validator("downloads")
    @classmethod
    def _check_downloads(cls, value: str, known: ValidationInfo) -> str:
        if value == "redirect" and not (known.data.get("artifacts_url") or "").startswith("s3://"):
            raise ValueError("it needs artifacts in a bucket; set ZETA_ARTIFACTS_URL to s3://bucket/prefix")
        return value

    @field_validator("worker_secret")
    @classmethod
    def _reject_individual_secret(cls, value: str) -> str:
        if value.startswith(INDIVIDUAL_PREFIX):
            raise ValueError("it is the secret of a single worker; set it to the secret of the server")
        return value

    @property
    def downloads_by_link(self) -> bool:
        """Whether clients are redirected to the object store."""
        return self.downloads == "redirect"

    @property
    def openai_base_models(self) -> dict[str, ModelSource]:
        return parse_base_models(self.openai_models)

    @property
    def allowed_networks(self) -> Networks:
        """The networks in ``webhook_networks``."""
        return parse_networks(self.webhook_networks)

    def email_fault(self, address: str) -> str | None:
        """Why no e-mail is sent to this address; ``None`` if it is allowed."""
        if self.smtp_url is None or self.smtp_from is None:
            return "this server sends no e-mail; an operator can set ZETA_SMTP_URL and ZETA_SMTP_FROM"
        domains = self.smtp_domains or self.smtp_from.rpartition("@")[2]
        allowed = {domain.strip().lower() for domain in domains.split(",")}
        if "*" in allowed or address.rpartition("@")[2].lower() in allowed:
            return None
        return "this server sends no e-mail to this domain; an operator can add it to ZETA_SMTP_DOMAINS"

    @property
    def cross_origins(self) -> tuple[str, ...]:
        return parse_origins(self.cors_origins)

    @property
    def loopback_host(self) -> str | None:
        """The address to which requests must be addressed; ``None`` if the server or a proxy has other names."""
        has_other_names = self.behind_proxy or bool(self.trusted_networks) or not is_loopback(self.host)
        return None if has_other_names else self.host

    @property
    def project_limits(self) -> ProjectLimits:
        """The limits of a project for which none were set."""
        return ProjectLimits(
            max_queued_jobs=self.project_max_queued,
            max_running_jobs=self.project_max_running,
            max_gpus=self.project_max_gpus,
            max_stored_bytes=self.project_quota_bytes,
            max_upload_bytes=self.max_upload_bytes,
            max_requests_per_minute=self.project_requests_per_minute,
            max_priority=self.project_max_priority,
            max_streams=self.project_max_streams,
            hub=self.project_hub,
        )

    @property
    def trusted_networks(self) -> Networks:
        return parse_networks(self.trusted_proxies)

    def hub_allows(self, hub_id: str) -> bool:
        """Whether jobs may read ``owner/name`` from the Hugging Face Hub."""
        if self.hub in ("on", "off"):
            return self.hub == "on"
        return hub_id.partition("/")[0] in self.hub.split(",")
