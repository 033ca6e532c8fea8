"""Reading ``ZETA_*`` settings: each process reads them once, at its entry point, into one frozen object.

The server, the worker, `zeta up` and the client each have their own subclass of `Settings`. Fields have no prefix:
``redis_url`` is ``ZETA_REDIS_URL``. Every secret can also be read from a file: ``ZETA_API_KEY_FILE`` is the path of a
file whose first line is the key. Nothing is read at import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from zeta_core.contract.errors import InvalidSettings
from zeta_core.system.artifact_location import BucketLocation, parse_location
from zeta_core.system.database_url import DatabaseAddress
from zeta_core.system.redis_access import RedisAddress

PREFIX = "ZETA_"
LEASE_SECONDS = 120.0
_OWNER = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_MAX_SECRET_BYTES = 65_536
_KEY = re.compile(r"[!-~]+\Z")


def _api_key(value: str) -> str:
    if not _KEY.match(value):
        raise ValueError("it must be printable ASCII without spaces, as an HTTP header carries it")
    return value


def _redis_url(value: str) -> str:
    RedisAddress.parse(value)
    return value


def _database_url(value: str) -> str:
    DatabaseAddress.parse(value)
    return value


def process_environment() -> dict[str, str]:
    """A copy of this process's environment variables, for settings and child processes."""
    return dict(os.environ)


ApiKey = Annotated[str, AfterValidator(_api_key)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
DatabaseUrl = Annotated[str, AfterValidator(_database_url)]


class Settings(BaseModel):
    """The settings that every process has."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    secrets: ClassVar[frozenset[str]] = frozenset({"api_key", "worker_secret", "redis_url", "database_url"})
    needs_home: ClassVar[bool] = True  # if False, ``home`` may stay relative for a user without a home directory

    home: Path = Field(
        default=Path("~/.zeta"),
        description="folder for all local data. A worker in a container needs a persistent volume here: a restarted "
        "worker then adopts or returns its jobs at once, and otherwise they wait until the lease expires",
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **overrides: object) -> Self:
        """Read this class's settings. An override, such as a command's option, takes precedence unless it is ``None``.

        Raises `InvalidSettings` with the variable, its value and what is allowed. An empty variable counts as unset.
        """
        values: dict[str, Any] = {}
        for name in cls.model_fields:
            variable = PREFIX + name.upper()
            value = environment.get(variable, "").strip()
            file = environment.get(f"{variable}_FILE", "").strip()
            if file and name in cls.secrets:
                if value:
                    raise InvalidSettings(f"{variable} and {variable}_FILE are both set; unset one of them.")
                value = _first_line(variable, Path(file))
            if value:
                values[name] = value
        values.update({name: value for name, value in overrides.items() if value is not None})
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            variable = PREFIX + str(first["loc"][0]).upper() if first["loc"] else PREFIX + "*"
            if first["type"] == "missing":
                raise InvalidSettings(f"{variable} is not set; set it, or {variable}_FILE.", param=variable) from error
            # An error without a field has all values as its input, including the secrets.
            is_secret = not first["loc"] or str(first["loc"][0]) in cls.secrets
            shown = "(hidden)" if is_secret else repr(first["input"])
            reason = first["msg"].removeprefix("Value error, ").removesuffix(".")
            raise InvalidSettings(f"{variable} is {shown}: {reason}.", param=variable) from error
        return settings.model_copy(update={"home": cls._absolute(settings.home)})

    @classmethod
    def _absolute(cls, home: Path) -> Path:
        try:
            return home.expanduser().absolute()
        except RuntimeError as error:
            if not cls.needs_home:
                return home
            raise InvalidSettings(
                f"ZETA_HOME is {str(home)!r}, and this user has no such home directory; "
                "set ZETA_HOME to an absolute path, or set HOME.",
                param="ZETA_HOME",
            ) from error
        except OSError as error:  # a relative path in a working directory that was removed
            raise InvalidSettings(
                f"ZETA_HOME is {str(home)!r}, and the working directory does not exist ({error.strerror}); "
                "set ZETA_HOME to an absolute path.",
                param="ZETA_HOME",
            ) from error

    def masked(self) -> dict[str, str]:
        """The effective settings for display, with ``***`` for every secret."""
        return {
            PREFIX + name.upper(): "***" if name in self.secrets and value else _shown(value)
            for name, value in self.model_dump().items()
        }


def _shown(value: object) -> str:
    """A value as the variable would contain it; empty for an unset one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)


def _three_quarters_of_the_lease(known: dict[str, Any]) -> float:
    """90 s of 120: a worker cut off from the server stops its runs early enough to save a checkpoint."""
    return 0.75 * known.get("lease_seconds", LEASE_SECONDS)


