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

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zeta.address import checked_url
from zeta.stored_login import Login, login_file, read_login
from zeta.up.home import Home
from zeta_core.contract.access import PROJECT_PATTERN
from zeta_core.contract.errors import InvalidSettings
from zeta_core.system.settings import ApiKey, Settings


class ClientSettings(Settings):
    """The client's settings, from ``ZETA_*``."""

    needs_home: ClassVar[bool] = False  # in a container, a user without a home directory can still set ZETA_URL

    url: str | None = Field(
        default=None, description="URL of the server; default: the stored login, or the `zeta up` of this machine"
    )
    api_key: ApiKey | None = Field(
        default=None, description="the API key; default: that of the stored login, or of the `zeta up` of this machine"
    )
    project: str | None = Field(
        default=None,
        pattern=PROJECT_PATTERN,
        description="the project in which an admin key acts; default: the key's project",
    )


class Target(BaseModel):
    """The server to use, and how it was found. ``is_local`` means that it is a `zeta up` on this machine.

    ``certificate`` is the server's own certificate (PEM) if it uses TLS and was found on this machine.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    api_key: str | None
    source: str
    is_local: bool = False
    certificate: str | None = None


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
        certificate = _certificate_here(Home(settings.home), address)
        return Target(url=address, api_key=settings.api_key, source="ZETA_URL", certificate=certificate)
    login = read_login(variables)
    here = _running_here(Home(settings.home)) if settings.home.is_absolute() else None
    if address is not None:
        candidates = [candidate for candidate in (here, login) if candidate is not None and candidate.url == address]
        key = next((candidate.api_key for candidate in candidates), None)
        if here is not None and here in candidates:
            return here.model_copy(update={"api_key": key, "source": "ZETA_URL"})
        return Target(url=address, api_key=key, source="ZETA_URL")
    home_is_named = bool(variables.get("ZETA_HOME", "").strip()) or home is not None
    if here is not None and (home_is_named or login is None):
        return here.model_copy(update={"api_key": settings.api_key or here.api_key})
    if login is not None:
        return Target(url=login.url, api_key=settings.api_key or login.api_key, source=str(login_file(variables)))
    return None


def _certificate_here(home: Home, url: str) -> str | None:
    """The certificate of the `zeta up` running in this home, if it has this URL and uses TLS."""
    state = home.running() if url.startswith("https://") and home.path.is_absolute() else None
    return state.certificate if state is not None and state.url == url else None


def _running_here(home: Home) -> Target | None:
    """The server of the `zeta up` running in this home, with the admin key if this user can read it."""
    state = home.running()
    if state is None or state.url is None:
        return None
    try:
        key = home.admin_key.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        key = None
    try:
        login = Login(url=checked_url(state.url, f"The url in {home.state}"), api_key=key)
    except ValidationError as error:
        raise InvalidSettings(
            f"{home.admin_key} does not contain an API key; restore it, or set ZETA_API_KEY."
        ) from error
    return Target(
        url=login.url,
        api_key=login.api_key,
        source=f"zeta up in {home.path}",
        is_local=True,
        certificate=state.certificate,
    )
