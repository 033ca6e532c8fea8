"""Assigns an artifact store to one service, recorded in its ``service.json``; other services refuse to start on it.

Otherwise a restored backup or a clone that uses production's store would write into the folders of production's jobs,
because the job ids are the same. A store inside this service's own home is taken over automatically.

All functions block; call them in a thread.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from server.settings import ServerSettings
from zeta_core.contract.errors import InvalidSettings
from zeta_core.system.artifact_store import ArtifactStore

OWNER_KEY = PurePosixPath("service.json")
RESTORE_KEY = PurePosixPath("restore.json")  # while a backup is being restored: the SHA-256 of its database

logger = logging.getLogger(__name__)


class StoreOwner(BaseModel):
    """``service.json``: the service that owns this store, and where it was last started."""

    model_config = ConfigDict(frozen=True, extra="allow")

    service: str
    host: str
    home: str


def claim_store(settings: ServerSettings, store: ArtifactStore, service: str) -> None:
    """Make this service the owner of a store that has none. Raises `InvalidSettings` if another service owns it."""
    owner = _read(store)
    if owner is not None and owner.service == service:
        return
    if owner is not None and not _is_store_in_home(settings) and settings.artifacts_take_over != owner.service:
        raise InvalidSettings(
            f"ZETA_ARTIFACTS_URL is {str(store)!r}, which belongs to service {owner.service} (last started on "
            f"{owner.host} in {owner.home}). This service ({service}) has a different database, or a copy of that one. "
            "Give it its own store, or, if it replaces the other service permanently, start it once with "
            f"ZETA_ARTIFACTS_TAKE_OVER={owner.service}.",
            param="ZETA_ARTIFACTS_URL",
            code="store_taken",
        )
    if owner is not None:
        logger.warning(
            "Took over the artifact store %s from service %s; its owner is now this service (%s).",
            store,
            owner.service,
            service,
            extra={"action": "store_taken_over"},
        )
    new_owner = StoreOwner(service=service, host=socket.gethostname(), home=str(settings.home))
    try:
        store.write(OWNER_KEY, f"{new_owner.model_dump_json(indent=2)}\n".encode(), replace=owner is not None)
        if store.size(RESTORE_KEY) is not None:  # a restore was killed at its end, when the database was complete
            store.remove(RESTORE_KEY)
    except FileExistsError:  # another server has claimed it in the meantime
        claim_store(settings, store, service)
    except OSError as error:
        raise InvalidSettings(
            f"ZETA_ARTIFACTS_URL is {str(store)!r}, which cannot be written ({error.strerror}); make it writable, or "
            "use another one.",
            param="ZETA_ARTIFACTS_URL",
        ) from error


def require_owner(store: ArtifactStore, service: str | None) -> None:
    """Raise `InvalidSettings` unless this service owns the store."""
    owner = _read(store)
    if owner is None:
        raise InvalidSettings(
            f"ZETA_ARTIFACTS_URL is {str(store)!r}, which has no {OWNER_KEY}; it is not mounted, or no server has "
            "used it yet.",
            param="ZETA_ARTIFACTS_URL",
        )
    if owner.service != service:
        raise InvalidSettings(
            f"ZETA_ARTIFACTS_URL is {str(store)!r}, which belongs to service {owner.service}, and the database is that "
            f"of {service or 'a service that has not started yet'}; set ZETA_ARTIFACTS_URL and ZETA_DATABASE_URL to "
            "the values of the server.",
            param="ZETA_ARTIFACTS_URL",
            code="store_taken",
        )


def _read(store: ArtifactStore) -> StoreOwner | None:
    try:
        with store.open(OWNER_KEY) as file:
            return StoreOwner.model_validate_json(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise InvalidSettings(
            f"Cannot read {OWNER_KEY} in the artifact store {store} ({type(error).__name__}), which names its owner; "
            "restore it, or remove it if no other service uses this store.",
            param="ZETA_ARTIFACTS_URL",
        ) from error


def _is_store_in_home(settings: ServerSettings) -> bool:
    """Whether the store is inside the home. A link to a store elsewhere doesn't count: copies of the home share it."""
    root, home = settings.artifacts_location, settings.home
    return isinstance(root, Path) and root.resolve().is_relative_to(home.resolve())
