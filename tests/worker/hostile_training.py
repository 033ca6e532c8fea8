"""A training that has been taken over: it enters the sandbox as every run does, and then attacks everything it can.

``python hostile_training.py RUN_DIR``. The metadata of its spec names its targets. It writes what became of each attack
to ``attacks.json``: ``denied`` with the error, or ``done``. ``escaped.pid`` names a process that tries to outlive it.
With ``bomb`` in the metadata, it only creates processes without end.
"""

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.wire.run_directory import JOURNAL_FILE, RUN_FILE
from zeta_core.system import sandbox

PTRACE_ATTACH = 16
PR_SET_DUMPABLE = 4  # a process that is not dumpable hides its files from other processes of the same user
MAX_DESCRIPTORS = 1024
HUGE_BYTES = 2**41  # more than ZETA_JOB_FILE_BYTES, and less than the limit of common file systems
FIOCLEX = 0x5451  # close a descriptor when the next program starts


def read(path: str) -> str:
    return Path(path).read_bytes()[:100].decode(errors="replace")


def write(path: str) -> None:
    Path(path).write_text("changed")


def trace(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def connect(address: tuple[str, int]) -> None:
    socket.create_connection(address, timeout=5).close()


def open_descriptor_of(pid: int) -> str:
    """Open a file that another process has open; the names of its descriptors may be listed."""
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            os.close(os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK))
            return descriptor
    raise PermissionError


def let_go_of_the_lock() -> None:
    """Close and unlock every descriptor but the standard streams."""
    for descriptor in range(3, MAX_DESCRIPTORS):
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        with suppress(OSError):
            fcntl.ioctl(descriptor, FIOCLEX)
        with suppress(OSError):
            os.dup2(0, descriptor, inheritable=False)
        with suppress(OSError):
            os.close(descriptor)
    os.closerange(3, MAX_DESCRIPTORS)


def escape(pid_file: Path) -> None:
    """Start a program that has nothing in common with this run: no parent, session, environment, folder or lock."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    grandchild = os.fork()
    if grandchild:
        pid_file.write_text(str(grandchild))
        os._exit(0)
    let_go_of_the_lock()
    os.chdir("/")
    os.execve("/bin/sleep", ["sleep", "600"], {})


def attacks(directory: str, output: str, targets: dict[str, str]) -> dict[str, Callable[[], object]]:
    worker, victim, home = int(targets["worker"]), int(targets["victim"]), targets["home"]
    secret, other = targets["secret"], targets["other"]
    return {
        **{f"read {path}": lambda path=path: read(path) for path in json.loads(targets["unreadable"])},
        **{f"list {path}": lambda path=path: os.listdir(path) for path in (home, other, "/tmp")},
        **{f"write {path}": lambda path=path: write(path) for path in json.loads(targets["unwritable"])},
        "read a secret through the root of a process": lambda: read(f"/proc/self/root{secret}"),
        "read the worker's environment": lambda: read(f"/proc/{worker}/environ"),
        "read the worker's memory": lambda: read(f"/proc/{worker}/mem"),
        "use a descriptor of the worker": lambda: open_descriptor_of(worker),
        "read the other job's environment": lambda: read(f"/proc/{victim}/environ"),
        "trace the worker": lambda: trace(worker),
        "signal the worker": lambda: os.kill(worker, 0),
        "signal the other job": lambda: os.kill(victim, 0),
        "limit the worker": lambda: resource.prlimit(worker, resource.RLIMIT_NOFILE, (8, 8)),
        "slow the worker down": lambda: os.setpriority(os.PRIO_PROCESS, worker, 19),
        "bind the worker to one core": lambda: os.sched_setaffinity(worker, [0]),
        "link to a secret": lambda: os.symlink(secret, f"{output}/symbolic"),
        "link hard to a secret": lambda: os.link(secret, f"{output}/hard"),
        "make a pipe": lambda: os.mkfifo(f"{output}/pipe"),
        "replace the log by a pipe": lambda: os.mkfifo(f"{directory}/pipe"),
        "remove its lock": lambda: os.unlink(f"{directory}/lock"),
        "replace its lock": lambda: os.rename(f"{directory}/run.json", f"{directory}/lock"),
        "remove the secret": lambda: os.unlink(secret),
        "truncate the secret": lambda: os.truncate(secret, 0),
        "make a huge file": lambda: os.truncate(os.open(f"{output}/huge", os.O_CREAT | os.O_RDWR), HUGE_BYTES),
        "allow itself huge files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (HUGE_BYTES, HUGE_BYTES)),
        "create a user namespace": lambda: ctypes_call("unshare", 0x10000000),
        "hide from the worker": lambda: ctypes_call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0),
        "reach Redis": lambda: connect(("127.0.0.1", int(targets["redis_port"]))),
        "reach another machine": lambda: connect(("192.0.2.1", 80)),
        "reach a Unix socket": lambda: socket.socket(socket.AF_UNIX),
    }


def ctypes_call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def outcome(attack: Callable[[], object]) -> str:
    try:
        return f"done: {attack()!r:.100}"
    except (OSError, ValueError) as error:  # setrlimit raises a ValueError
        return f"denied: {type(error).__name__}"


def explode() -> None:
    """Create processes without end, each in a session of its own and without a parent that waits for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        if os.fork() == 0:
            os.setsid()


def main(directory: Path) -> int:
    sandbox.enter(directory)
    file: dict[str, Any] = json.loads((directory / RUN_FILE).read_bytes())
    targets = file["spec"]["metadata"]
    if "bomb" in targets:
        explode()
    results = {name: outcome(attack) for name, attack in attacks(str(directory), file["output_dir"], targets).items()}
    os.chmod(targets["secret"], 0o777)  # appears to succeed
    escape(directory / "escaped.pid")
    (directory / "attacks.json").write_text(json.dumps(results))
    line = StatusLine(status=JobStatus.FAILED, reason=StatusReason.TRAIN_ERROR, message="The attacks are over.")
    with (directory / JOURNAL_FILE).open("a") as journal:
        journal.write(line.model_dump_json(exclude_none=True) + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
