"""``python -m zeta_core fork-server MARK``: imports the libraries once, then starts runs by forking itself.

Guarantees: a forked training has the environment, resource limits, scheduling, descriptors, working directory, session,
signal handlers and marks of one that was started as a program (``python -m zeta_core RUN_DIR``); if any of them cannot
be set, nothing is started and the request is refused. Nothing is forked after the worker has exited, or after a file of
the imported code has changed. The exit of the fork server doesn't affect its runs, apart from their exit status,
which nobody reports then.

The process that forks has no other threads of Python, no child processes but its runs, and no device open. Some
libraries have threads (OpenBLAS, jemalloc); they handle forks themselves.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from zeta_core.contract.wire.fork_server import (
    FORK_SERVER_ARGUMENT,
    FORK_SERVER_VARIABLE,
    MAX_PACKET_BYTES,
    Exited,
    Forked,
    ForkRequest,
    ForkServerReady,
    Refused,
    Stale,
)
from zeta_core.contract.wire.run_directory import ATTEMPT_VARIABLE, JOB_VARIABLE, RUN_VARIABLE
from zeta_core.environment import replace_environment
from zeta_core.process.preloading import CodeFingerprint, UnsafeToFork, preload
from zeta_core.report.library_noise import hide_library_noise
from zeta_core.system import sandbox

CHECK_SECONDS = 30.0  # between two checks of the code's files, which take milliseconds
BECOME_SECONDS = 10.0  # for a forked process to become a run
_IS_TRAINING = b"training"  # what it reports then; anything else is an error
_MARKS = (JOB_VARIABLE, ATTEMPT_VARIABLE, RUN_VARIABLE)
_STATUS_FIELDS = slice(45, 49)  # of /proc/PID/stat after the name: arg_start, arg_end, env_start, env_end (proc(5))


def serve() -> Path | None:
    """Serve requests until the worker exits, and return ``None``; in each forked process, return its run directory."""
    control = socket.socket(fileno=os.dup(0))
    control.set_inheritable(False)
    _replace(0, os.open(os.devnull, os.O_RDONLY))
    hide_library_noise()
    fingerprint = CodeFingerprint()
    try:
        variables = preload()
    except UnsafeToFork as error:
        print(f"Runs are not forked, because {error}.", file=sys.stderr)
        return None
    fingerprint.record()
    # Collections in the runs would otherwise write to, and so copy, all pages with objects.
    gc.collect()
    gc.freeze()
    try:
        return ForkServer(control, fingerprint, variables).run()
    except (BrokenPipeError, ConnectionResetError):
        return None  # the worker has exited


class ForkServer:
    def __init__(self, control: socket.socket, fingerprint: CodeFingerprint, variables: Mapping[str, str]) -> None:
        """``variables`` are the environment variables that the imports set, which every run gets as well."""
        self._control = control
        self._fingerprint = fingerprint
        self._variables = dict(variables)
        self._trainings: dict[int, int] = {}  # process id by pidfd
        self._worker = os.getppid()
        self._is_stale = False

    def run(self) -> Path | None:
        self._send(ForkServerReady(memory_bytes=_resident_bytes()))
        control = self._control.fileno()
        while True:
            readable, _, _ = select.select([control, *self._trainings], [], [], CHECK_SECONDS)
            for descriptor in readable:
                if descriptor != control:
                    self._report_exit(descriptor)
            if not readable and not self._is_stale and (changed := self._fingerprint.change()):
                self._is_stale = True
                self._send(Stale(reason=_changed(changed)))
            if control in readable:
                packet, descriptors, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, 2)
                if not packet or os.getppid() != self._worker:
                    return None  # the worker has exited; a request that it sent before may be outdated
                for descriptor in descriptors:
                    os.set_inheritable(descriptor, False)
                run_directory = self._handle(packet, descriptors)
                if run_directory is not None:
                    return run_directory

    def _handle(self, packet: bytes, descriptors: list[int]) -> Path | None:
        """Answer a request. Returns the run directory in the forked process, and ``None`` in the fork server."""
        try:
            request = ForkRequest.model_validate_json(packet)
            lock, log = descriptors
        except (ValidationError, ValueError) as error:
            answer: BaseModel = Refused(reason=f"the request is invalid ({error})")
        else:
            changed = self._fingerprint.change()
            if changed is not None:
                self._is_stale = True
                answer = Refused(reason=_changed(changed), is_stale=True)
            else:
                forked = self._fork(request, lock, log)
                if isinstance(forked, Path):
                    return forked
                answer = forked
        for descriptor in descriptors:
            os.close(descriptor)
        self._send(answer)
        return None

    def _fork(self, request: ForkRequest, lock: int, log: int) -> Path | Forked | Refused:
        result, outcome = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(result)
            os.close(outcome)
            return Refused(reason=f"it can't be forked ({error})")
        if pid == 0:
            try:
                self._control.close()
                for descriptor in (result, *self._trainings):
                    os.close(descriptor)
                self._trainings.clear()
                _become_run(request, self._variables, lock, log)
                os.write(outcome, _IS_TRAINING)
                os.close(outcome)
                return Path(request.run_directory)
            except BaseException as error:  # noqa: BLE001 - this process must not continue as a second fork server
                os.write(outcome, f"{type(error).__name__}: {error}".encode()[:500])
                os._exit(1)
        os.close(outcome)
        ready, _, _ = select.select([result], [], [], BECOME_SECONDS)
        reported = os.read(result, 1000) if ready else b"it takes too long"
        os.close(result)
        if reported == _IS_TRAINING:
            self._trainings[os.pidfd_open(pid)] = pid
            return Forked(pid=pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Refused(reason=f"the forked process failed ({reported.decode(errors='replace') or 'it was killed'})")

    def _report_exit(self, descriptor: int) -> None:
        pid = self._trainings.pop(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        self._send(Exited(pid=pid, status=os.waitstatus_to_exitcode(status)))

    def _send(self, message: BaseModel) -> None:
        self._control.send(message.model_dump_json().encode())


def _become_run(request: ForkRequest, variables: Mapping[str, str], lock: int, log: int) -> None:
    """Give this forked process everything that ``python -m zeta_core RUN_DIR`` would have been started with."""
    os.setsid()
    for number, limits in request.resource_limits.items():
        if resource.getrlimit(number) != limits:
            resource.setrlimit(number, limits)
    os.umask(request.umask)
    os.sched_setaffinity(0, request.cpus)
    if (difference := request.niceness - os.getpriority(os.PRIO_PROCESS, 0)) != 0:
        os.nice(difference)
    os.chdir(request.run_directory)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.set_inheritable(lock, True)  # as for a started program: processes that the run starts may share it
    replace_environment({**request.environment, **variables})
    sys.argv[1:] = sys.orig_argv[-2:] = [request.run_directory]
    _write_marks({name: request.environment[name] for name in _MARKS}, request.run_directory)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # `random` does this after a fork; torch begins with a constant
    sandbox.enter(Path(request.run_directory))


def _write_marks(marks: Mapping[str, str], run_directory: str) -> None:
    """Show ``marks`` in /proc/PID/environ, and the run directory in /proc/PID/cmdline. Raises `OSError`.

    Both files show the memory in which the kernel placed the strings when the program was started. The mark of the fork
    server, the last variable and the last argument, reserves the space there. Nothing else refers to it: the variables
    of this process have been replaced, and Python has copied the arguments.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_STATUS_FIELDS]
    arguments_begin, _, environment_begin, _ = map(int, fields)
    environment, arguments = Path("/proc/self/environ"), Path("/proc/self/cmdline")
    block = b"".join(f"{name}={value}\0".encode() for name, value in marks.items())
    _overwrite(environment_begin, environment.read_bytes(), f"{FORK_SERVER_VARIABLE}=".encode(), block)
    shown = environment.read_bytes().split(b"\0")
    if missing := [name for name, value in marks.items() if f"{name}={value}".encode() not in shown]:
        raise OSError(f"{', '.join(missing)} can't be set in {environment}")
    _overwrite(
        arguments_begin,
        arguments.read_bytes(),
        f"{FORK_SERVER_ARGUMENT}\0".encode(),
        os.fsencode(run_directory) + b"\0",
    )


def _overwrite(begin: int, content: bytes, prefix: bytes, block: bytes) -> None:
    """Replace the rest of ``content``, which lies at address ``begin``, from ``prefix`` on by ``block`` and zeros."""
    position = content.rfind(prefix)
    space = len(content) - position
    if position < 0 or len(block) >= space:
        raise OSError(f"there is no space for {len(block)} bytes")
    ctypes.memmove(begin + position, block.ljust(space, b"\0"), space)


def _replace(descriptor: int, by: int) -> None:
    os.dup2(by, descriptor)
    os.close(by)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _changed(path: str) -> str:
    return f"{path} has changed since it was imported"
