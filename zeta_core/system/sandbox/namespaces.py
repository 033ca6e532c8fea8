"""Namespaces: a separate network with only a loopback interface, separate shared memory and System V IPC.

An unprivileged process also needs a user namespace, in which it keeps its user and group ids. Containers and some
distributions forbid user namespaces.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

from zeta_core.system.sandbox.kernel import library_call

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_NETWORK = 0x00020000, 0x08000000, 0x10000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_SLAVE = 2, 4, 16384, 1 << 19
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - not for temporary files


def separate(*, network: bool) -> None:
    """Move this process, which must have a single thread, into namespaces of its own. Raises `OSError`.

    With ``network`` it keeps the network of the machine.
    """
    wanted = _NEW_MOUNTS | _NEW_IPC | (0 if network else _NEW_NETWORK)
    user, group = os.geteuid(), os.getegid()
    try:
        _unshare(wanted)
    except PermissionError:
        _unshare(wanted | _NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1\n")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1\n")
    library_call("mount", None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None)
    if os.path.isdir(SHARED_MEMORY):
        target, flags = SHARED_MEMORY.encode(), ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
        library_call("mount", b"tmpfs", target, b"tmpfs", flags, b"mode=1777")
    if not network:
        _start_loopback()


def _unshare(flags: int) -> None:
    library_call("unshare", ctypes.c_int(flags))


def _start_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16xH", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH", b"lo", 0))[:18])[0]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH", b"lo", flags | _IFF_UP))
