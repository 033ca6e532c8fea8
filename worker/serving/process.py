"""One serving process: its process tree, and the connection to the Unix socket in its run directory."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import psutil
from pydantic import ValidationError

from worker.run.process_tree import ProcessTree
from zeta_core.contract.wire.answers import (
    FROM_SERVING,
    MAX_LINE_BYTES,
    SERVE_FILE,
    SOCKET_FILE,
    FromServing,
    ServeFile,
    ToServing,
)
from zeta_core.system.sandbox.task_limit import exceeded_limit

ARGUMENT = "serve"
ATTEMPT = 1  # in the marks of its processes
CONNECT_SECONDS = 120.0  # for the interpreter to start on a busy machine
SEND_SECONDS = 5  # in which a process must read what is sent to it; the supervisor waits for that
POLL_SECONDS = 0.02
MAX_PATH_BYTES = 100  # of a socket; the limit is 104 or 108

logger = logging.getLogger(__name__)


class ServingProcess:
    """``on_message`` is called from a thread of its own. `is_gone` must be called until it returns true."""

    def __init__(
        self,
        directory: Path,
        file: ServeFile,
        command: Sequence[str],
        environment: Mapping[str, str],
        devices: Sequence[str],
        on_message: Callable[[FromServing], None],
    ) -> None:
        """Start it in ``directory``, which exists. Raises `OSError`."""
        self.directory = directory
        self.file = file
        self.last_contact = time.monotonic()  # of its last message
        (directory / SERVE_FILE).write_text(file.model_dump_json(indent=2))
        self._on_message = on_message
        self._tree = ProcessTree(directory, directory.name, ATTEMPT, 0.0, devices)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._unsent: list[bytes] = []  # until it is connected
        self._is_over = threading.Event()
        self._tree.start((*command, ARGUMENT), environment)
        threading.Thread(target=self._receive, name=f"serving-{directory.name}", daemon=True).start()

    def send(self, message: ToServing) -> None:
        """Send a message, or keep it until the process is connected. A process that doesn't read is killed."""
        line = message.model_dump_json().encode() + b"\n"
        with self._lock:
            if self._socket is None:
                self._unsent.append(line)
                return
            try:
                self._socket.sendall(line)
            except OSError:
                self._tree.kill()

    def processes(self) -> Sequence[psutil.Process]:
        """The live processes of its tree."""
        return self._tree.processes.alive()

    def kill(self) -> None:
        self._is_over.set()
        self._tree.kill()

    def is_gone(self) -> bool:
        """Whether no process of it is left; then its directory is removed. Never blocks."""
        try:
            if not self._tree.is_gone(has_ended=False, can_save=False):
                return False
        except FileNotFoundError:
            self._tree.kill()  # its directory was removed, so it has no lock that could be checked
        self._is_over.set()
        if (limit := exceeded_limit(self.directory)) is not None:
            message = "%s exceeded its limit of %d processes and threads (ZETA_JOB_PROCESSES) and was ended."
            logger.warning(message, self.directory.name, limit, extra={"action": "serve"})
        shutil.rmtree(self.directory, ignore_errors=True)
        return True

    def _receive(self) -> None:
        """Connect, and pass on every message, until the process closes the connection."""
        try:
            with self._connect() as connected, connected.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE_BYTES):
                    self.last_contact = time.monotonic()
                    self._on_message(FROM_SERVING.validate_json(line))
        except (OSError, ValidationError) as error:
            logger.warning("The connection to %s failed: %s", self.directory.name, error, extra={"action": "serve"})
        finally:
            self._tree.kill()  # it has ended, or nobody listens to it any more

    def _connect(self) -> socket.socket:
        """Connect, and send what was kept. Raises `OSError`."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while not self._is_over.wait(POLL_SECONDS) and time.monotonic() < deadline:
            connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                with _short_path(self.directory) as path:
                    connecting.connect(path)
            except OSError:  # it doesn't listen yet
                connecting.close()
                continue
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
            with self._lock:
                connecting.sendall(b"".join(self._unsent))
                self._socket, self._unsent = connecting, []
            return connecting
        raise TimeoutError("the process did not listen in time, or has ended")


@contextlib.contextmanager
def _short_path(directory: Path) -> Generator[str]:
    """The path of the socket; through a descriptor of its directory if it is too long for an address."""
    path = str(directory / SOCKET_FILE)
    if len(os.fsencode(path)) <= MAX_PATH_BYTES or sys.platform != "linux":
        yield path
        return
    descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_FILE}"
    finally:
        os.close(descriptor)
