"""Whether a listening address is reachable from other machines, and what it needs then."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from zeta_core.contract.errors import InvalidSettings


def is_loopback(host: str) -> bool:
    """Whether ``host`` has only addresses of the loopback interface. A name without an address is not loopback."""
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)} if host else set[str]()
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ip_address(address.partition("%")[0]).is_loopback for address in found)


def require_encryption(host: str, *, has_tls: bool, behind_proxy: bool) -> None:
    """Raise `InvalidSettings` if API keys and data would cross the network in plain text."""
    if has_tls or behind_proxy or is_loopback(host):
        return
    raise InvalidSettings(
        f"ZETA_HOST is {host!r}, which other machines reach, so API keys and data would cross the network unencrypted; "
        "set ZETA_TLS_CERT and ZETA_TLS_KEY, or ZETA_BEHIND_PROXY=yes if only a reverse proxy with TLS reaches it.",
        param="ZETA_HOST",
        code="unencrypted",
    )
