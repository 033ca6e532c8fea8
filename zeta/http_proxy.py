"""Choosing the proxy for a server from the environment: ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``.

Only the variable that applies to the server is validated, so an invalid value in another one is harmless. This machine
is always reached directly. ``NO_PROXY`` accepts the syntax of curl, Go and Python, because users copy it between tools:
https://curl.se/docs/manpage.html (NO_PROXY), https://pkg.go.dev/golang.org/x/net/http/httpproxy.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import re
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import quote

import httpx

from zeta.address import IpAddress, is_this_machine, parse_host_port, parse_ip, without_password
from zeta_core.contract.errors import InvalidSettings

_SCHEMES = {"http": "http", "https": "https", "socks5": "socks5", "socks5h": "socks5", "socks": "socks5"}
_DEFAULT_PORTS = {"http": 80, "https": 443}
_USER_CHARACTERS = "%:!$&'()*+,;=-._~"  # allowed in user and password; others are percent-encoded here if users did not


@dataclass(frozen=True)
class Proxy:
    """A proxy, and the environment variable that names it."""

    variable: str
    url: str

    def __str__(self) -> str:
        return without_password(self.url)


def choose_proxy(server_url: str, variables: Mapping[str, str]) -> Proxy | None:
    """The proxy for the server, or ``None`` for a direct connection.

    Raises `InvalidSettings` if a proxy applies but the client cannot use it.
    """
    url = httpx.URL(server_url)
    if is_this_machine(url.host):
        return None
    variable = _variable(variables, f"{url.scheme}_proxy") or _variable(variables, "all_proxy")
    if variable is None:
        return _system_proxy(url)
    _, no_proxy = _variable(variables, "no_proxy") or ("", "")
    if _is_excluded(url, no_proxy):
        return None
    return _usable(*variable, host=url.host)


def _variable(variables: Mapping[str, str], name: str) -> tuple[str, str] | None:
    """The variable's name as spelled in the environment, and its value. Lower case takes precedence, even if empty."""
    for spelling in (name, *sorted(other for other in variables if other.lower() == name and other != name)):
        if spelling in variables:
            value = variables[spelling].strip()
            return (spelling, value) if value else None
    return None


def _usable(variable: str, value: str, *, host: str) -> Proxy:
    def invalid(reason: str) -> InvalidSettings:
        return InvalidSettings(
            f"{variable} is {without_password(value)!r}: {reason}; correct it, "
            f"or add {host} to NO_PROXY to connect directly.",
            param=variable,
            code="invalid_proxy",
        )

    scheme, separator, rest = value.partition("://")
    if not separator:
        scheme, rest = "http", value
        if ":/" in value:
            raise invalid("a scheme must be followed by ://")
    used = _SCHEMES.get(scheme.lower())
    if used is None:
        raise invalid("only http://, https:// and socks5:// proxies are supported")  # the scheme may be a password
    if used == "socks5" and importlib.util.find_spec("socksio") is None:
        raise invalid(f"a {scheme}:// proxy needs the package socksio (pip install socksio), or use an http:// proxy")
    user, at, address = rest.rpartition("@")
    try:
        checked = parse_host_port(re.split(r"[/?#]", address, maxsplit=1)[0])
    except ValueError as error:
        raise invalid(str(error)) from None
    return Proxy(variable, f"{used}://{quote(user, safe=_USER_CHARACTERS)}{at}{checked}")


def _system_proxy(url: httpx.URL) -> Proxy | None:
    """The proxy in the system preferences (macOS only)."""
    if sys.platform != "darwin":
        return None
    value = urllib.request.getproxies_macosx_sysconf().get(url.scheme)
    if not value or urllib.request.proxy_bypass_macosx_sysconf(url.host):
        return None
    return _usable("The system's proxy", value, host=url.host)


def _is_excluded(url: httpx.URL, no_proxy: str) -> bool:
    """Whether ``NO_PROXY`` includes the server. Invalid entries are skipped."""
    host = url.raw_host.decode().rstrip(".").lower()
    address = parse_ip(host)
    port = url.port or _DEFAULT_PORTS[url.scheme]
    return any(_matches(entry, host, address, port) for entry in re.split(r"[\s,;]+", no_proxy.strip()) if entry)


def _matches(entry: str, host: str, address: IpAddress | None, port: int) -> bool:
    entry = entry.lower().rpartition("://")[2]
    if entry == "*":
        return True
    if "/" in entry:
        return address is not None and _is_in_network(address, entry)
    # A single colon separates a port. Several colons are an IPv6 address, which can have a port only after brackets.
    if entry.startswith("[") or entry.count(":") == 1:
        entry, _, wanted_port = entry.rpartition(":") if not entry.endswith("]") else (entry, "", "")
        if wanted_port and wanted_port != str(port):
            return False
    entry_address = parse_ip(entry)
    if entry_address is not None or address is not None:
        return entry_address == address or ("*" in entry and fnmatchcase(host, entry))
    name = _ascii(entry.rstrip(".").removeprefix("*").removeprefix("."))
    if "*" in name:
        return fnmatchcase(host, name)
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _is_in_network(address: IpAddress, entry: str) -> bool:
    try:
        network = ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
    except ValueError:  # a URL with a path, for example
        return parse_ip(entry.partition("/")[0]) == address
    return address in network


def _ascii(name: str) -> str:
    if name.isascii():
        return name
    try:
        return httpx.URL(f"http://{name}").raw_host.decode()
    except (httpx.InvalidURL, UnicodeError):
        return name
