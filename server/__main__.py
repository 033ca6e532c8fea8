"""``python -m server`` (``zeta server``): serves the HTTP API and runs the engine until SIGTERM or SIGINT.

Guarantees: after either signal, new connections are refused, live streams end immediately, other responses have
`GRACE_SECONDS` to finish, and the exit code is 0. Invalid settings are reported in one sentence on standard error, with
exit code 2.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator
from functools import partial

import uvicorn

from server.app import create_app
from server.http.connections import connection_limit
from server.http.protocol import ServerProtocol
from server.service import ShutdownSignal, open_service
from server.settings import ServerSettings
from server.tracing import Tracing, open_tracing
from zeta_core.contract.errors import InvalidSettings, ZetaError
from zeta_core.system.exposure import require_certificate, require_encryption
from zeta_core.system.log_format import log_to_standard_error

GRACE_SECONDS = 5
BACKLOG = 2048

logger = logging.getLogger("server")


class _Server(uvicorn.Server):
    """Shuts down gracefully on a signal, and notifies open streams."""

    def __init__(self, config: uvicorn.Config, stopping: ShutdownSignal) -> None:
        super().__init__(config)
        self._stopping = stopping

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.should_exit = True
        self._stopping.request()


def main() -> int:
    log_to_standard_error()
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        settings = ServerSettings.from_environment(os.environ)  # noqa: TID251 - the entry point reads it once
        require_encryption(settings.host, has_tls=settings.tls_cert is not None, behind_proxy=settings.behind_proxy)
        require_certificate(settings.tls_cert, settings.tls_key)
        tracing = open_tracing(os.environ)  # noqa: TID251 - the variables of OpenTelemetry, which its SDK reads, too
        listener = _listen(settings)
        with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
            runner.run(_serve(settings, listener, tracing))
    except ZetaError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 0


async def _serve(settings: ServerSettings, listener: socket.socket, tracing: Tracing | None) -> None:
    async with open_service(settings, tracing) as service:
        app = create_app(service)
        await asyncio.to_thread(app.openapi)  # cached now, because generating it takes a third of a second
        gc.collect()
        gc.freeze()  # 120,000 permanent objects; a full collection during a request would take 60 ms to visit them
        config = uvicorn.Config(
            app,
            http=partial(ServerProtocol, limit=connection_limit()),  # pyright: ignore[reportArgumentType] - a factory
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        scheme = "http" if settings.tls_cert is None else "https"
        logger.info("Serving on %s://%s:%d.", scheme, f"[{host}]" if ":" in host else host, port)
        await _Server(config, service.stopping).serve([listener])
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    logger.info("Stopped.")


def _listen(settings: ServerSettings) -> socket.socket:
    """The listening socket. Raises `InvalidSettings` if the address can't be used."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise InvalidSettings(
            f"Cannot listen on ZETA_HOST {settings.host!r}, ZETA_PORT {settings.port}: {error.strerror or error}. "
            "Stop the process that uses this address, or choose another port.",
            param="ZETA_PORT",
        ) from error


if __name__ == "__main__":
    sys.exit(main())
