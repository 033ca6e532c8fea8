"""Parsing and validating server and proxy addresses, and recognizing addresses of this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

import httpx

from zeta_core.contract.errors import InvalidSettings

_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_AUTHORITY = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>[^:]*))?")
_DIGITS_AND_DOTS = re.compile(r"[0-9.]+")
_CREDENTIALS = re.compile(r"(?P<scheme>\s*[A-Za-z][A-Za-z0-9+.-]*:/+)?.*@", re.DOTALL)

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class HostPort:
    """The host and port of a URL. ``host`` is in URL form: an IPv6 address is in brackets."""

    host: str
    port: int | None

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


def checked_url(text: str, name: str) -> str:
    """The URL in normalized form, without a trailing slash.

    Raises `InvalidSettings` with the name of the setting, its value and the reason.
    """

    def invalid(reason: str) -> InvalidSettings:
        return InvalidSettings(
            f"{name} is {without_password(text)!r}: {reason}; give a URL such as http://127.0.0.1:8400.",
            param=name,
            code="invalid_url",
        )

    scheme, separator, rest = text.strip().partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        raise invalid("it must start with http:// or https://")
    if any(sign.isspace() or not sign.isprintable() for sign in rest):
        raise invalid("it contains a space or a control character")
    if "?" in rest or "#" in rest or "\\" in rest:
        raise invalid("it may contain only a host, a port and a path")
    if "@" in rest:
        raise invalid("it contains a user name; set the key in ZETA_API_KEY")
    authority, slash, path = rest.partition("/")
    try:
        host_port = parse_host_port(authority)
    except ValueError as error:
        raise invalid(str(error)) from None
    return f"{scheme.lower()}://{host_port}{slash}{path}".rstrip("/")


def without_password(url: str) -> str:
    """The URL for display, with ``***`` for its user name and password. The scheme may be missing.

    Everything up to the last ``@`` is masked, because an unquoted password may contain any character.
    """
    return _CREDENTIALS.sub(lambda match: f"{match['scheme'] or ''}***@", url, count=1)


def parse_host_port(text: str) -> HostPort:
    """Parse ``host``, ``host:port`` or ``[ipv6]:port``. Raises `ValueError` with the reason."""
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a host, or host:port (an IPv6 address needs brackets)")
    port = match["port"]
    if port and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"the port {port!r} is not a number from 1 to 65535")
    return HostPort(_checked_host(match["host"]), int(port) if port else None)


def parse_ip(host: str) -> IpAddress | None:
    """The host as an IP address (brackets and a zone are allowed), or ``None`` if it is a name."""
    plain = host.strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(plain)
    except ValueError:
        if not _DIGITS_AND_DOTS.fullmatch(plain):
            return None
        try:  # resolvers also accept short forms such as 127.1
            return ipaddress.IPv4Address(socket.inet_aton(plain))
        except OSError:
            return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_this_machine(host: str) -> bool:
    """Whether a host is this machine: loopback, its host name, or one of its addresses. Does not resolve names."""
    name = host.rstrip(".").lower()
    own = socket.gethostname().rstrip(".").lower()
    if name in ("localhost", own, own.partition(".")[0]) or name.endswith(".localhost"):
        return True
    address = parse_ip(name)
    if address is None:
        return False
    return address.is_loopback or address.is_unspecified or _is_own_address(address)


def _is_own_address(address: IpAddress) -> bool:
    """Whether the address belongs to this machine, found by binding a UDP socket to it (no packet is sent)."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return not address.is_multicast


def _checked_host(host: str) -> str:
    if not host:
        raise ValueError("it has no host")
    if host.startswith("["):
        address, _, zone = host[1:-1].partition("%")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            raise ValueError(f"{host} is not an IPv6 address") from None
        zone = zone.removeprefix("25")  # RFC 6874 writes the zone's % as %25
        if zone and not re.fullmatch(r"[A-Za-z0-9._~-]+", zone):
            raise ValueError(f"{host} has a zone that is not the name of a network interface")
        return f"[{address}%{zone}]" if zone else f"[{address}]"
    name = host
    if not host.isascii() or "xn--" in host.lower():
        try:
            url = httpx.URL(f"http://{host}")
            name = url.raw_host.decode()  # its IDNA form
            url.host  # noqa: B018 - httpx decodes that form again in each request, and fails where IDNA 2008 forbids it
        except (httpx.InvalidURL, UnicodeError):
            raise ValueError(f"the host {host!r} is not a valid name") from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.removesuffix(".").split(".")):
        raise ValueError(f"the host {host!r} is not a valid name or address")
    if _DIGITS_AND_DOTS.fullmatch(name) and parse_ip(name) is None:
        raise ValueError(f"the host {host!r} is not a valid IPv4 address")
    return name.lower()
