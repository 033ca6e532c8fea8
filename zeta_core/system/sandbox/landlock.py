"""Landlock: the kernel lets a process restrict its own access to files, and to other processes.

The rules apply to the calling thread and everything that it starts; they can't be lifted. The numbers are those of
linux/landlock.h (https://docs.kernel.org/userspace-api/landlock.html).
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from zeta_core.system.sandbox.kernel import SandboxUnavailable, call

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_GET_VERSION, _PATH_BENEATH = 1, 1
MIN_ABI = 2  # Linux 5.19; version 1 does not allow hard links between folders, which checkpoints need
SIGNALS_ABI = 6  # Linux 6.12: processes outside can't be signalled

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_NUM_RIGHTS = {2: 14, 3: 15, 4: 15, 5: 16}  # by version; later versions have those of 5
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1, 2
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # those that make sense for a file

LIST = _READ_DIR
READ = _EXECUTE | _READ_FILE | _READ_DIR
DEVICE = _READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL_DEV
ADD = READ | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _MAKE_DIR | _MAKE_SOCK
CHANGE = ADD | _REMOVE_DIR | _REMOVE_FILE | _REFER
CHANGE_WITH_LINKS = CHANGE | _MAKE_SYM | _MAKE_FIFO


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64),
                ("scoped", ctypes.c_uint64))  # fmt: skip


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi_version() -> int:
    """The version of Landlock that the kernel supports. Raises `SandboxUnavailable` if it is missing or too old."""
    try:
        version = call(_CREATE_RULESET, None, 0, _GET_VERSION)
    except OSError as error:
        raise SandboxUnavailable(f"the kernel does not offer Landlock ({error.strerror})") from error
    if version < MIN_ABI:
        raise SandboxUnavailable("the kernel's version of Landlock is too old; Linux 5.19 or later is needed")
    return version


def restrict(rules: Iterable[tuple[str, int]]) -> None:
    """Allow this process only the given rights below each path, and signals only to processes restricted with it.

    Paths that don't exist are skipped. ``PR_SET_NO_NEW_PRIVS`` must be set. Raises `OSError`.
    """
    version = abi_version()
    handled = (1 << _NUM_RIGHTS.get(version, 16)) - 1
    scoped = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= SIGNALS_ABI else 0
    attributes = _RulesetAttributes(handled, 0, scoped)
    size = ctypes.sizeof(attributes) if scoped else 8  # older kernels know only the first field
    ruleset = call(_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    try:
        for path, rights in rules:
            _allow(ruleset, path, rights & handled)
        call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # nothing to allow
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        if rights:
            rule = _PathBeneath(rights, descriptor)
            call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)
