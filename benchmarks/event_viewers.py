"""``python -m benchmarks.event_viewers NUMBER URL...``: viewers that follow the events of jobs, ``NUMBER`` of each URL.

The first line of its standard input is the header ``Authorization``. It prints ``connected`` when all viewers have
received the head of the response. At the next line of its input, it prints the delay of each received progress event,
from its creation to its arrival, in seconds. The sockets are read without a library for HTTP, so the viewers use little
CPU time.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from urllib.parse import urlsplit

_CREATED_AT = re.compile(rb"event: progress\ndata: .*?\"created_at\":\"([^\"]+)\"")


async def main(number: int, urls: Sequence[str], authorization: str) -> None:
    delays: list[float] = []
    connected = asyncio.Barrier(number * len(urls) + 1)
    viewers = [
        asyncio.create_task(_follow(url, authorization, connected, delays)) for url in urls for _ in range(number)
    ]
    await connected.wait()
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for viewer in viewers:
        viewer.cancel()
    print("\n".join(f"{delay:.4f}" for delay in delays))


async def _follow(url: str, authorization: str, connected: asyncio.Barrier, delays: list[float]) -> None:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"GET {address.path}?{address.query} HTTP/1.1\r\nHost: {address.netloc}\r\nAccept: text/event-stream\r\n"
        f"Authorization: {authorization}\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    await connected.wait()
    while data := await reader.read(65536):
        now = time.time()
        for created_at in _CREATED_AT.findall(data):
            delays.append(now - datetime.fromisoformat(created_at.decode()).timestamp())
    writer.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:], sys.stdin.readline().strip()))
