"""The address at which other workers reach this one, and a free port for the rendezvous of a job on several workers."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from worker.settings import WorkerSettings

LOOPBACK = "127.0.0.1"
DEFAULT_REDIS_PORT = 6379


@dataclass(frozen=True)
class ReservedPort:
    """A port of an address of this machine, which no other program can take until `release`."""

    address: str
    port: int
    bound: socket.socket

    def release(self) -> None:
        self.bound.close()


def reserve_port(settings: WorkerSettings) -> ReservedPort:
    """Bind a free port of ``ZETA_PORTS`` on the worker's address. May look up a name. Raises `OSError`."""
    address = settings.worker_address or route_address(settings.redis_url)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in settings.port_numbers:
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Connections of the last run on this port may be in TIME_WAIT. With this option, only a listening socket
            # keeps others from binding the port.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((address, port))
            bound.listen(1)
        except OSError as error:
            bound.close()
            if not settings.ports or port == settings.port_numbers[-1]:
                where = f"a free port of ZETA_PORTS ({settings.ports})" if settings.ports else "a free port"
                raise OSError(error.errno, f"cannot bind {where} on {address}: {error.strerror}") from error
            continue
        return ReservedPort(address, int(bound.getsockname()[1]), bound)
    raise AssertionError("the settings have at least one port")


def route_address(redis_url: str) -> str:
    """The address of this machine on the route to Redis, which all workers reach. Sends nothing."""
    url = urlsplit(redis_url)
    if url.hostname is None:
        return LOOPBACK  # a Unix socket: all workers are on this machine
    family, kind, _, _, target = socket.getaddrinfo(
        url.hostname, url.port or DEFAULT_REDIS_PORT, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0]).partition("%")[0]
