"""The folder of `zeta up`: what lies where, who may read it, and who runs in it.

Guarantees: the folder is made with mode 0700 and every secret with 0600 from its first byte; a secret, once made, is
never replaced; of two `zeta up` on one folder one gets the lock, and the lock goes with its process however it ends.
A folder that exists already keeps its mode.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
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
from zeta_core.contract.identity import FileIdentity, process_start

PROBE_SECONDS = 0.05
LOCK_SECONDS = 2.0  # a client that looks whether somebody runs holds the lock for a moment
ENDING_SECONDS = 30.0  # children of a killed `zeta up` end within this


class UpState(BaseModel):
    """``up.json``: the `zeta up` that runs in a home. ``url`` is null until its address is decided.

    ``lock`` and ``pid_started`` tell it from one that was copied with its home, and its process from a later one.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    state: Literal["starting", "ready", "stopping"]
    pid: int
    url: str | None
    started_at: datetime
    children: dict[str, int] = {}
    lock: str | None = None  # the `FileIdentity` of the home's lock file; an older version does not tell
    pid_started: int | None = None  # `process_start`

    @property
    def is_alive(self) -> bool:
        """Whether ``pid`` is still the process that wrote this, as far as that can be known here."""
        return self.pid_started is None or process_start(self.pid) == self.pid_started


@dataclass(frozen=True)
class Home:
    """Names in the folder, and the few things that are done with them."""

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
        """Held shared by every child process, so that the next `zeta up` can tell when all have ended."""
        return self.path / "children.lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def valkey(self) -> Path:
        return self.path / "valkey"

    def make(self) -> None:
        """Make the folder and its parts. Raises `InvalidSettings` where it cannot be."""
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, mode=0o700)
            for folder in (self.logs, self.valkey):
                folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidSettings(
                f"The home {self.path} cannot be made: {error.strerror}; give another with --home or ZETA_HOME."
            ) from error

    def secret(self, file: Path, prefix: str) -> str:
        """The secret in ``file``, made now if there is none yet; a file that others may read is closed to them."""
        try:
            file.chmod(0o600)
            return _required(file)
        except FileNotFoundError:
            pass
        text = f"{prefix}{secrets.token_urlsafe(32)}"
        with _written_aside(file, text + "\n") as aside, contextlib.suppress(FileExistsError):
            os.link(aside, file)  # unlike a rename, never replaces one that another process made meanwhile
        return _required(file)

    def write_private(self, file: Path, text: str) -> None:
        """Replace a file, readable by this user alone, whole or not at all."""
        with _written_aside(file, text) as aside:
            aside.replace(file)

    def write_state(self, state: UpState) -> None:
        self.write_private(self.state, state.model_dump_json(indent=2) + "\n")

    def read_state(self) -> UpState | None:
        """What the last `zeta up` of this home wrote; what was copied with another home does not count."""
        try:
            state = UpState.model_validate_json(self.state.read_bytes())
            recorded = FileIdentity.parse(state.lock or "")
            is_copied = recorded is not None and not recorded.is_same_file(FileIdentity.of(self.lock))
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValidationError):
            return None
        return None if is_copied else state

    def running(self) -> UpState | None:
        """The `zeta up` that runs here now: what it wrote counts only while it holds the lock."""
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
                f"The home {self.path} cannot be written: {error.strerror}; give another with --home or ZETA_HOME."
            ) from error

    @contextmanager
    def owned(self) -> Generator[None]:
        """Be the one `zeta up` of this home. Raises `Conflict` saying where the other one is."""
        descriptor = self._open_lock(self.lock)
        try:
            if not _locked(descriptor, LOCK_SECONDS):
                other = self.read_state()
                where = (
                    f"as process {other.pid}, at {other.url or 'an address not yet decided'}" if other else "already"
                )
                raise Conflict(
                    f"A `zeta up` runs in {self.path} {where}; use it, stop it with `zeta down`, "
                    "or give another home with --home.",
                    code="already_running",
                )
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def children(self) -> Generator[int]:
        """A descriptor for children to inherit, once the children of an earlier `zeta up` have all ended.

        Raises `Conflict` if they do not end within `ENDING_SECONDS`.
        """
        descriptor = self._open_lock(self.children_lock)
        try:
            if not _locked(descriptor, ENDING_SECONDS):
                earlier = self.read_state()
                pids = ", ".join(f"{name} {pid}" for name, pid in earlier.children.items()) if earlier else "unknown"
                raise Conflict(
                    f"Processes of an earlier `zeta up` in {self.path} still run ({pids}); end them first.",
                    code="children_running",
                )
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield descriptor
        finally:
            os.close(descriptor)


def _locked(descriptor: int, seconds: float) -> bool:
    """Try to get the exclusive lock for so long."""
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


def _required(file: Path) -> str:
    lines = file.read_text().splitlines()
    if not lines or not lines[0].strip():
        raise InvalidSettings(f"{file} is empty; remove it, and a new secret is made at the next start.")
    return lines[0].strip()


@contextmanager
def _written_aside(file: Path, text: str) -> Generator[Path]:
    """A file beside ``file`` with this text on disk, mode 0600, removed at the end if it is still there."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        yield aside
    finally:
        aside.unlink(missing_ok=True)
