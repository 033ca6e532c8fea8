"""The network interface that has an address, which gloo and NCCL are told to use."""

from __future__ import annotations

from ipaddress import ip_address

import psutil

from zeta_core.environment import unless_set
from zeta_core.failures import NodesUnreachable


def interface_variables(address: str) -> dict[str, str]:
    """The variables that make gloo and NCCL use the interface with this address, unless the operator has set them."""
    name = find_interface(address)
    chosen = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}  # "=": not a prefix of the name
    return unless_set(chosen)


def find_interface(address: str) -> str:
    """The name of the interface with this address. Raises `NodesUnreachable`.

    Every address of the loopback network belongs to the loopback interface, which lists only the first one.
    """
    wanted = ip_address(address)
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            try:
                own = ip_address(entry.address.partition("%")[0])
            except ValueError:
                continue  # the hardware address
            found.setdefault(name, []).append(str(own))
            if own == wanted or (own.is_loopback and wanted.is_loopback and own.version == wanted.version):
                return name
    known = "; ".join(f"{name}: {', '.join(addresses)}" for name, addresses in sorted(found.items()))
    raise NodesUnreachable(
        f"This host has no network interface with the address {address} ({known}).",
        hint="Set ZETA_WORKER_ADDRESS on its worker to an address of this host that the other workers can reach.",
    )
