"""How much of a worker's machine is in use: measured by the worker, and kept by the server for some time."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_HOURS = 168  # that the server keeps

Share = Annotated[float, Field(ge=0, le=1)]
NumBytes = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Model(BaseModel):
    """Frozen. Fields of a newer worker or server are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class GpuUsage(_Model):
    device: str = Field(max_length=200, description="the GPU's number or UUID, as in CUDA_VISIBLE_DEVICES")
    utilization: Share | None = Field(
        default=None, description="share of the time in which the GPU computed; null for a MIG instance"
    )
    memory_bytes: NumBytes = Field(description="memory in use, also by other programs")


class MachineUsage(_Model):
    """The usage of a machine at one time. ``cpu`` and ``memory_bytes`` include other programs."""

    measured_at: datetime
    cpu: Share = Field(description="share of the worker's cores in use")
    memory_bytes: NumBytes = Field(description="memory in use, of the worker's memory_bytes")
    gpus: list[GpuUsage] = []

    def gpu_figures(self, devices: tuple[str, ...]) -> dict[str, float]:
        """The mean utilization of these GPUs, and the memory in use on the fullest one, as far as they are known."""
        gpus = [gpu for gpu in self.gpus if gpu.device in devices]
        known = [gpu.utilization for gpu in gpus if gpu.utilization is not None]
        figures: dict[str, float] = {}
        if known:
            figures["gpu_utilization"] = round(sum(known) / len(known), 3)
        if gpus:
            figures["gpu_memory_bytes"] = max(gpu.memory_bytes for gpu in gpus)
        return figures


class GpuUsageCurves(_Model):
    """The usage of one GPU, with one entry for each time of the `WorkerUsage`."""

    device: str
    name: str | None = Field(default=None, description="the model of the GPU; null if the worker no longer has it")
    utilization: list[float | None]
    memory_bytes: list[int | None]


class WorkerUsage(_Model):
    """The usage of a worker's machine over time: arrays of equal length, oldest first.

    Each entry is the mean over an interval that starts at ``at``. Intervals in which the worker was not connected are
    missing.
    """

    object: Literal["worker_usage"] = "worker_usage"
    worker: str
    interval_seconds: int
    at: list[datetime]
    cpu: list[float]
    memory_bytes: list[int]
    gpus: list[GpuUsageCurves]
