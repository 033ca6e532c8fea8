"""Finding the server: from the environment, a stored login, or a `zeta up` on this machine.

The first of these sources that exists is used:

1. ``ZETA_URL``, with the key in ``ZETA_API_KEY``, or else the key that 2 or 3 has for exactly this URL;
2. the server of `zeta up`, if ``ZETA_HOME`` is set explicitly and a server runs there;
3. the login that `zeta login URL` stored;
4. the server of `zeta up` in the default home.

A key is sent only to the URL that it was stored for. An ``up.json`` whose `zeta up` has ended is ignored, because
another user's program may listen on its port now.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from zeta.address import checked_url
from zeta.up.home import Home
from zeta_core.contract.errors import InvalidSettings
from zeta_core.system.settings import ApiKey, Settings


def environment() -> dict[str, str]:
    """This process's environment variables, for settings and child processes."""
    return dict(os.environ)


class ClientSettings(Settings):
    """The client's settings, from ``ZETA_*``."""

    needs_home: ClassVar[bool] = False  # in a container, a user without a home directory can still set ZETA_URL

    url: str | None = None
    api_key: ApiKey | None = None


class Login(BaseModel):
    """The login that `zeta login` stored."""

    model_config = ConfigDict(frozen=True)

    url: str
    api_key: ApiKey | None = None


class Target(BaseModel):
    """The server to use, and how it was found. ``is_local`` means that it is a `zeta up` on this machine."""

    model_config = ConfigDict(frozen=True)

    url: str
    api_key: str | None
    source: str
    is_local: bool = False


def find_server(
    variables: Mapping[str, str], *, url: str | None = None, api_key: str | None = None, home: Path | None = None
) -> Target | None:
    """The server and key to use, in the order at the top of this file, or ``None`` if none is configured.

    The keyword arguments override the settings of the same names. Raises `InvalidSettings` if a setting is invalid.
    """
    given_key = None if api_key is None else api_key.strip()
    settings = ClientSettings.from_environment(variables, url=url, api_key=given_key, home=home)
    address = None if settings.url is None else checked_url(settings.url, "ZETA_URL")
    if address is not None and settings.api_key is not None:
        return Target(url=address, api_key=settings.api_key, source="ZETA_URL")
    login = read_login(variables)
    here = _running_here(Home(settings.home)) if settings.home.is_absolute() else None
    if address is not None:
        known = [candidate for candidate in (here, login) if candidate is not None and candidate.url == address]
        key = next((candidate.api_key for candidate in known), None)
        return Target(url=address, api_key=key, source="ZETA_URL", is_local=here is not None and here in known)
    home_is_named = bool(variables.get("ZETA_HOME", "").strip()) or home is not None
    if here is not None and (home_is_named or login is None):
        key = settings.api_key or here.api_key
        return Target(url=here.url, api_key=key, source=f"zeta up in {settings.home}", is_local=True)
    if login is not None:
        return Target(url=login.url, api_key=settings.api_key or login.api_key, source=str(login_file(variables)))
    return None


# --- A stored login ---------------------------------------------------------------------------------------------------


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
        descriptor, aside = tempfile.mkstemp(dir=file.parent)  # mode 0600 from the start
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(login.model_dump_json())
            Path(aside).replace(file)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(aside).unlink()
    except OSError as error:
        raise InvalidSettings(
            f"The login cannot be stored in {file}: {error.strerror}; set XDG_CONFIG_HOME to a folder that you can "
            "write to, or use ZETA_URL and ZETA_API_KEY instead."
        ) from error
    return file


def forget_login(variables: Mapping[str, str]) -> bool:
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


def _running_here(home: Home) -> Login | None:
    """The server of the `zeta up` running in this home, with the admin key if this user can read it."""
    state = home.running()
    if state is None or state.url is None:
        return None
    try:
        key = home.admin_key.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        key = None
    try:
        return Login(url=checked_url(state.url, f"The url in {home.state}"), api_key=key)
    except ValidationError as error:
        raise InvalidSettings(
            f"{home.admin_key} does not contain an API key; restore it, or set ZETA_API_KEY."
        ) from error
