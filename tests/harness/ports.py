"""Ports on the loopback interface."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

LOWEST = 10_000
_held: list[int] = []  # lock files, which stay open and locked until this process ends


def free_loopback_port() -> int:
    """A free TCP port on 127.0.0.1 that stays reserved for this test process.

    The system does not assign it, because it is below the range of ephemeral ports, and other test processes skip it,
    because this one holds a lock on it. Raises `AssertionError` if no port is free.
    """
    folder = Path(tempfile.gettempdir()) / f"zeta-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    candidates = range(LOWEST, _first_ephemeral())
    for port in random.sample(candidates, k=min(1000, len(candidates))):
        lock = os.open(folder / str(port), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
                listener.bind(("127.0.0.1", port))
        except OSError:  # another test has it, or a program listens on it
            os.close(lock)
            continue
        _held.append(lock)
        return port
    raise AssertionError(f"no port from {candidates.start} to {candidates.stop} is free on 127.0.0.1")


def _first_ephemeral() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first = 49_152  # IANA's default
    return first if first > LOWEST + 1000 else 32_768
