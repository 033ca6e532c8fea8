"""Simulated NVIDIA GPUs: a library in the place of the driver's (NVML) reports the GPUs that a test describes.

Worker processes that are started with its `environment` offer these GPUs. Nothing can be computed on them; runs see
them in ``CUDA_VISIBLE_DEVICES``.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
LIBRARY = "libnvidia-ml.so.1"
H100 = "NVIDIA H100 80GB HBM3"
UNREADABLE_XID = 999999  # with this one, the driver fails to report critical errors of any GPU


@dataclass(frozen=True)
class SimulatedGpu:
    """``instances`` are the UUIDs of its MIG instances; it is in MIG mode if there are any."""

    name: str = H100
    memory_bytes: int = 80 * 10**9
    used_bytes: int = 0
    process_id: int = 0
    ecc_errors: int = 0
    rows_pending: int = 0
    rows_failed: int = 0
    xid: int = 0
    instances: tuple[str, ...] = ()
    utilization_percent: int = 0

    def lines(self, uuid: str) -> list[str]:
        memory = (self.memory_bytes, self.used_bytes, self.process_id)
        state = (self.ecc_errors, self.rows_pending, self.rows_failed, self.xid)
        share = (self.memory_bytes // 7, 0, 0)
        lines = [(uuid, uuid, self.name, *memory, *state, int(bool(self.instances)), self.utilization_percent)]
        lines += [(each, uuid, f"{self.name} MIG 1g.10gb", *share, 0, 0, 0, 0, 1, 0) for each in self.instances]
        return [";".join(map(str, line)) for line in lines]


class SimulatedGpus:
    def __init__(self, folder: Path) -> None:
        """Compile the library into ``folder``; use `can_simulate` first."""
        compiler = shutil.which("cc")
        assert compiler is not None
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / LIBRARY), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        self._file = folder / "gpus"
        self.environment = {"LD_LIBRARY_PATH": str(folder), "NVML_STATE": str(self._file)}

    def set(self, gpus: Sequence[SimulatedGpu]) -> None:
        """Replace the GPUs, whose UUIDs are ``GPU-0``, ``GPU-1`` and so on."""
        lines = [line for number, gpu in enumerate(gpus) for line in gpu.lines(f"GPU-{number}")]
        new = self._file.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self._file)


def can_simulate() -> bool:
    """Whether there is a C compiler, on Linux."""
    return shutil.which("cc") is not None and sys.platform == "linux"
