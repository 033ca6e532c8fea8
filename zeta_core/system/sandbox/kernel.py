"""Calling the Linux kernel: system calls and process options that Python's `os` doesn't have."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 24, 47, 4
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPGET = {"x86_64": 125, "aarch64": 90}
_CAPABILITY_VERSION = 0x20080522
_NUM_CAPABILITIES = 64
_DAC_OVERRIDE = 1


class SandboxUnavailable(Exception):
    """Processes can't be restricted on this machine. The message is the reason, as a clause."""


def architecture() -> str:
    """``x86_64`` or ``aarch64``. Raises `SandboxUnavailable` on other machines and systems."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _CAPSET or sys.maxsize < 1 << 32:
        raise SandboxUnavailable(f"sandboxes need Linux on x86_64 or aarch64, and this is {sys.platform} on {machine}")
    return machine


def call(number: int, *arguments: Any) -> int:
    """Make a system call. Raises `OSError`."""
    result = _libc().syscall(ctypes.c_long(number), *map(_word, arguments))
    if result < 0:
        raise _last_error()
    return result


def set_process_option(option: int, *arguments: int) -> None:
    """Call prctl(2). Raises `OSError`."""
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc().prctl(ctypes.c_int(option), *words) != 0:
        raise _last_error()


def library_call(name: str, *arguments: Any) -> None:
    """Call a function of the C library that returns 0, or -1 with ``errno``. Raises `OSError`."""
    if getattr(_libc(), name)(*arguments) != 0:
        raise _last_error()


def drop_privileges() -> None:
    """Give up all capabilities, including those that programs of root and set-user-ID programs would gain.

    Only ``CAP_DAC_OVERRIDE`` is kept if the process has it, because a worker of root may use other users' files.
    """
    set_process_option(_PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, for 32 capabilities each
    call(_CAPGET[architecture()], header, sets)
    set_process_option(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(_NUM_CAPABILITIES):
        if capability != _DAC_OVERRIDE:
            try:
                set_process_option(_PR_CAPBSET_DROP, capability)
            except OSError:
                break  # not privileged, or the last capability of this kernel
    kept = sets[1] & (1 << _DAC_OVERRIDE)
    call(_CAPSET[architecture()], header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0))


def _last_error() -> OSError:
    """The error of the last call through `ctypes`."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _word(argument: Any) -> Any:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
