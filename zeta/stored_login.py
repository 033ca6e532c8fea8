"""The login that `zeta login URL` stores for this user: the server's URL and the API key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from zeta.address import checked_url
from zeta_core.contract.errors import InvalidSettings
from zeta_core.system.durable_files import write_private_durably
from zeta_core.system.settings import ApiKey


class Login(BaseModel):
    """The login that `zeta login` stored."""

    model_config = ConfigDict(frozen=True)

    url: str
    api_key: ApiKey | None = None


def login_file(variables: Mapping[str, str]) -> Path | None:
    """``login.json`` in the user's configuration folder, or ``None`` if the user has no home directory."""
    if variables.get("XDG_CONFIG_HOME"):
        return Path(variables["XDG_CONFIG_HOME"]) / "zeta" / "login.json"
    try:
        home = Path(variables.get("HOME") or Path.home())
    except RuntimeError:
        return None
    folder = home / "Library" / "Application Support" if sys.platform == "darwin" else home / ".config"
    return folder / "zeta" / "login.json"


def read_login(variables: Mapping[str, str]) -> Login | None:
    """The stored login, if there is one. Raises `InvalidSettings` if the file cannot be read or is invalid."""
    file = login_file(variables)
    if file is None:
        return None
    try:
        login = Login.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InvalidSettings(
            f"The stored login {file} cannot be read: {error.strerror}; fix its permissions, or remove it."
        ) from error
    except ValidationError as error:
        raise InvalidSettings(
            f"{file} does not contain a login written by `zeta login`; remove it and run `zeta login URL` again."
        ) from error
    return login.model_copy(update={"url": checked_url(login.url, f"The url in {file}")})


def store_login(variables: Mapping[str, str], login: Login) -> Path:
    """Store a login in a file that only this user can read, replacing an earlier one atomically.

    Raises `InvalidSettings` if it cannot be written.
    """
    file = _required_login_file(variables)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private_durably(file, login.model_dump_json())
    except OSError as error:
        raise InvalidSettings(
            f"The login cannot be stored in {file}: {error.strerror}; set XDG_CONFIG_HOME to a folder that you can "
            "write to, or use ZETA_URL and ZETA_API_KEY instead."
        ) from error
    return file


def remove_login(variables: Mapping[str, str]) -> bool:
    """Remove the stored login, and return whether there was one. Raises `InvalidSettings` if that fails."""
    file = _required_login_file(variables)
    try:
        file.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InvalidSettings(f"The stored login {file} cannot be removed: {error.strerror}.") from error
    return True


def _required_login_file(variables: Mapping[str, str]) -> Path:
    file = login_file(variables)
    if file is None:
        raise InvalidSettings(
            "The login cannot be stored because this user has no home directory; set HOME or XDG_CONFIG_HOME, "
            "or use ZETA_URL and ZETA_API_KEY."
        )
    return file
