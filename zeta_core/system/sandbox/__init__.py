"""Restricts a process to its inputs, its run directory and the libraries, before it reads any input of a user.

Guarantees after `enter`, for this process and everything that it starts:

- It opens no file outside the paths of its `SandboxFile`, and creates, changes and removes nothing outside them.
- It can't read the memory or the environment of processes outside, trace them, or (Linux 6.12) signal them.
- It keeps the run's lock, so its worker finds and kills it, whatever it does to its session and environment.
- If it creates more processes and threads than allowed, all of them are killed (`task_limit`).
- It can't make a file larger than allowed.
- It gains no privileges, and has no capabilities except, if the worker is root, that of ignoring file modes.
- With namespaces, it shares no memory with other processes and, if requested, has no network.

Not guaranteed: that it doesn't see the names, sizes and times of files and the command lines of other processes, and
that it doesn't use up processors, memory or disk space.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from zeta_core.contract.wire.sandbox import SANDBOX_FILE, SandboxFile
from zeta_core.system.sandbox import landlock, namespaces, seccomp
from zeta_core.system.sandbox.kernel import SandboxUnavailable, architecture, drop_privileges
from zeta_core.system.sandbox.task_limit import TaskGuard

__all__ = ["SHARED_MEMORY", "SandboxSupport", "SandboxUnavailable", "enter", "probe", "restrict"]

SHARED_MEMORY = namespaces.SHARED_MEMORY
_TRUNCATE_ABI = 3  # from this version on, Landlock covers truncate(2)
_ENTERED = "ZETA_SANDBOX_ENTERED"  # an environment variable of all processes in a sandbox
_FIRST_LOCK_DESCRIPTOR = 100  # above those that programs choose, and below every limit


@dataclass(frozen=True)
class SandboxSupport:
    """The sandbox features of this machine; ``problem`` is the reason if there is no sandbox, as a clause."""

    landlock: int = 0  # the version of Landlock
    namespaces: bool = False
    limits_tasks: bool = False  # whether the number of processes and threads can be limited
    problem: str | None = None

    @property
    def is_available(self) -> bool:
        return self.problem is None

    @property
    def gaps(self) -> list[str]:
        """The protections that the sandbox of this machine lacks, as sentences for the operator."""
        if not self.is_available:
            return [f"Runs are not confined to a sandbox, because {self.problem}."]
        gaps = list[str]()
        if self.landlock < landlock.SIGNALS_ABI:
            gaps.append("Runs can send signals to other processes of this user, which only Linux 6.12 prevents.")
        if not self.namespaces:
            gaps.append("Runs keep the network of the machine, because it does not allow namespaces.")
        if not self.limits_tasks:
            gaps.append(
                "The number of processes of runs is not limited, because another program filters their system calls."
            )
        return gaps

    def __str__(self) -> str:
        if not self.is_available:
            return "none"
        return f"landlock {self.landlock}, seccomp" + (", namespaces" if self.namespaces else "")


def enter(directory: Path) -> None:
    """Apply the restrictions in ``directory/sandbox.json``, if there is such a file, to this process.

    A process that a restricted one started is restricted already, so nothing is done. The process must have a single
    thread. Raises `SandboxUnavailable`; the process must then exit.
    """
    if os.environ.get(_ENTERED):  # noqa: TID251 - set below, for the processes that this one starts
        return  # one of several processes of a run, whose first process is restricted
    try:
        content = (directory / SANDBOX_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    restrict(SandboxFile.model_validate_json(content))


def restrict(file: SandboxFile) -> None:
    """Restrict this process, which must have a single thread. Raises `SandboxUnavailable`."""
    architecture()
    landlock.abi_version()
    os.environ.update({**file.variables, _ENTERED: "1"})  # noqa: TID251 - this process's own home and folder
    tempfile.tempdir = None  # it may have been read from other variables
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if file.max_file_bytes is not None:
        _limit_files(file.max_file_bytes)
    try:
        guard = None if file.max_tasks in (None, 1) else TaskGuard.start(file.max_tasks, file.limit_file)
        if file.namespaces:
            namespaces.separate(network=file.network)
        kept = _keep_open(file, is_guarded=guard is not None)
        drop_privileges()
        landlock.restrict(_rules(file))
        listener = seccomp.filter_calls(
            lock=kept,
            unix_sockets=file.unix_sockets,
            truncate=landlock.abi_version() >= _TRUNCATE_ABI,
            tasks="none" if file.max_tasks == 1 else "free" if guard is None else "asked",
        )
        if guard is not None and listener is not None and kept is not None:
            guard.watch(listener, kept)
    except OSError as error:
        raise SandboxUnavailable(f"the kernel refused it ({error})") from error


def probe() -> SandboxSupport:
    """Detect the sandbox features of this machine in a forked process. This process must have a single thread."""
    result, outcome = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(outcome, json.dumps(asdict(_detect_support())).encode())
        finally:
            os._exit(0)
    os.close(outcome)
    with os.fdopen(result, "rb") as stream:
        found = stream.read()
    os.waitpid(pid, 0)
    return (
        SandboxSupport(**json.loads(found))
        if found
        else SandboxSupport(problem="the kernel kills processes in a sandbox")
    )


def _detect_support() -> SandboxSupport:
    if sys.platform != "linux":
        return SandboxSupport(problem="it needs Linux")
    try:
        architecture()
        version = landlock.abi_version()
        try:
            namespaces.separate(network=False)
            has_namespaces = True
        except OSError:
            has_namespaces = False
        restrict(SandboxFile(readable=["/"]))
    except SandboxUnavailable as error:
        return SandboxSupport(problem=str(error))
    try:
        seccomp.filter_calls(lock=None, unix_sockets=False, truncate=True, tasks="asked")
        limits_tasks = True
    except OSError:
        limits_tasks = False
    return SandboxSupport(landlock=version, namespaces=has_namespaces, limits_tasks=limits_tasks)


def _limit_files(max_bytes: int) -> None:
    """Limit the size of every file that this process and its children write; they can't raise a hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _keep_open(file: SandboxFile, *, is_guarded: bool) -> int | None:
    """Open the file that marks all processes of the sandbox, which programs inherit; returns its descriptor.

    It is the lock, with a shared lock, or else a file without a name, if a guard needs one.
    """
    if file.lock is not None:
        opened = os.open(file.lock, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(opened, fcntl.LOCK_SH)
    elif is_guarded:
        opened = os.memfd_create("zeta-sandbox")
    else:
        return None
    kept = fcntl.fcntl(opened, fcntl.F_DUPFD, _FIRST_LOCK_DESCRIPTOR)
    os.close(opened)
    return kept


def _rules(file: SandboxFile) -> Iterator[tuple[str, int]]:
    yield from ((path, landlock.READ) for path in file.readable)
    yield from ((path, landlock.LIST) for path in file.listable)
    yield from ((path, landlock.CHANGE_WITH_LINKS) for path in file.writable)
    yield from ((path, landlock.CHANGE) for path in file.outputs)
    yield from ((path, landlock.DEVICE) for path in file.devices)
    if file.namespaces:
        yield namespaces.SHARED_MEMORY, landlock.CHANGE
    if file.run_directory is not None:
        yield file.run_directory, landlock.ADD
