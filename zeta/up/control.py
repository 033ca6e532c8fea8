"""Controlling a `zeta up` in another process: starting it in the background, and stopping it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from threading import Event

from zeta.up.home import Home, UpState
from zeta.up.service import READY_SECONDS, WORKER_MARGIN_SECONDS
from zeta.up.settings import UpSettings, tls_variables
from zeta_core.contract.errors import InvalidSettings, Unavailable

PROBE_SECONDS = 0.1
WRONG_SETTING = 2  # the exit status of `zeta up`, see docs/commands.md


def detach(settings: UpSettings, variables: Mapping[str, str]) -> UpState:
    """Start `zeta up` in its own session, with its output in ``logs/up.log``, and return when it is ready.

    If it exits before, its last line of output is raised as `InvalidSettings` or `Unavailable`.
    """
    home = Home(settings.home)
    home.create()
    log_file = home.logs / "up.log"
    environment = {
        **variables,
        **tls_variables(settings),
        "ZETA_HOME": str(settings.home),
        "ZETA_HOST": settings.host,
        "ZETA_PORT": str(settings.port),
    }
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zeta", "up"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home.path,
            env=environment,
            start_new_session=True,
        )
    deadline = time.monotonic() + 2 * READY_SECONDS
    while True:
        state = home.running()
        if state is not None and state.pid == process.pid and state.state == "ready":
            return state
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PROBE_SECONDS)
            lines = log_file.read_text(errors="replace").strip().splitlines() or ["`zeta up` exited without output."]
            sentence = lines[-1].removeprefix("Error: ")
            if process.returncode == WRONG_SETTING:
                raise InvalidSettings(sentence)
            raise Unavailable(sentence, code="not_started")
        if time.monotonic() >= deadline:
            process.terminate()
            raise Unavailable(
                f"`zeta up` is not ready after {2 * READY_SECONDS:g} s; see {log_file}.", code="not_ready"
            )


def down(settings: UpSettings) -> UpState | None:
    """Stop the `zeta up` of this home and wait until it has exited. Returns ``None`` if none is running.

    Raises `Unavailable` if it does not exit within its grace period, or if its process is not on this machine.
    """
    home = Home(settings.home)
    state = home.running()
    if state is None:
        return None
    if not state.is_alive:
        raise Unavailable(
            f"A `zeta up` is running in {home.path}, but not as process {state.pid} of this machine; "
            "stop it where it was started (in its container or on its machine).",
            code="not_here",
        )
    deadline = time.monotonic() + settings.stop_grace_seconds + 2 * WORKER_MARGIN_SECONDS + 30
    with contextlib.suppress(ProcessLookupError):
        os.kill(state.pid, signal.SIGTERM)
    while home.running() is not None or not _has_ended(state.pid):  # the lock is released just before the exit
        if time.monotonic() >= deadline:
            raise Unavailable(f"Process {state.pid} did not exit; see {home.logs}, or kill it.", code="not_stopped")
        Event().wait(PROBE_SECONDS)
    return state


def _has_ended(pid: int) -> bool:
    """Whether the process has exited. On Linux, a zombie counts as exited."""
    try:
        if sys.platform != "linux":
            os.kill(pid, 0)
            return False
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 0)[0])
    finally:
        os.close(process)
