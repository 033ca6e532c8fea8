"""Whether a listening address is reachable from other machines, what it needs then, and checking its certificate."""

from __future__ import annotations

import socket
import ssl
from ipaddress import ip_address
from pathlib import Path

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


def require_certificate(certificate: Path | None, key: Path | None) -> None:
    """Raise `InvalidSettings` if only one of these PEM files is set, or if they can't be used for TLS."""
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        missing, given = ("KEY", "CERT") if key is None else ("CERT", "KEY")
        raise InvalidSettings(
            f"ZETA_TLS_{given} is set without ZETA_TLS_{missing}; set both for TLS, or neither.",
            param=f"ZETA_TLS_{missing}",
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or error
        raise InvalidSettings(
            f"ZETA_TLS_CERT {str(certificate)!r} and ZETA_TLS_KEY {str(key)!r} can't be used "
            f"({reason}); name PEM files of a certificate and of its unencrypted private key.",
            param="ZETA_TLS_CERT",
        ) from error
