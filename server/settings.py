"""The server's settings: read once at its entry point from ``ZETA_*``, then handed on as one frozen object."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator

from zeta_core.contract.settings import Settings, store_folder

GIBIBYTE = 2**30
_OWNER = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class DatabaseSettings(Settings):
    """What the migrations need: where the database is."""

    database_url: str | None = Field(default=None, description="unset: SQLite in the home")

    @property
    def database(self) -> str:
        """The URL of the database in use."""
        return self.database_url or f"sqlite:///{self.home / 'zeta.db'}"


class ServerSettings(DatabaseSettings):
    """What ``zeta server`` needs. ``api_key``, if given, is the admin key; ``worker_secret`` signs every message."""

    host: str = "127.0.0.1"
    port: int = Field(default=8400, ge=0, le=65535)
    redis_url: str = "redis://127.0.0.1:6379/0"
    artifacts_url: str | None = Field(default=None, description="unset: a folder in the home")
    data_root: Path | None = Field(default=None, description="the folder that {'path': ...} may name; unset: none")
    api_key: str | None = Field(default=None, min_length=1)
    worker_secret: str = Field(min_length=1)
    hub: str = Field(default="off", description="on, off, or the allowed owners with commas between them")
    max_upload_bytes: int = Field(default=16 * GIBIBYTE, ge=1)
    claim_seconds: float = Field(default=10, gt=0, description="a hand-over that is not claimed by then is made again")
    lease_seconds: float = Field(default=120, gt=0, description="a worker silent for longer has lost its jobs")

    @field_validator("hub")
    @classmethod
    def _hub(cls, value: str) -> str:
        if not all(_OWNER.match(owner) for owner in value.replace(" ", "").split(",")):
            raise ValueError("it must be 'on', 'off', or owners of the Hub such as 'EleutherAI,HuggingFaceTB'")
        return value.replace(" ", "")

    @field_validator("artifacts_url")
    @classmethod
    def _artifacts_url(cls, value: str | None) -> str | None:
        if value is not None:
            store_folder(value)
        return value

    @property
    def artifacts(self) -> Path:
        """The artifact store's folder."""
        return store_folder(self.artifacts_url) if self.artifacts_url else self.home / "artifacts"

    def hub_allows(self, hub_id: str) -> bool:
        """Whether jobs may read ``owner/name`` from the Hugging Face Hub."""
        if self.hub in ("on", "off"):
            return self.hub == "on"
        return hub_id.partition("/")[0] in self.hub.split(",")