class StoreSettings(Settings):
    """The location of the artifact store."""

    artifacts_url: str | None = Field(
        default=None,
        description="the artifact store: a folder that the server and all workers share, or `s3://bucket/prefix`; "
        "default: a folder in ZETA_HOME",
    )
    s3_checksums: Literal["when_supported", "when_required"] = Field(
        default="when_supported",
        description="`when_required`: for a store that does not support the checksums of S3",
    )

    @field_validator("artifacts_url")
    @classmethod
    def _artifacts_url(cls, value: str | None) -> str | None:
        if value is not None:
            parse_location(value)
        return value

    @property
    def artifacts_location(self) -> Path | BucketLocation:
        """The artifact store: a folder, or a bucket."""
        return parse_location(self.artifacts_url) if self.artifacts_url else self.home / "artifacts"

    @property
    def artifacts(self) -> Path:
        """The folder in which programs on this machine read artifacts: the store, or the copies of objects."""
        location = self.artifacts_location
        return location if isinstance(location, Path) else self.home / "artifact-copies"


class FleetSettings(StoreSettings):
    """The settings that the server and all workers must share: connections, the data that jobs may read, and the lease.

    A worker that is cut off cannot know whether Redis is down or only its own connection. After ``self_stop_seconds``,
    its runs save and exit; they have exited by `end_seconds`, before the server starts them elsewhere at
    ``lease_seconds``.
    """

    redis_url: RedisUrl = Field(
        default="redis://127.0.0.1:6379/0",
        description="`redis://`, `rediss://` (with `ssl_ca_certs=`, `ssl_certfile=`, `ssl_keyfile=`, `ssl_cert_reqs=`, "
        "`ssl_check_hostname=`), `unix:///path/redis.sock`, or with Sentinel "
        "`redis+sentinel://HOST:PORT,HOST:PORT/0?master=NAME` (with `sentinel_username=`, `sentinel_password=`); "
        "select a database with `/5` or `?db=5`; percent-encode special characters in the password",
    )
    worker_secret: str = Field(
        min_length=1,
        description="the secret from which the keys are derived that sign all messages between the server and its "
        "workers. A worker may instead have the one that `zeta workers add` printed, which contains its name",
    )
    data_root: Path | None = Field(
        default=None,
        description='folder for `{"path": ...}` in specs; if it is unset on the server and on all workers, such specs '
        "are rejected; default: none",
    )
    hub: str = Field(
        default="off",
        description="access to the Hugging Face Hub: `on`, `off`, or the allowed owners, separated by commas",
    )
    lease_seconds: float = Field(
        default=LEASE_SECONDS,
        gt=0,
        allow_inf_nan=False,
        description="a worker that is silent for this long loses its jobs",
    )
    self_stop_seconds: float = Field(
        default_factory=_three_quarters_of_the_lease,
        gt=0,
        description="a run that is cut off from the server for this long saves and exits; default: 3/4 of the lease",
    )

    @field_validator("self_stop_seconds")
    @classmethod
    def _before_the_lease(cls, value: float, known: ValidationInfo) -> float:
        lease = known.data.get("lease_seconds")
        if lease is not None and value >= lease:
            raise ValueError(
                f"it must be less than ZETA_LEASE_SECONDS ({lease:g}), because a run has to end before the server "
                "starts it elsewhere"
            )
        return value

    @property
    def end_seconds(self) -> float:
        """When a run that is cut off is killed, even while it saves: shortly before the lease ends."""
        return self.lease_seconds - 0.1 * (self.lease_seconds - self.self_stop_seconds)

    @field_validator("hub")
    @classmethod
    def _hub(cls, value: str) -> str:
        if not all(_OWNER.match(owner) for owner in value.replace(" ", "").split(",")):
            raise ValueError("it must be 'on', 'off', or Hub owners such as 'EleutherAI,HuggingFaceTB'")
        return value.replace(" ", "")


def _first_line(variable: str, file: Path) -> str:
    try:
        with file.open("rb") as stream:  # limited, because a device such as /dev/zero is endless
            lines = stream.readline(_MAX_SECRET_BYTES).decode("utf-8-sig").splitlines()  # Windows editors write a BOM
    except OSError as error:
        raise InvalidSettings(
            f"{variable}_FILE is {str(file)!r}, which cannot be read: {error.strerror}; "
            "correct the path, or the permissions of the file."
        ) from error
    except ValueError as error:  # not UTF-8, or a NUL in the name
        raise InvalidSettings(f"{variable}_FILE is {str(file)!r}, which is not a UTF-8 text file.") from error
    if not lines or not lines[0].strip("\0").strip():
        raise InvalidSettings(f"{variable}_FILE is {str(file)!r}, which is empty; put the secret on its first line.")
    return lines[0].strip()
