"""A home of `zeta up` copied while it runs contains process ids of the original, which must not be stopped."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from zeta.up.control import down
from zeta.up.home import Home, UpState
from zeta.up.settings import UpSettings
from zeta_core.contract.errors import Unavailable
from zeta_core.system.file_identity import FileIdentity, process_start


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process in place of the original's `zeta up`."""
    process = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait(60)"])
    yield process
    process.kill()
    process.wait(30)


def write_state(home: Home, process: subprocess.Popen[bytes], *, started_ticks_ago: int = 0) -> None:
    home.create()
    home.lock.touch()
    started = process_start(process.pid)
    assert started is not None
    home.write_state(
        UpState(
            state="ready",
            pid=process.pid,
            url="http://127.0.0.1:1",
            started_at=datetime.now(UTC),
            lock=str(FileIdentity.of(home.lock)),
            pid_started=started - started_ticks_ago,
        )
    )


def test_a_copied_state_file_stops_no_process_of_the_original(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    original, copy = Home(tmp_path / "original"), Home(tmp_path / "copy")
    write_state(original, process)
    shutil.copytree(original.path, copy.path)
    with copy.locked():  # a `zeta up` that has not written its own state yet
        assert copy.running() is None
        assert down(UpSettings.from_environment({}, home=copy.path)) is None
    with original.locked():
        state = original.running()
    assert state is not None
    assert (state.pid, process.poll()) == (process.pid, None)


def test_a_process_that_reuses_the_recorded_id_is_not_stopped(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    home = Home(tmp_path / "home")
    write_state(home, process, started_ticks_ago=1)
    with home.locked(), pytest.raises(Unavailable, match=f"not as process {process.pid} of this machine"):
        down(UpSettings.from_environment({}, home=home.path))
    assert process.poll() is None


def test_a_renamed_home_keeps_its_state(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    write_state(Home(tmp_path / "first"), process)
    (tmp_path / "first").rename(tmp_path / "second")
    home = Home(tmp_path / "second")
    lock = os.open(home.lock, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = home.running()
    os.close(lock)
    assert state is not None
    assert state.pid == process.pid
