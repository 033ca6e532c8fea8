"""The worker's entry point: settings, log, the lock on its name, and the supervising loop."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from worker.settings import WorkerSettings
from worker.supervise import Supervisor
from worker.training.launch import TRAINER_COMMAND
from zeta_core.contract.distribution import version
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.identity import FileIdentity
from zeta_core.contract.messages import new_incarnation

EX_USAGE = 2
LEAVE_SECONDS = 3.0

logger = logging.getLogger(__name__)


def main(command: Sequence[str] = TRAINER_COMMAND) -> int:
    """Run a worker with the settings of this process until it is told to stop; returns the exit status.

    ``command`` starts a training; the run directory is added to it. The process is ended here where a thread is stuck.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Two lines for each message, and in an outage, of which our own lines speak once, one for each new try.
    for chatty in ("celery.worker.strategy", "celery.app.trace", "celery.worker.consumer.connection"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
    status = _run(command)
    end_stuck_threads(status)
    return status


def end_stuck_threads(status: int) -> None:
    """End the process with ``status`` where threads do not end by themselves, for whom Python would wait for ever.

    Such a one waits for an artifact store that hangs (a network file system whose server is away), or for the answer to
    a check. Whatever it was at, it may be cut off there, as by a power cut: the next start finds what is not whole.
    """
    deadline = time.monotonic() + LEAVE_SECONDS
    others = [one for one in threading.enumerate() if one is not threading.current_thread() and not one.daemon]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    if stuck := [thread.name for thread in others if thread.is_alive()]:
        logger.warning("The process ends without its thread(s) %s.", ", ".join(stuck), extra={"action": "stuck"})
        logging.shutdown()
        os._exit(status)


def _run(command: Sequence[str]) -> int:
    try:
        settings = WorkerSettings.of_this_process()
        lock, place = _lock_name(settings.root, settings.worker_name)
        try:
            return Supervisor(settings, new_incarnation(place), version=version(), command=command).run()
        finally:
            os.close(lock)
    except InvalidSettings as error:
        print(error.message, file=sys.stderr)
        return EX_USAGE


def _lock_name(root: Path, name: str) -> tuple[int, str]:
    """The lock, and the name that this folder got when it was made.

    Two workers of one name on one home would take each other's trainings for their own; one that starts in another
    folder must not be taken for the one that knows what was left in this.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InvalidSettings(
            f"ZETA_WORKER_NAME is {name!r}, and a worker of that name already runs in {root}; choose another name.",
            param="ZETA_WORKER_NAME",
        ) from error
    return descriptor, _place_of(descriptor)


def _place_of(lock: int) -> str:
    """The folder's name, from its lock file; a copied folder gets a name of its own, because it knows no training."""
    text = os.pread(lock, 200, 0).decode("ascii", "replace").strip()
    place, _, recorded = text.partition(" ")
    here, known = FileIdentity.of(lock), FileIdentity.parse(recorded)
    is_new = not place or (known is not None and not known.is_same_file(here))
    if is_new:
        place = secrets.token_hex(8)
    present = f"{place} {here}"
    if present != text:
        try:
            os.ftruncate(lock, os.pwrite(lock, f"{present}\n".encode(), 0))
        except OSError:
            if is_new:
                raise
    return place
