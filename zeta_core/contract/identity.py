"""Tells a file from a copy of it, and a process from a later one with the same id.

A rename keeps a file's device and inode numbers; a copy (``cp -a``, a restored backup, a snapshot mounted beside the
original) has other ones. Device numbers may change with every boot, so after a reboot the inode number alone decides.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4)


@dataclass(frozen=True)
class FileIdentity:
    """Which file a path or a descriptor names, as far as this machine can tell."""

    device: int
    inode: int
    boot: str = ""  # empty where the system has no id for a boot

    @classmethod
    def of(cls, file: Path | str | int) -> FileIdentity:
        """The identity of a file now. Raises `OSError`."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, _boot_id())

    @classmethod
    def parse(cls, text: str) -> FileIdentity | None:
        """The identity that `str` wrote; ``None`` for any other text."""
        numbers, _, boot = text.strip().partition(" ")
        device, _, inode = numbers.partition(":")
        return cls(int(device), int(inode), boot) if device.isdecimal() and inode.isdecimal() else None

    @property
    def key(self) -> str:
        """``DEVICE:INODE``, which is unique on a machine until it is rebooted."""
        return f"{self.device}:{self.inode}"

    def __str__(self) -> str:
        return f"{self.key} {self.boot}".rstrip()

    def is_same_file(self, other: FileIdentity) -> bool:
        return self.inode == other.inode and (self.device == other.device or self.boot != other.boot)


def process_start(pid: int) -> int | None:
    """When the process was started, in clock ticks since the boot; ``None`` where there is none, or not on Linux."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[19])  # field 22 of proc(5), counted after the name in parentheses


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""  # not Linux
