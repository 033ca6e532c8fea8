"""A service for the demo: `zeta up` as a user would start it, with a home of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from zeta.up.child import end_with_parent
from zeta.up.home import Home, UpState
from zeta_core.system.settings import process_environment

START_SECONDS = 180.0
STOP_SECONDS = 90.0


class DemoFailed(Exception):
    """A step of the demo failed; the message describes it."""


@contextmanager
def running_service(home: Home) -> Generator[UpState]:
    """Run `zeta up` on a free port, and stop it at the end, also after a failure."""
    print("Starting the service (Valkey, API, one worker) ...", flush=True)
    # Settings of a service that this user is already running must not affect this one.
    variables = {name: value for name, value in process_environment().items() if not name.startswith("ZETA_")}
    log_file = home.path.with_name("up.log")
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zeta", "up", "--home", str(home.path), "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            process_group=0,  # a Ctrl-C in the terminal reaches only this process, which stops `zeta up` itself
            preexec_fn=end_with_parent(signal.SIGINT),
        )
    try:
        yield _ready(process, home, log_file)
    finally:
        _stop(process)


def _ready(process: subprocess.Popen[bytes], home: Home, log_file: Path) -> UpState:
    deadline = time.monotonic() + START_SECONDS
    while True:
        state = home.running()
        if state is not None and state.state == "ready":
            print(f"The service is ready at {state.url}.", flush=True)
            return state
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            raise DemoFailed(f"`zeta up` exited before it was ready:\n{log_file.read_text(errors='replace')[-2000:]}")
        if time.monotonic() >= deadline:
            raise DemoFailed(f"`zeta up` was not ready within {START_SECONDS:g} s.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop `zeta up`, or kill it (and with it its children) after `STOP_SECONDS` or a second Ctrl-C."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_SECONDS)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
        raise
