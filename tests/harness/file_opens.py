"""Observes which files the processes of a service open and write, with Linux's fanotify, which needs root.

``python -m tests.harness.file_opens RULES`` observes the file systems until SIGTERM. It prints one JSON object per
line: a file outside the allowed folders that a process of the service has opened or written, and the barriers, which
show that everything before them has been reported. A process that ended before it could be identified is ignored,
except if it opened a canary, which nothing may open.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.harness.waiting import wait_until

_INIT_FLAGS, _EVENT_FLAGS = 0x01 | 0x10, os.O_RDONLY | os.O_CLOEXEC  # FAN_CLOEXEC | FAN_UNLIMITED_QUEUE
_ADD_TO_FILE_SYSTEM = 0x01 | 0x100  # FAN_MARK_ADD | FAN_MARK_FILESYSTEM
_OPENED, _WRITTEN = 0x20, 0x08  # FAN_OPEN, FAN_CLOSE_WRITE
_AT_WORKING_DIRECTORY = -100
_EVENT = struct.Struct("IBBHQii")  # length, version, reserved, length of this part, mask, descriptor, process
_READ_BYTES = 1 << 16
_COMMAND_LENGTH = 120
_KNOWN_SECONDS = 1.0  # for which the kind of a process is remembered; its id may be reused


@dataclass(frozen=True)
class Rules:
    """What the processes that descend from ``roots`` may open: everything in ``readable`` and ``writable``."""

    roots: list[int]
    readable: list[str]
    writable: list[str]
    canaries: list[str]  # files that nobody but the test may open
    testers: list[int]  # the processes of the test, which are not observed
    barriers: str  # a folder; opening a file in it is reported


@dataclass
class FileObserver:
    """Reads what the observing process prints."""

    output: Path
    barriers: Path
    num_barriers: int = field(default=0)

    def findings(self) -> list[str]:
        """Everything that was not allowed so far, as sentences."""
        self.num_barriers += 1
        barrier = self.barriers / str(self.num_barriers)
        barrier.touch()
        wait_until(lambda: str(barrier) in self.output.read_text(), 60, "the observer to reach the barrier")
        found = map(json.loads, self.output.read_text().splitlines())
        return [f"{line['command']} {line['action']} {line['path']}" for line in found if "command" in line]


@contextmanager
def observed_files(folder: Path, rules: Rules) -> Generator[FileObserver]:
    """Observe until the block ends; ``folder`` is for the output."""
    output = folder / "opened-files.jsonl"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.file_opens", json.dumps(asdict(rules))], stdout=out
        )
    try:
        wait_until(lambda: b"ready" in output.read_bytes() or process.poll() is not None, 60, "the observer")
        assert process.poll() is None, "the observer could not be started"
        yield FileObserver(output, Path(rules.barriers))
    finally:
        process.terminate()
        process.wait()


class _Observer:
    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._kinds: dict[
            int, tuple[float, bool]
        ] = {}  # by process: until when it is valid, and whether it is observed

    def run(self, group: int) -> None:
        while True:
            content = os.read(group, _READ_BYTES)
            at = 0
            while at < len(content):
                length, _, _, _, mask, descriptor, pid = _EVENT.unpack_from(content, at)
                at += length
                try:
                    self._handle(mask, descriptor, pid)
                finally:
                    if descriptor >= 0:
                        os.close(descriptor)

    def _handle(self, mask: int, descriptor: int, pid: int) -> None:
        assert descriptor >= 0, "the queue of events has overflowed"
        path = os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
        if path.startswith(self._rules.barriers):
            _print({"barrier": path})
        if pid in self._rules.testers or pid == os.getpid():
            return
        action = "has written" if mask & _WRITTEN else "has opened"
        allowed = self._rules.writable if mask & _WRITTEN else [*self._rules.readable, *self._rules.writable]
        if "/__pycache__/" in path:
            allowed = [*allowed, *self._rules.readable]
        is_canary = path in self._rules.canaries
        if is_canary or (not _is_in(path, allowed) and self._is_observed(pid)):
            _print({"path": path, "action": action, "command": _command(pid)})

    def _is_observed(self, pid: int) -> bool:
        """Whether the process descends from a root."""
        now = time.monotonic()
        until, observed = self._kinds.get(pid, (0.0, False))
        if now < until:
            return observed
        parent = _parent(pid)
        observed = pid in self._rules.roots or (parent is not None and parent > 1 and self._is_observed(parent))
        self._kinds[pid] = (now + _KNOWN_SECONDS, observed)
        return observed


def _is_in(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def _parent(pid: int) -> int | None:
    """The parent of a process; ``None`` if it has exited."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"process {pid}"
    return b" ".join(words).decode(errors="replace")[:_COMMAND_LENGTH].strip() or f"process {pid}"


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(rules: Rules) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    group = libc.fanotify_init(_INIT_FLAGS, _EVENT_FLAGS)
    if group < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    for folder in ("/", rules.barriers):
        mask = ctypes.c_uint64(_OPENED | _WRITTEN)
        if libc.fanotify_mark(group, _ADD_TO_FILE_SYSTEM, mask, _AT_WORKING_DIRECTORY, folder.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"fanotify_mark of {folder}")
    _print({"ready": True})
    with suppress(KeyboardInterrupt):
        _Observer(rules).run(group)


if __name__ == "__main__":
    main(Rules(**json.loads(sys.argv[1])))
