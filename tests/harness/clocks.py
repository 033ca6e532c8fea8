"""A wall clock that jumps for selected processes, while the machine's clock stays unchanged.

The processes preload a small library, compiled here, that shifts every reading of the wall clock by the number of
seconds in a shared file. The monotonic clock and the times of files are not affected.
"""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class AdjustableClock:
    """The clock of the processes that are started with its `environment`."""

    def __init__(self, file: Path, library: Path) -> None:
        self._file = file
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(file)}
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """Set the clock ``seconds`` ahead of the machine's clock, or behind it if negative."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))


def build_library(folder: Path) -> Path | None:
    """Compile the library; ``None`` without a C compiler or outside Linux."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, SOURCE], check=True, capture_output=True)
    return library
