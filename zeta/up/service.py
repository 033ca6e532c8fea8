"""Supervising the child processes of `zeta up`: starting them, waiting until ready, restarting and stopping them.

Valkey starts first, then the migrations run, then the server and the worker start together. They stop in reverse order,
so the worker can still hand its jobs back. A single thread does this work; it sleeps until a child exits, a signal
arrives or a restart is due.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Literal

import httpx

from zeta.certificates import first_certificate
from zeta.client import Client
from zeta.up.child import Child
from zeta.up.home import Home, UpState
from zeta.up.settings import (
    UpSettings,
    child_environment,
    valkey_environment,
    worker_environment,
    worker_name,
)
from zeta.up.valkey import REPLY_SECONDS, Valkey
from zeta_core.contract.errors import InvalidSettings, Unavailable, ZetaError
from zeta_core.system.exposure import require_certificate, require_encryption
from zeta_core.system.file_identity import FileIdentity, process_start
from zeta_core.system.redis_access import RedisAddress

READY_SECONDS = 90.0  # enough for a slow disk and uncached Python imports
REDIS_SECONDS = 10.0  # for the user's own Redis, which may be starting at the same time
PROBE_SECONDS = 0.1
WORKER_MARGIN_SECONDS = 15.0  # in addition to its own grace period
SERVER_STOP_SECONDS = 15.0
VALKEY_STOP_SECONDS = 10.0
EX_USAGE = 2  # the exit status of a child that printed one sentence about its settings
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Report = Callable[[str], None]


class _Stopped(Exception):
    """A stop signal arrived while the service was starting."""


class LocalService:
    """One `zeta up` and its child processes."""

    def __init__(self, settings: UpSettings, variables: Mapping[str, str], report: Report) -> None:
        self.settings = settings
        self.home = Home(settings.home)
        self._variables, self._report = variables, report
        self._children: list[Child] = []
        self._url: str | None = None
        self._certificate: str | None = None
        self._phase: Literal["starting", "ready", "stopping"] = "starting"
        self._started_at = datetime.now(UTC)
        self._signals = 0
        self._wakeup, self._wakeup_writer = socket.socketpair()

    def run(self, on_ready: Callable[[UpState], None]) -> None:
        """Run until a stop signal. ``on_ready`` is called when the API and the worker are ready.

        Raises `Conflict` if another `zeta up` is running in this home, `InvalidSettings` if the port is in use or a
        package is missing, and `Unavailable` if a child process does not become ready. All child processes have exited
        when it returns or raises.
        """
        _require_extras()
        certificate, settings = self.settings.tls_cert, self.settings
        require_encryption(settings.host, has_tls=certificate is not None, behind_proxy=settings.behind_proxy)
        require_certificate(certificate, settings.tls_key)
        self._certificate = None if certificate is None else first_certificate(certificate)
        self.home.create()
        with self.home.locked(), self._handling_signals():
            self._write_state()
            self._report(f"Starting in {self.home.path} ...")
            try:
                with self.home.children() as inherited:
                    try:
                        self._start(inherited)
                        on_ready(self._write_state("ready"))
                        self._keep_alive()
                        self._report("Stopping: running jobs save a checkpoint and are queued again.")
                    except _Stopped:
                        pass
                    finally:
                        self._write_state("stopping")
                        self._stop()
            finally:
                self.home.state.unlink(missing_ok=True)

    # --- Start --------------------------------------------------------------------------------------------------------

    def _start(self, inherited: int) -> None:
        settings, home = self.settings, self.home
        if settings.api_key is None:
            home.secret(home.admin_key, "zeta_")
        if settings.worker_secret is None:
            home.secret(home.worker_secret, "")
        port = settings.port or _free_port(settings.host)
        _require_free(settings.host, port)
        self._url = _local_url(settings.host, port, "http" if self._certificate is None else "https")
        self._write_state()
        environment = child_environment(self._variables, settings, port)

        def child(name: str, command: list[str], death_signal: signal.Signals, variables: Mapping[str, str]) -> Child:
            made = Child(
                name,
                command,
                environment=variables,
                directory=home.path,
                log_file=home.logs / f"{name}.log",
                death_signal=death_signal,
                inherited=inherited,
            )
            self._children.append(made)
            made.start()
            self._write_state()
            return made

        if settings.redis_url is None:
            valkey = Valkey(home, _free_port("127.0.0.1"))
            child("valkey", valkey.command, signal.SIGTERM, valkey_environment(environment))
            self._wait_for(valkey.is_ready, "Valkey")
        else:
            address = RedisAddress.parse(settings.redis_url)
            self._wait_for(
                lambda: _accepts_connections(address),
                f"Redis at {address.location} (ZETA_REDIS_URL; unset it to use the built-in Valkey)",
                REDIS_SECONDS,
            )
        self._migrate(environment)
        # If `zeta up` is killed, its worker is killed too. Its runs continue for their grace period, and the next
        # worker adopts them. An orderly stop would need the server, which exits at the same time.
        child("server", module_command("server"), signal.SIGTERM, environment)
        key = settings.api_key or home.secret(home.admin_key, "zeta_")
        with Client(self._url, key, patience_seconds=0, use_proxy=False, certificate=self._certificate) as client:
            if settings.redis_url is not None:  # the server exits with a message if it belongs to another service
                self._wait_for(client.is_ready, "the API")
            worker = child("worker", module_command("worker"), signal.SIGKILL, worker_environment(environment))
            self._wait_for(client.is_ready, "the API")
            self._wait_for(lambda: _has_worker(client, worker_name(settings), worker.started_at), "the worker")

    def _migrate(self, environment: Mapping[str, str]) -> None:
        log_file = self.home.logs / "migrations.log"
        with log_file.open("wb") as log:
            done = subprocess.run(
                module_command("migrations"),
                cwd=self.home.path,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                umask=0o077,
                check=False,
            )
        if done.returncode != 0:
            lines = log_file.read_text(errors="replace").strip().splitlines() or ["no output"]
            if done.returncode == EX_USAGE:
                raise InvalidSettings(lines[-1], code="migrations")
            raise Unavailable(f"The database migration failed: {lines[-1]} (see {log_file}).", code="migrations")

    def _wait_for(self, is_ready: Callable[[], bool], name: str, seconds: float = READY_SECONDS) -> None:
        """Wait until ``is_ready()``. Raises `_Stopped` on a stop signal, `Unavailable` on time-out or a child exit."""
        deadline = time.monotonic() + seconds
        while not is_ready():
            for child in self._children:
                status = child.poll()
                if status is not None:
                    raise Unavailable(
                        f"The {child.name} exited while starting ({_exit_text(status)}): {child.last_log_line()} "
                        f"The full log is in {child.log_file}.",
                        code="child_ended",
                    )
            if time.monotonic() >= deadline:
                logs = f"; see the logs in {self.home.logs}" if self._children else ""
                raise Unavailable(f"Not ready after {seconds:g} s: {name}{logs}.", code="not_ready")
            self._sleep(PROBE_SECONDS)
            if self._signals:
                raise _Stopped

    # --- Keep alive ---------------------------------------------------------------------------------------------------

    def _keep_alive(self) -> None:
        while not self._signals:
            for child in self._children:
                status = child.poll()
                if status is not None:
                    pause = child.plan_restart()
                    self._report(f"{child.name} exited ({_exit_text(status)}); restarting it in {pause:g} s.")
                if child.restart_at is not None and child.restart_at <= time.monotonic():
                    child.start()
                    self._report(f"Restarted {child.name} as process {child.pid}.")
                    self._write_state("ready")
            due = [child.restart_at for child in self._children if child.restart_at is not None]
            self._sleep(max(0.0, min(due) - time.monotonic()) if due else None)

    # --- Stop ---------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Stop worker, server and Valkey, each with its own time limit; a second stop signal kills the rest."""
        signals_before = self._signals
        limits = {"worker": self.settings.stop_grace_seconds + WORKER_MARGIN_SECONDS, "server": SERVER_STOP_SECONDS}
        for child in reversed(self._children):
            if child.pid is None:
                continue
            child.send(signal.SIGTERM)
            deadline = time.monotonic() + limits.get(child.name, VALKEY_STOP_SECONDS)
            was_killed = False
            while child.poll() is None:
                if not was_killed and (time.monotonic() >= deadline or self._signals > signals_before):
                    reason = (
                        "a second stop signal arrived" if self._signals > signals_before else "it did not stop in time"
                    )
                    self._report(f"Killing {child.name}: {reason}.")
                    child.send(signal.SIGKILL)
                    was_killed = True
                self._sleep(1.0)

    # --- Signals and state --------------------------------------------------------------------------------------------

    @contextmanager
    def _handling_signals(self) -> Generator[None]:
        """Handle stop signals and SIGCHLD, and restore the earlier handlers afterwards."""
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        earlier_wakeup = signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        # An ignored SIGHUP (nohup) stays ignored. SIGINT is handled even if a shell started this process with `&`.
        numbers = [
            number
            for number in STOP_SIGNALS
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        ]
        earlier = {number: signal.signal(number, self._on_stop_signal) for number in numbers}
        earlier[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _wake)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier_wakeup)

    def _on_stop_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _sleep(self, seconds: float | None) -> None:
        """Sleep until a signal arrives, for at most this long."""
        select.select([self._wakeup], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            while self._wakeup.recv(4096):
                pass

    def _write_state(self, phase: Literal["starting", "ready", "stopping"] | None = None) -> UpState:
        self._phase = phase or self._phase
        children = {child.name: child.pid for child in self._children if child.pid is not None}
        state = UpState(
            state=self._phase,
            pid=os.getpid(),
            url=self._url,
            started_at=self._started_at,
            certificate=self._certificate,
            children=children,
            lock=str(FileIdentity.of(self.home.lock)),
            pid_started=process_start(os.getpid()),
        )
        self.home.write_state(state)
        return state


def _wake(_number: int, _frame: FrameType | None) -> None:
    """A handler that does nothing. Python writes to the wake-up descriptor only for signals that have a handler."""


def module_command(name: str) -> list[str]:
    """The command that runs one of our packages. ``-P`` ignores a folder of the same name in the working directory."""
    return [sys.executable, "-P", "-m", name]


def _require_extras() -> None:
    """Raise `InvalidSettings` if an extra is not installed."""
    for package, extra in (("fastapi", "server"), ("alembic", "server"), ("celery", "worker"), ("torch", "train")):
        if importlib.util.find_spec(package) is None:
            raise InvalidSettings(
                f"{package} is not installed, which `zeta up` needs; "
                f"run `pip install 'zeta-train[train,server,worker]'` (extra {extra!r} is missing).",
                code="missing_extra",
            )


def _require_free(host: str, port: int) -> None:
    """Raise `InvalidSettings` if the port is in use, or the address does not belong to this machine."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except (OSError, UnicodeError) as error:  # a label of a name may be too long
        raise InvalidSettings(
            f"Port {port} of {host} cannot be used ({getattr(error, 'strerror', None) or error}); "
            "stop the program that uses it, or choose another with --port (and --host).",
            code="port_in_use",
        ) from error


def _free_port(host: str) -> int:
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        with socket.socket(family, kind, protocol) as listener:
            listener.bind(address)
            return int(listener.getsockname()[1])
    except (OSError, UnicodeError) as error:
        raise InvalidSettings(
            f"ZETA_HOST is {host!r}, which is not an address of this machine "
            f"({getattr(error, 'strerror', None) or error}); choose another with --host.",
            param="ZETA_HOST",
        ) from error


def _local_url(host: str, port: int, scheme: Literal["http", "https"]) -> str:
    """The server's URL on this machine. A wildcard address is reached through loopback."""
    wildcards = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - nothing is bound here
    reached = wildcards.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{reached}:{port}"


def _accepts_connections(address: RedisAddress) -> bool:
    """Whether something accepts connections at the address. The server and the worker check that it is Redis."""
    if address.socket:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(address.socket)
        except OSError:
            return False
        return True
    hosts = [(address.host, address.port)] if address.sentinel is None else address.sentinel.hosts
    return any(_accepts_connection(host, port) for host, port in hosts)


def _accepts_connection(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), REPLY_SECONDS).close()
    except OSError:
        return False
    return True


def _has_worker(client: Client, name: str, started_at: float) -> bool:
    try:
        workers = client.workers()
    except (httpx.HTTPError, ZetaError):
        return False
    return any(
        worker.name == name and worker.status == "ready" and worker.started_at.timestamp() >= started_at - 1
        for worker in workers
    )


def _exit_text(status: int) -> str:
    """An exit status as text."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"
