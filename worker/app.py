"""The worker's entry point: reads the settings, configures logging, locks the worker's name and runs the supervisor."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence

from worker.run.launch import TRAINER_COMMAND
from worker.settings import WorkerSettings
from worker.supervisor import Supervisor
from worker.threads import GuardLimits
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.wire.messages import new_incarnation
from zeta_core.system.artifact_store import open_store
from zeta_core.system.distribution import version
from zeta_core.system.file_identity import FileIdentity
from zeta_core.system.home_folder import require_protected
from zeta_core.system.log_format import log_to_standard_error
from zeta_core.system.sandbox import SandboxSupport, probe

EX_USAGE = 2
THREAD_EXIT_SECONDS = 3.0  # for the threads to end before the process exits
DEFAULT_LIMITS = GuardLimits()

logger = logging.getLogger(__name__)


def main(command: Sequence[str] = TRAINER_COMMAND, limits: GuardLimits = DEFAULT_LIMITS) -> int:
    """Run a worker with the settings of this process until it is stopped; returns the exit status.

    ``command`` starts a run; the run directory is appended to it. ``limits`` define when a worker that
    keeps failing, or hangs, gives up. Exits the process if a thread is stuck.
    """
    log_to_standard_error()
    # These log two lines per message, and one line per retry in an outage, which our own messages report once.
    for chatty in ("celery.worker.strategy", "celery.app.trace", "celery.worker.consumer.connection"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
    status = _run(command, limits)
    end_stuck_threads(status)
    return status


def end_stuck_threads(status: int) -> None:
    """Exit the process with ``status`` if threads are stuck, because Python would wait for them indefinitely.

    A thread can be stuck in a hanging artifact store (a network file system whose server is down) or in a check. It is
    safe to interrupt it, as a power failure would: the next start detects incomplete work.
    """
    deadline = time.monotonic() + THREAD_EXIT_SECONDS
    others = [
        thread for thread in threading.enumerate() if thread is not threading.current_thread() and not thread.daemon
    ]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    if stuck := [thread.name for thread in others if thread.is_alive()]:
        logger.warning(
            "Exiting although these threads are still running: %s.", ", ".join(stuck), extra={"action": "stuck"}
        )
        logging.shutdown()
        os._exit(status)


def _run(command: Sequence[str], limits: GuardLimits) -> int:
    try:
        settings = WorkerSettings.of_this_process()
        require_protected(settings.home)
        lock, folder_id = _lock_name(settings)
        try:
            incarnation = new_incarnation(folder_id)
            _check_store(settings)
            return Supervisor(
                settings, incarnation, version=version(), command=command, limits=limits, sandbox=_sandbox(settings)
            ).run()
        finally:
            os.close(lock)
    except InvalidSettings as error:
        print(error.message, file=sys.stderr)
        return EX_USAGE


def _check_store(settings: WorkerSettings) -> None:
    """Raise `InvalidSettings` if the artifact store refuses access; an outage only delays jobs."""
    store = open_store(settings)
    try:
        store.check_access()
    except OSError as error:
        logger.warning("The artifact store %s does not respond: %s", store, error, extra={"action": "store"})


def _sandbox(settings: WorkerSettings) -> SandboxSupport | None:
    """What can confine runs on this machine; ``None`` if it is switched off. Raises `InvalidSettings`."""
    if settings.sandbox == "off":
        logger.warning("Runs are not confined to a sandbox, because ZETA_SANDBOX is off.", extra={"action": "sandbox"})
        return None
    support = probe()  # before this process starts threads
    if settings.sandbox == "required" and not support.is_available:
        raise InvalidSettings(
            f"ZETA_SANDBOX is 'required', but this machine offers no sandbox: {support.problem}; use a machine that "
            "does, or set ZETA_SANDBOX=auto to run jobs without one.",
            param="ZETA_SANDBOX",
        )
    for gap in support.gaps:
        logger.warning("%s", gap, extra={"action": "sandbox"})
    return support


def _lock_name(settings: WorkerSettings) -> tuple[int, str]:
    """The lock's descriptor, and the identifier of this worker's folder.

    Two workers with the same name in one home would adopt each other's runs. The identifier distinguishes this
    folder from one with the same name elsewhere, whose worker doesn't know the runs that were started here.
    """
    root, name = settings.root, settings.worker_name
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(settings.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InvalidSettings(
            f"ZETA_WORKER_NAME is {name!r}, but a worker with that name already runs in {root}; choose another name.",
            param="ZETA_WORKER_NAME",
        ) from error
    return descriptor, _folder_id(descriptor)


def _folder_id(lock: int) -> str:
    """The folder's identifier, from its lock file. A copied folder gets a new one, because it has no runs."""
    text = os.pread(lock, 200, 0).decode("ascii", "replace").strip()
    folder_id, _, recorded = text.partition(" ")
    identity, earlier = FileIdentity.of(lock), FileIdentity.parse(recorded)
    is_new = not folder_id or (earlier is not None and not earlier.is_same_file(identity))
    if is_new:
        folder_id = secrets.token_hex(8)
    content = f"{folder_id} {identity}"
    if content != text:
        try:
            os.ftruncate(lock, os.pwrite(lock, f"{content}\n".encode(), 0))
        except OSError:
            if is_new:
                raise
    return folder_id
