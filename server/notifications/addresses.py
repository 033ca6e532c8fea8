"""Decides which network addresses a notification may be sent to, so that no user reaches the server's own network.

Public addresses are allowed, except those of this machine, and the networks in ``ZETA_WEBHOOK_NETWORKS``.

A host name is resolved once, and the message is sent to one of these addresses, so a name that changes its address in
the meantime (DNS rebinding) reaches nothing else. If one of its addresses is not allowed, none is used.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Executor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import psutil

from server.settings import Networks

MAX_ADDRESSES = 4  # of a host name
_CLOUD_METADATA = IPv4Address("168.63.129.16")  # Azure's service for its machines, although the address is public
_NAT64 = IPv6Network("64:ff9b::/96")  # contains an IPv4 address in its last 32 bits (RFC 6052)


class AddressNotAllowed(Exception):
    """The receiver's address is not allowed. The message omits the address, which would reveal the network."""


async def allowed_addresses(host: str, port: int, networks: Networks, executor: Executor) -> list[str]:
    """The addresses of a host name or a literal address.

    Raises `AddressNotAllowed` if one of them is not allowed, and `OSError` if the name can't be resolved.
    """
    if (literal := _literal(host)) is not None:
        found = [literal]
    else:
        loop = asyncio.get_running_loop()
        entries = await loop.run_in_executor(
            executor, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        )
        found = [ip_address(str(entry[4][0])) for entry in entries]
    if not found:
        raise OSError(f"the name {host} has no address")
    own = own_addresses()
    if not all(_is_allowed(address, networks, own) for address in found):
        raise AddressNotAllowed(
            f"{host} is an address of this machine or of a private network; an operator can allow it with "
            "ZETA_WEBHOOK_NETWORKS"
        )
    return [str(address) for address in dict.fromkeys(found)][:MAX_ADDRESSES]


def literal_fault(url: str, networks: Networks) -> str | None:
    """Why messages to a URL with a literal address will never be sent; ``None`` for allowed ones and host names."""
    host = urlsplit(url).hostname
    literal = None if host is None else _literal(host)
    if literal is None or _is_allowed(literal, networks, own_addresses()):
        return None
    return "it is an address of the server or of a private network; an operator can allow it with ZETA_WEBHOOK_NETWORKS"


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def own_addresses() -> frozenset[IPv4Address | IPv6Address]:
    """The addresses of this machine's interfaces now. An address that a router translates to them is not among them."""
    addresses = (address for interface in psutil.net_if_addrs().values() for address in interface)
    texts = (one.address.partition("%")[0] for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6))
    return frozenset(map(ip_address, texts))


def _is_allowed(
    address: IPv4Address | IPv6Address, networks: Networks, own: frozenset[IPv4Address | IPv6Address]
) -> bool:
    inner = _embedded(address)
    checked = address if inner is None else inner
    if any(checked in network for network in networks if network.version == checked.version):
        return True
    return is_public(checked) and checked not in own


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the address belongs to the public internet; addresses of tunnels through IPv4 don't count."""
    if isinstance(address, IPv6Address) and (
        address.sixtofour is not None or address.teredo is not None or address.is_site_local
    ):
        return False
    if address == _CLOUD_METADATA:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _embedded(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to this IPv6 address reach, if it contains one."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped
