"""A load generator: many concurrent HTTP clients in one event loop, each sending its next request after a response.

It writes requests to sockets without an HTTP library, because a library would use more CPU than the server under test.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """The result of a load: ``seconds`` in total, and the latency of each request in seconds."""

    seconds: float
    latencies: Sequence[float]

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """The latency that this share of the requests (0 to 1) does not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """A request for a connection that stays open."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def run_load(
    port: int, requests: Callable[[int], bytes], *, clients: int, total: int, expected_status: int = 200
) -> Load:
    """Send ``total`` requests, made by ``requests`` from their number, with this many concurrent clients."""
    return asyncio.run(_run(port, requests, clients, total, expected_status))


async def _run(port: int, requests: Callable[[int], bytes], clients: int, total: int, expected: int) -> Load:
    numbers = iter(range(total))
    latencies: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            content = requests(number)
            began = time.perf_counter()
            writer.write(content)
            status, body = await _read_response(reader)
            latencies.append(time.perf_counter() - began)
            if status != expected:
                raise AssertionError(f"status {status} instead of {expected}: {body[:500]!r}")
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(time.perf_counter() - began, latencies)


async def _read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)
