"""``python -m zeta_core serve RUN_DIR``: load the model of ``RUN_DIR/serve.json``, and answer requests until the end.

The worker connects once to the Unix socket ``RUN_DIR/socket``; both sides write one JSON object per line
(`zeta_core.contract.wire.answers`). Guarantees: the process holds a shared lock on ``RUN_DIR/lock``, and exits as soon
as the connection is closed, so it never outlives its worker. It writes nothing but its log and the socket.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from pydantic import BaseModel

from zeta_core.contract.wire.answers import (
    MAX_LINE_BYTES,
    SERVE_FILE,
    SOCKET_FILE,
    TO_SERVING,
    AdapterFailed,
    AddAdapter,
    Alive,
    Cancel,
    Generate,
    LoadFailed,
    ModelReady,
    ServeFile,
    ToServing,
)
from zeta_core.contract.wire.run_directory import LOCK_FILE, STACKS_SIGNAL
from zeta_core.failures import WeightsReplaced, explain
from zeta_core.report.library_noise import hide_library_noise, without_progress_bars
from zeta_core.system import sandbox

if TYPE_CHECKING:
    from zeta_core.serve.generations import Generations

CONNECT_SECONDS = 120.0
ALIVE_SECONDS = 1.0


class WorkerConnection:
    """The connection to the worker. A thread receives requests; the process exits when the connection is closed."""

    def __init__(self, connected: socket.socket) -> None:
        self.requests: SimpleQueue[ToServing] = SimpleQueue()
        self._socket = connected
        self._alive_at = 0.0  # monotonic
        threading.Thread(target=self._receive, name="requests", daemon=True).start()

    @classmethod
    def accept(cls) -> WorkerConnection:
        """Listen in the current directory, wait for the worker, and enter the sandbox.

        Raises `TimeoutError` and `SandboxUnavailable`.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            before = os.umask(0o177)  # only this user may connect
            try:
                listening.bind(SOCKET_FILE)  # relative, because the path of a socket must be short
            finally:
                os.umask(before)
            listening.listen(1)
            listening.settimeout(CONNECT_SECONDS)
            connected, _ = listening.accept()
        connected.settimeout(None)
        sandbox.enter(Path.cwd())  # before this process starts threads; creating further sockets may be forbidden
        return cls(connected)

    def send(self, message: BaseModel) -> None:
        """Send a message. Exits the process if the worker has closed the connection."""
        try:
            self._socket.sendall(message.model_dump_json().encode() + b"\n")
        except OSError:
            os._exit(0)

    def send_alive(self) -> None:
        """Send a sign of life, at most once a second."""
        now = time.monotonic()
        if now - self._alive_at >= ALIVE_SECONDS:
            self._alive_at = now
            self.send(Alive())

    def _receive(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                self.requests.put(TO_SERVING.validate_json(line))
        os._exit(0)  # the worker is gone, or has ended this process


def main(run_dir: Path) -> int:
    """Serve until the worker closes the connection. Returns 1 if the model can't be loaded."""
    hide_library_noise()
    os.chdir(run_dir)
    lock = os.open(LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited, held until the process exits
    fcntl.flock(lock, fcntl.LOCK_SH)
    faulthandler.register(signal.Signals[STACKS_SIGNAL], file=sys.stderr, all_threads=True)
    worker = WorkerConnection.accept()
    try:
        file = ServeFile.model_validate_json(Path(SERVE_FILE).read_bytes())
        from zeta_core.serve.generations import Generations  # takes seconds, during which requests may arrive
        from zeta_core.serve.loading import load

        with without_progress_bars():
            loaded = load(file)
    except Exception as error:  # noqa: BLE001 - the worker reports any exception to the client
        traceback.print_exception(error, file=sys.stderr)
        _, explanation = explain(error)
        worker.send(LoadFailed(message=explanation.message, can_retry=isinstance(error, WeightsReplaced)))
        return 1
    worker.send(ModelReady(context_tokens=loaded.context_tokens))
    generations = Generations(loaded, worker.send, is_base=file.weights.is_base)
    while True:
        _take_requests(worker, generations)
        worker.send_alive()
        generations.step()


def _take_requests(worker: WorkerConnection, generations: Generations) -> None:
    """Take all requests that have arrived; wait for one, for up to `ALIVE_SECONDS`, if there is nothing to compute."""
    with contextlib.suppress(Empty):
        request = worker.requests.get(timeout=ALIVE_SECONDS) if generations.is_idle else worker.requests.get_nowait()
        while True:
            match request:
                case Generate():
                    generations.add(request)
                case Cancel():
                    generations.cancel(request.request_id)
                case AddAdapter():
                    _add_adapter(worker, generations, request)
            request = worker.requests.get_nowait()


def _add_adapter(worker: WorkerConnection, generations: Generations, added: AddAdapter) -> None:
    try:
        with without_progress_bars():
            generations.add_adapter(added)
    except Exception as error:  # noqa: BLE001 - peft rejects adapters with many kinds of errors
        traceback.print_exception(error, file=sys.stderr)
        message = explain(error)[1].message
        worker.send(AdapterFailed(key=added.key, message=message.splitlines()[0]))
