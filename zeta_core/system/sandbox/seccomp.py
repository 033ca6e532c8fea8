"""A filter of system calls (seccomp) for what Landlock doesn't cover.

- The descriptor of the run's lock can't be closed or unlocked, so the worker finds every process of a run, even one
  that has left its session, parent and environment.
- Modes and owners of files stay; changing them appears to succeed, because libraries do it to their own files.
- Other processes' limits and priorities stay, and no namespaces can be created.
- Each new process and thread needs the permission of a guard, which limits their number (`task_limit`).
- A process can't hide its descriptors from its worker, which finds it by that of the lock.
- Interfaces with a large attack surface that training doesn't need are missing: io_uring, bpf, keyrings, perf events.

Both architectures are little-endian, so the low half of an argument comes first.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from zeta_core.system.sandbox.kernel import architecture, set_process_option
from zeta_core.system.sandbox.kernel import call as system_call

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_DUMPABLE = 22, 2, 4
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE = 1, 1 << 3, 1 << 5  # of seccomp(2)
_ALLOW, _ASK, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000  # system calls with 32-bit pointers on x86_64, which the rules don't name
_LOAD, _RETURN = 0x20, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_RET|BPF_K
_EQUAL, _GREATER, _AT_LEAST, _ANY_BIT = 0x15, 0x25, 0x35, 0x45  # BPF_JMP|BPF_K with JEQ, JGT, JGE, JSET
_F_SETFD = 2
_AF_UNIX = 1
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_SUCCESS = 0
Tasks = Literal["free", "asked", "none"]

# Numbers on (x86_64, aarch64); None: aarch64 has only the newer form.
_NUMBERS: dict[str, tuple[int, int | None]] = {
    "close": (3, 57), "dup2": (33, None), "dup3": (292, 24), "fcntl": (72, 25), "flock": (73, 32),
    "close_range": (436, 436), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "truncate": (76, 45),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "unshare": (272, 97), "setns": (308, 268), "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198),
    "io_uring_setup": (425, 425), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "fork": (57, None), "vfork": (58, None), "prctl": (157, 167),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "ioctl": (16, 29),
}  # fmt: skip


@dataclass(frozen=True)
class _Condition:
    """A comparison of the low 32 bits of an argument; ``negated`` inverts it."""

    argument: int
    comparison: int
    value: int
    negated: bool = False


@dataclass(frozen=True)
class _Rule:
    """If all conditions hold, the call fails with ``error`` without being executed; 0 pretends success.

    If one of them does not hold, or ``error`` is ``None``, the filter returns the action ``otherwise``.
    """

    call: str
    error: int | None
    conditions: tuple[_Condition, ...] = ()
    otherwise: int = _ALLOW


def filter_calls(*, lock: int | None, unix_sockets: bool, truncate: bool, tasks: Tasks = "free") -> int | None:
    """Filter the system calls of this thread and everything that it starts. ``PR_SET_NO_NEW_PRIVS`` must be set.

    ``lock`` is the descriptor to keep. Without ``truncate``, truncating a file by its path fails, which old versions of
    Landlock don't cover. ``tasks`` determines what happens to calls that create processes or threads. If it is
    ``asked``, each of them waits for an answer, and the descriptor of the notifications is returned. Raises `OSError`.
    """
    rules = [*_general_rules(), *_task_rules(tasks), *(() if lock is None else _lock_rules(lock))]
    if not unix_sockets:
        rules.append(_Rule("socket", errno.EACCES, (_Condition(0, _EQUAL, _AF_UNIX),)))
    if not truncate:
        rules.append(_Rule("truncate", errno.EPERM))
    program = b"".join(_program(architecture(), rules))
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 16)
    if tasks == "asked":
        return system_call(
            _SECCOMP[architecture()], _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE, ctypes.byref(header)
        )
    set_process_option(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))
    return None


def _general_rules() -> Iterator[_Rule]:
    for call in ("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"):
        yield _Rule(call, _SUCCESS)
    for call in ("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"):
        yield _Rule(call, errno.EPERM)
    for call in ("setxattrat", "removexattrat", "unshare", "setns", "keyctl", "add_key", "request_key", "bpf"):
        yield _Rule(call, errno.EPERM)
    for call in ("perf_event_open", "userfaultfd"):
        yield _Rule(call, errno.EPERM)
    for call in ("clone3", "io_uring_setup"):  # C libraries fall back to the older calls
        yield _Rule(call, errno.ENOSYS)
    of_another = (_Condition(0, _EQUAL, 0, negated=True),)
    for call in ("prlimit64", "sched_setparam", "sched_setscheduler", "sched_setaffinity", "sched_setattr"):
        yield _Rule(call, errno.EPERM, of_another)
    for call in ("setpriority", "ioprio_set"):
        yield _Rule(call, errno.EPERM, (_Condition(1, _EQUAL, 0, negated=True),))
    hides = (_Condition(0, _EQUAL, _PR_SET_DUMPABLE), _Condition(1, _EQUAL, 1, negated=True))
    yield _Rule("prctl", errno.EPERM, hides)


def _task_rules(tasks: Tasks) -> Iterator[_Rule]:
    action = {"free": _ALLOW, "asked": _ASK, "none": _ERRNO | errno.EAGAIN}[tasks]
    yield _Rule("clone", errno.EPERM, (_Condition(0, _ANY_BIT, _NEW_NAMESPACES),), otherwise=action)
    for call in ("fork", "vfork"):
        yield _Rule(call, None, otherwise=action)


def _lock_rules(lock: int) -> Iterator[_Rule]:
    yield _Rule("close", errno.EPERM, (_Condition(0, _EQUAL, lock),))
    yield _Rule("dup2", errno.EPERM, (_Condition(1, _EQUAL, lock),))
    yield _Rule("dup3", errno.EPERM, (_Condition(1, _EQUAL, lock),))
    yield _Rule("flock", errno.EPERM, (_Condition(0, _EQUAL, lock),))
    yield _Rule("fcntl", errno.EPERM, (_Condition(0, _EQUAL, lock), _Condition(1, _EQUAL, _F_SETFD)))
    yield _Rule("ioctl", errno.EPERM, (_Condition(0, _EQUAL, lock),))  # FIOCLEX closes it in the next program
    includes = (_Condition(0, _GREATER, lock, negated=True), _Condition(1, _AT_LEAST, lock))
    yield _Rule("close_range", errno.ENOSYS, includes)


def _program(machine: str, rules: Sequence[_Rule]) -> Iterator[bytes]:
    """The filter as BPF instructions. The number of the call is loaded once, and a rule that it matches returns."""
    yield _instruction(_LOAD, 4)  # struct seccomp_data: the number at 0, the architecture at 4, arguments from 16
    yield _instruction(_EQUAL, _AUDIT_ARCH[machine], 1, 0)
    yield _instruction(_RETURN, _KILL_PROCESS)
    yield _instruction(_LOAD, 0)
    if machine == "x86_64":
        yield _instruction(_AT_LEAST, _X32_BIT, 0, 1)
        yield _instruction(_RETURN, _ERRNO | errno.ENOSYS)
    for rule in rules:
        number = _NUMBERS[rule.call][machine == "aarch64"]
        if number is None:
            continue
        body = [*_tests(rule.conditions)]
        if rule.error is not None:
            body.append(_instruction(_RETURN, _ERRNO | rule.error))
        if rule.conditions or rule.error is None:
            body.append(_instruction(_RETURN, rule.otherwise))
        yield _instruction(_EQUAL, number, 0, len(body))
        yield from body
    yield _instruction(_RETURN, _ALLOW)


def _tests(conditions: Sequence[_Condition]) -> Iterator[bytes]:
    """Two instructions per condition: the first that doesn't hold skips the rest and the return of the error."""
    for index, condition in enumerate(conditions):
        skip = 2 * (len(conditions) - index - 1) + 1
        yield _instruction(_LOAD, 16 + 8 * condition.argument)
        if_true, if_false = (skip, 0) if condition.negated else (0, skip)
        yield _instruction(condition.comparison, condition.value, if_true, if_false)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
