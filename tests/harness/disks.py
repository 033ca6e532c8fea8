"""A small disk that can be filled: a tmpfs, if this process may mount one (root on Linux)."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

CHUNK_BYTES = 2**20


class SmallDisk:
    """A file system of ``megabytes`` at a new ``directory``; `close` removes it with its contents."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        """Raises `OSError` if it can't be mounted."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.ballast = directory / ".ballast"
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(directory)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            raise OSError(errno.EPERM, f"a tmpfs cannot be mounted ({mounted.stderr.strip()})")

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Fill the disk, except for ``leave_bytes``."""
        with self.ballast.open("ab", buffering=0) as ballast:
            for chunk in (CHUNK_BYTES, 4096, 1):
                with contextlib.suppress(OSError):
                    while self._free_bytes() >= leave_bytes + chunk and ballast.write(b"\0" * chunk) == chunk:
                        pass

    def _free_bytes(self) -> int:
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def free(self) -> None:
        """Free the space that `fill` used."""
        self.ballast.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.directory)], check=True, capture_output=True)


def can_mount() -> bool:
    """Whether small disks can be mounted: as root on Linux, unless a container forbids it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    probe = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return probe.returncode == 0
