"""Where the client finds its server: from the environment, a stored login, or the `zeta up` of this machine.

The first of these that is there decides, and nothing is guessed beyond them:

1. ``ZETA_URL`` (its key is ``ZETA_API_KEY``, or what 2 and 3 know for the very same URL);
2. the server of `zeta up`, where ``ZETA_HOME`` is set by name and one runs there;
3. what `zeta login URL` stored;
4. the server of `zeta up` in the default home.

A key is never sent to a URL that it was not stored for, and an ``up.json`` whose `zeta up` has ended is not believed:
its port may belong to somebody else by now.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from zeta.up.home import Home
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.settings import ApiKey, Settings


def environment() -> dict[str, str]:
    """This process's environment, for settings and for the environments of child processes."""
    return dict(os.environ)


class ClientSettings(Settings):
    """What ``ZETA_*`` tells a client."""

    url: str | None = None
    api_key: ApiKey | None = None


class Login(BaseModel):
    """What `zeta login` stored."""

    model_config = ConfigDict(frozen=True)

    url: str
    api_key: str | None = None


class Target(BaseModel):
    """The server that a client talks to, and from where that is known."""

    model_config = ConfigDict(frozen=True)

    url: str
    api_key: str | None
    source: str


def find_server(variables: Mapping[str, str], **overrides: object) -> Target | None:
    """The server and key to use, by the order at the top of this file; ``None`` where nothing names one."""
    settings = ClientSettings.from_environment(variables, **overrides)
    if settings.url is not None and settings.api_key is not None:
        return Target(url=checked_url(settings.url, "ZETA_URL"), api_key=settings.api_key, source="ZETA_URL")
    login = read_login(variables)
    here = _running_here(Home(settings.home))
    if settings.url is not None:
        url = checked_url(settings.url, "ZETA_URL")
        known = [candidate for candidate in (here, login) if candidate is not None and candidate.url == url]
        key = next((candidate.api_key for candidate in known), None)
        return Target(url=url, api_key=key, source="ZETA_URL")
    home_is_named = bool(variables.get("ZETA_HOME", "").strip()) or overrides.get("home") is not None
    if here is not None and (home_is_named or login is None):
        return Target(url=here.url, api_key=settings.api_key or here.api_key, source=f"zeta up in {settings.home}")
    if login is not None:
        return Target(url=login.url, api_key=settings.api_key or login.api_key, source=str(login_file(variables)))
    return None


def checked_url(url: str, name: str) -> str:
    """The URL without a trailing slash. Raises `InvalidSettings` where it is none."""
    stripped = url.strip().rstrip("/")
    scheme, separator, rest = stripped.partition("://")
    if scheme not in ("http", "https") or not separator or not rest or any(sign.isspace() for sign in rest):
        raise InvalidSettings(f"{name} is {url!r}, which is no URL; give one such as http://127.0.0.1:8400.")
    return stripped


# --- A stored login ---------------------------------------------------------------------------------------------------


def login_file(variables: Mapping[str, str]) -> Path:
    """``login.json`` in the user's own configuration folder."""
    home = Path(variables.get("HOME") or Path.home())
    if variables.get("XDG_CONFIG_HOME"):
        folder = Path(variables["XDG_CONFIG_HOME"])
    elif sys.platform == "darwin":
        folder = home / "Library" / "Application Support"
    else:
        folder = home / ".config"
    return folder / "zeta" / "login.json"


def read_login(variables: Mapping[str, str]) -> Login | None:
    """The stored login, if there is one. Raises `InvalidSettings` where the file is not what we wrote."""
    file = login_file(variables)
    try:
        return Login.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise InvalidSettings(f"{file} cannot be read as a login; remove it and run `zeta login` again.") from error


def store_login(variables: Mapping[str, str], login: Login) -> Path:
    """Store a login, readable by this user alone; an earlier one is replaced whole or not at all."""
    file = login_file(variables)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, aside = tempfile.mkstemp(dir=file.parent)  # mode 0600 from the start
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(login.model_dump_json())
        Path(aside).replace(file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(aside).unlink()
    return file


def forget_login(variables: Mapping[str, str]) -> bool:
    """Remove the stored login; whether there was one."""
    file = login_file(variables)
    existed = file.exists()
    file.unlink(missing_ok=True)
    return existed


def _running_here(home: Home) -> Login | None:
    """The server of the `zeta up` that runs in this home now, with the admin key if this user may read it."""
    state = home.running()
    if state is None or state.url is None:
        return None
    try:
        key = home.admin_key.read_text().strip() or None
    except OSError:
        key = None
    return Login(url=state.url, api_key=key)
