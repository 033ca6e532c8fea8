"""Distinguishes a file from its copies, and a process from a later one with the same id.

A rename keeps a file's device and inode numbers; a copy (``cp -a``, a restored backup, a snapshot mounted beside the
original) gets new ones. Device numbers may change at each boot, so after a reboot only the inode number counts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4)


@dataclass(frozen=True)
class FileIdentity:
    """The identity of a file on this machine."""

    device: int
    inode: int
    boot: str = ""  # empty if the system has no boot id

    @classmethod
    def of(cls, file: Path | str | int) -> FileIdentity:
        """The identity of an existing file. Raises `OSError`."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, _boot_id())

    @classmethod
    def parse(cls, text: str) -> FileIdentity | None:
        """The identity from the text that `str` returns; ``None`` for any other text."""
        numbers, _, boot = text.strip().partition(" ")
        device, _, inode = numbers.partition(":")
        return cls(int(device), int(inode), boot) if device.isdecimal() and inode.isdecimal() else None

    @property
    def key(self) -> str:
        """``DEVICE:INODE``, unique on a machine until it reboots."""
        return f"{self.device}:{self.inode}"

    def __str__(self) -> str:
        return f"{self.key} {self.boot}".rstrip()

    def is_same_file(self, other: FileIdentity) -> bool:
        return self.inode == other.inode and (self.device == other.device or self.boot != other.boot)


def process_start(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot; ``None`` if it doesn't exist, or not on Linux."""
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
