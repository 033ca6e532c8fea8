"""Terminates TLS in front of a server on this machine, as the proxies of hosting providers do."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading

from tests.harness.certificates import Certificate

CHUNK_BYTES = 65_536


class TlsRelay:
    """Accepts TLS on ``port`` and relays the decrypted bytes to ``target_port``, until `close`."""

    def __init__(self, target_port: int, certificate: Certificate) -> None:
        self.num_connections = 0
        self.port = 0
        self._target_port = target_port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate.certificate, certificate.key)
        self._loop = asyncio.new_event_loop()
        self._is_listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tls-relay", daemon=True)
        self._thread.start()
        assert self._is_listening.wait(10), "the relay does not listen"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        listening = asyncio.start_server(self._connect, "127.0.0.1", 0, ssl=self._context)
        server = self._loop.run_until_complete(listening)
        self.port = int(server.sockets[0].getsockname()[1])
        self._is_listening.set()
        self._loop.run_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Relay bytes in one direction until either end closes."""
    with contextlib.suppress(OSError):
        while data := await source.read(CHUNK_BYTES):
            sink.write(data)
            await sink.drain()
    sink.close()
