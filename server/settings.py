"""The server's settings: read once at its entry point from ``ZETA_*``, then handed on as one frozen object."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from server.http.proxies import Networks, read_networks, read_prefix
from zeta_core.contract.database_url import sqlite_url
from zeta_core.contract.settings import ApiKey, DatabaseUrl, FleetSettings, Settings

GIBIBYTE = 2**30
MIN_FREE_BYTES = 256 * 2**20


def _networks(value: str) -> str:
    read_networks(value)
    return value


class DatabaseSettings(Settings):
    """What the migrations need: where the database is."""

    database_url: DatabaseUrl | None = Field(default=None, description="unset: SQLite in the home")

    @property
    def database(self) -> str:
        """The URL of the database in use."""
        return self.database_url or sqlite_url(self.home / "zeta.db")


class ServerSettings(DatabaseSettings, FleetSettings):
    """What ``zeta server`` needs. ``api_key``, if given, is the admin key."""

    host: str = "127.0.0.1"
    port: int = Field(default=8400, ge=0, le=65535)
    root_path: Annotated[str, AfterValidator(read_prefix)] = Field(
        default="", description="the path that a reverse proxy publishes the service under, such as /zeta"
    )
    trusted_proxies: Annotated[str, AfterValidator(_networks)] = Field(
        default="", description="addresses and networks whose Forwarded and X-Forwarded-* headers count; unset: none"
    )
    api_key: ApiKey | None = None
    max_spec_bytes: int = Field(default=64 * 1024, ge=1024, le=2**24, description="the JSON body of a request")
    artifacts_take_over: str | None = Field(
        default=None, description="the id of a service whose artifact store this one takes over for good"
    )
    max_upload_bytes: int = Field(default=16 * GIBIBYTE, ge=1)
    project_quota_bytes: int | None = Field(default=None, ge=1, description="all uploads of a project; unset: no limit")
    upload_idle_seconds: float = Field(default=60, gt=0, description="an upload without a byte for so long ends")
    upload_max_seconds: float = Field(default=24 * 3600, gt=0, description="an upload that takes longer ends")
    server_min_free_bytes: int = Field(
        default=MIN_FREE_BYTES, ge=0, description="of the artifact store's and the home's disk; uploads never take it"
    )
    project_max_running: int | None = Field(
        default=None, ge=1, description="jobs of a project that run at once; the others wait; unset: no limit"
    )
    max_job_events: int = Field(
        default=200_000,
        ge=1,
        description="log, sample and progress events kept of one job; the cut is told, and all else is always kept",
    )
    check_seconds: float = Field(default=30, gt=0, description="what a worker gets to look at a spec for validation")
    claim_seconds: float = Field(default=10, gt=0, description="a hand-over that is not claimed by then is made again")

    @property
    def trusted_networks(self) -> Networks:
        return read_networks(self.trusted_proxies)

    def hub_allows(self, hub_id: str) -> bool:
        """Whether jobs may read ``owner/name`` from the Hugging Face Hub."""
        if self.hub in ("on", "off"):
            return self.hub == "on"
        return hub_id.partition("/")[0] in self.hub.split(",")
