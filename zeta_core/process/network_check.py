"""Checks, before a run on several nodes starts, that each node can connect to every other one.

Each node listens on its own address and connects to all others, in an order in which no two nodes begin with the same
one. Every pair is measured in both directions, because firewalls have directions. A connection proves itself with the
run's token, so a program that happens to listen on a port is not mistaken for a node.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from statistics import median

from pydantic import BaseModel, ConfigDict

from zeta_core.contract.wire.node_group import NodeGroup
from zeta_core.failures import NodesUnreachable

CONNECT_SECONDS = 5.0
NUM_PINGS = 10
SAMPLE_BYTES = 4 * 2**20
_CHUNK = bytes(2**16)


class Connection(BaseModel):
    """The measured connection from one node to another; ``error`` says why there is none."""

    model_config = ConfigDict(frozen=True)

    source: int
    target: int
    latency_seconds: float | None = None  # from a message to its answer; the fastest of `NUM_PINGS`
    bytes_per_second: float | None = None
    error: str | None = None


class Responder:
    """Answers the checks of the other nodes on a port of this node's address, until it is closed."""

    def __init__(self, address: str, token: bytes) -> None:
        self._token = token
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=128)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="network-check", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone does not end `accept`
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(CONNECT_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if _receive(connection, len(self._token)) != self._token:
                return
            for _ in range(NUM_PINGS):
                _receive(connection, 1)
                connection.sendall(b".")
            _receive(connection, SAMPLE_BYTES)
            connection.sendall(b".")


def check_connections(group: NodeGroup, ports: Sequence[int], token: bytes) -> list[Connection]:
    """Measure the connections from this node to all others; ``ports`` are those of the nodes' responders."""
    own, count = group.node_rank, group.num_nodes
    targets = [(own + offset) % count for offset in range(1, count)]
    return [_measure(own, target, group.addresses[target], ports[target], token) for target in targets]


def _measure(source: int, target: int, address: str, port: int, token: bytes) -> Connection:
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token)
            pings: list[float] = []
            for _ in range(NUM_PINGS):
                started = time.monotonic()
                connection.sendall(b".")
                _receive(connection, 1)
                pings.append(time.monotonic() - started)
            started = time.monotonic()
            for _ in range(SAMPLE_BYTES // len(_CHUNK)):
                connection.sendall(_CHUNK)
            _receive(connection, 1)
            rate = SAMPLE_BYTES / max(1e-9, time.monotonic() - started)
    except OSError as error:
        reason = "timed out" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        return Connection(source=source, target=target, error=reason)
    return Connection(source=source, target=target, latency_seconds=min(pings), bytes_per_second=rate)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    """Exactly this many bytes; only the first few are kept if there are many. Raises `OSError`."""
    kept, left = b"", num_bytes
    while left:
        part = connection.recv(min(left, 2**16))
        if not part:
            raise ConnectionResetError("the connection was closed")
        left -= len(part)
        kept = (kept + part)[:256]
    return kept


def describe(group: NodeGroup, connections: Sequence[Connection]) -> str:
    """The measured network, as a sentence. Raises `NodesUnreachable` with the pairs that cannot connect."""
    failed = [connection for connection in connections if connection.error is not None]
    if failed:
        pairs = [
            f"{group.name(each.source)} cannot connect to {group.name(each.target)}: {each.error}" for each in failed
        ]
        more = f"; and {len(pairs) - 5} more" if len(pairs) > 5 else ""
        raise NodesUnreachable(f"{'; '.join(pairs[:5])}{more}.")
    slowest = max(connections, key=lambda each: each.latency_seconds or 0.0)
    narrowest = min(connections, key=lambda each: each.bytes_per_second or 0.0)
    latency = median(each.latency_seconds or 0.0 for each in connections)
    rate = median(each.bytes_per_second or 0.0 for each in connections)
    return (
        f"All {group.num_nodes} nodes can connect to each other: median latency {latency * 1e3:.2f} ms "
        f"(highest {(slowest.latency_seconds or 0.0) * 1e3:.2f} ms, node {slowest.source} to {slowest.target}), "
        f"median bandwidth {rate / 1e6:,.0f} MB/s (lowest {(narrowest.bytes_per_second or 0.0) / 1e6:,.0f} MB/s, node "
        f"{narrowest.source} to {narrowest.target})."
    )
