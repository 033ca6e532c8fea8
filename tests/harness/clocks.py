"""A wall clock that jumps under a running process, while the machine's own clock is left alone.

The process is started with a small library of ours in front of the C library, compiled here; every reading of its wall
clock is moved by as many seconds as a shared file says. Its monotonic clock and the times of files are the machine's.
"""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """The clock of the processes that are started with its `environment`."""

    def __init__(self, file: Path, library: Path) -> None:
        self._file = file
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(file)}
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """From now on the clock is ``seconds`` ahead of the machine's (behind it, where negative)."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))


def build_library(folder: Path) -> Path | None:
    """The compiled library; ``None`` where this machine has no C compiler, or is not Linux."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, SOURCE], check=True, capture_output=True)
    return library
