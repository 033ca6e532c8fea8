"""The home folder of `zeta up`: its layout, its file permissions, and the lock of the running service.

Guarantees: the folder is created with mode 0700, and every secret with mode 0600 from the start. A secret is never
replaced. Only one `zeta up` can hold the lock of a folder; the lock is released when its process exits, for whatever
reason. An existing folder keeps its mode; if every user of the machine can write to it, it is rejected.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from zeta_core.contract.errors import Conflict, InvalidSettings
from zeta_core.system.durable_files import private_part_file, write_private_durably
from zeta_core.system.file_identity import FileIdentity, process_start
from zeta_core.system.home_folder import require_protected

PROBE_SECONDS = 0.05
LOCK_SECONDS = 2.0  # clients briefly hold the lock to check whether the service is running
CHILD_EXIT_SECONDS = 30.0  # the children of a killed `zeta up` exit within this time


class UpState(BaseModel):
    """``up.json``: the `zeta up` running in a home. ``url`` is null until the address has been chosen.

    ``certificate`` is that of the server (PEM) if it uses TLS. ``lock`` shows whether the file was copied with its
    home; ``pid_started`` shows whether ``pid`` has been reused.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    state: Literal["starting", "ready", "stopping"]
    pid: int
    url: str | None
    started_at: datetime
    certificate: str | None = None
    children: dict[str, int] = {}
    lock: str | None = None  # the `FileIdentity` of the home's lock file; older versions do not write it
    pid_started: int | None = None  # `process_start`

    @property
    def is_alive(self) -> bool:
        """Whether ``pid`` is still the process that wrote this file, as far as this process can tell."""
        return self.pid_started is None or process_start(self.pid) == self.pid_started


@dataclass(frozen=True)
class Home:
    """The paths in the folder, and operations on them."""

    path: Path

    @property
    def admin_key(self) -> Path:
        return self.path / "admin.key"

    @property
    def worker_secret(self) -> Path:
        return self.path / "worker.secret"

    @property
    def redis_url(self) -> Path:
        return self.path / "redis.url"

    @property
    def state(self) -> Path:
        return self.path / "up.json"

    @property
    def lock(self) -> Path:
        return self.path / "up.lock"

    @property
    def children_lock(self) -> Path:
        """A lock that every child process shares, so the next `zeta up` knows when all of them have exited."""
        return self.path / "children.lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def valkey(self) -> Path:
        return self.path / "valkey"

    def create(self) -> None:
        """Create the folder and its subfolders. Raises `InvalidSettings` if that fails or if others can write to it."""
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, mode=0o700)
            require_protected(self.path)
            for folder in (self.logs, self.valkey):
                folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidSettings(
                f"The home {self.path} cannot be created: {error.strerror}; choose another with --home or ZETA_HOME."
            ) from error

    def secret(self, file: Path, prefix: str) -> str:
        """The secret in ``file``, created if it does not exist. Other users lose read access to an existing file."""
        try:
            file.chmod(0o600)
            return _read_secret(file)
        except FileNotFoundError:
            pass
        text = f"{prefix}{secrets.token_urlsafe(32)}"
        with private_part_file(file, text + "\n") as part, contextlib.suppress(FileExistsError):
            os.link(part, file)  # unlike a rename, it never replaces another process's new secret
        return _read_secret(file)

    def write_private(self, file: Path, text: str) -> None:
        """Replace a file atomically; only this user can read it."""
        write_private_durably(file, text)

    def write_state(self, state: UpState) -> None:
        self.write_private(self.state, state.model_dump_json(indent=2) + "\n")

    def read_state(self) -> UpState | None:
        """The state that the last `zeta up` of this home wrote. A state copied from another home is ignored."""
        try:
            state = UpState.model_validate_json(self.state.read_bytes())
            recorded = FileIdentity.parse(state.lock or "")
            is_copied = recorded is not None and not recorded.is_same_file(FileIdentity.of(self.lock))
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValidationError):
            return None
        return None if is_copied else state

    def running(self) -> UpState | None:
        """The state of the `zeta up` that is running in this home, which holds the lock."""
        try:
            descriptor = os.open(self.lock, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.read_state()
        finally:
            os.close(descriptor)
        return None

    def _open_lock(self, file: Path) -> int:
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InvalidSettings(
                f"The home {self.path} is not writable: {error.strerror}; choose another with --home or ZETA_HOME."
            ) from error

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold this home's lock. Raises `Conflict`, with the process and URL, if another `zeta up` holds it."""
        descriptor = self._open_lock(self.lock)
        try:
            if not _acquire(descriptor, LOCK_SECONDS):
                other = self.read_state()
                where = f"as process {other.pid}, at {other.url or 'an address not yet chosen'}" if other else "already"
                raise Conflict(
                    f"A `zeta up` is running in {self.path} {where}; use it, stop it with `zeta down`, "
                    "or choose another home with --home.",
                    code="already_running",
                )
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def children(self) -> Generator[int]:
        """Wait until all children of an earlier `zeta up` have exited, and yield a lock descriptor for new children.

        Raises `Conflict` if they do not exit within `CHILD_EXIT_SECONDS`.
        """
        descriptor = self._open_lock(self.children_lock)
        try:
            if not _acquire(descriptor, CHILD_EXIT_SECONDS):
                earlier = self.read_state()
                pids = ", ".join(f"{name} {pid}" for name, pid in earlier.children.items()) if earlier else "unknown"
                raise Conflict(
                    f"Processes of an earlier `zeta up` in {self.path} are still running ({pids}); stop them first.",
                    code="children_running",
                )
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield descriptor
        finally:
            os.close(descriptor)


def _acquire(descriptor: int, seconds: float) -> bool:
    """Try to acquire the exclusive lock for this long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            Event().wait(PROBE_SECONDS)
        else:
            return True


def _read_secret(file: Path) -> str:
    lines = file.read_text().splitlines()
    if not lines or not lines[0].strip():
        raise InvalidSettings(f"{file} is empty; remove it, and the next start creates a new secret.")
    return lines[0].strip()
