"""An artifact store belongs to one service, which ``service.json`` in it names; another service refuses to start.

A restored backup or a clone that is pointed at production's store would otherwise write into the folders of
production's jobs, because their ids are the same. A store inside this service's own home is taken over without asking.

All functions block; call them in a thread.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from server.settings import ServerSettings
from zeta_core.contract.errors import InvalidSettings

OWNER_FILE = "service.json"

logger = logging.getLogger(__name__)


class StoreOwner(BaseModel):
    """``service.json``: the service that writes into this store, and where it last started."""

    model_config = ConfigDict(frozen=True, extra="allow")

    service: str
    host: str
    home: str


def own_store(settings: ServerSettings, service: str) -> None:
    """Make this service the owner of a store that has none. Raises `InvalidSettings` where it is another's."""
    root = settings.artifacts
    file = root / OWNER_FILE
    owner = _read(file)
    if owner is not None and owner.service == service:
        return
    if owner is not None and not _is_in(root, settings.home) and settings.artifacts_take_over != owner.service:
        raise InvalidSettings(
            f"ZETA_ARTIFACTS_URL is {str(root)!r}, which belongs to the service {owner.service} (last started on "
            f"{owner.host} in {owner.home}), and the database of this one ({service}) is another or a copy; give this "
            "service a store of its own, or, if it replaces that one for good, start it once with "
            f"ZETA_ARTIFACTS_TAKE_OVER={owner.service}.",
            param="ZETA_ARTIFACTS_URL",
            code="store_taken",
        )
    if owner is not None:
        logger.warning(
            "The artifact store %s belonged to %s and belongs to this service (%s) now.",
            root,
            owner.service,
            service,
            extra={"action": "store_taken_over"},
        )
    present = StoreOwner(service=service, host=socket.gethostname(), home=str(settings.home))
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(present.model_dump_json(indent=2) + "\n")
        temporary.replace(file)
    except OSError as error:
        raise InvalidSettings(
            f"ZETA_ARTIFACTS_URL is {str(root)!r}, which cannot be written: {error.strerror}.",
            param="ZETA_ARTIFACTS_URL",
        ) from error


def _read(file: Path) -> StoreOwner | None:
    try:
        return StoreOwner.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise InvalidSettings(
            f"{file} says which service the artifact store belongs to, and cannot be read ({type(error).__name__}); "
            "restore it, or remove it if no other service uses this store.",
            param="ZETA_ARTIFACTS_URL",
        ) from error


def _is_in(root: Path, home: Path) -> bool:
    """Whether the store really lies in the home: a link out of it, which is copied with the home, does not."""
    return root.resolve().is_relative_to(home.resolve())
