"""Measures the usage of this machine: its cores, its memory, and its GPUs according to the driver (NVML).

The figures include all programs, not only the runs of this worker. In a container with limits, they refer to the
container. Driver calls may hang with a broken GPU, so they run in a thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from datetime import datetime, timedelta
from typing import Any

import psutil
import pynvml

from worker.machine.background_check import BackgroundCheck
from worker.machine.devices import control_group_limits, count_cores, words_of
from worker.machine.gpus import Gpu, driver, handle_of
from worker.threads import Outage
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.machine_usage import GpuUsage, MachineUsage

MEASURE_SECONDS = 2.0
MAX_AGE = timedelta(seconds=4 * MEASURE_SECONDS)  # of a measurement that describes the time of a progress line


class UsageMeter:
    """``latest`` is the newest measurement; ``None`` before the first one."""

    def __init__(self, gpus: Sequence[Gpu], executor: Executor) -> None:
        self._gpus = list(dict.fromkeys(gpus))
        self._cores = CoreTime()
        self.outage = Outage("The usage of the GPUs cannot be measured", name="gpu use")
        self._check = BackgroundCheck[list[GpuUsage]](executor, self.outage)
        self._gpu_usage: list[GpuUsage] = []
        self._gpus_measured_at = 0.0  # monotonic
        self._next_measurement = time.monotonic() + MEASURE_SECONDS  # the usage of cores is a difference
        self.latest: MachineUsage | None = None

    def step(self) -> None:
        """Measure if it is time; never waits for the driver, whose figures are those of the previous measurement."""
        now = time.monotonic()
        if now < self._next_measurement:
            return
        self._next_measurement = now + MEASURE_SECONDS
        gpus = self._measured_gpus()
        self.latest = MachineUsage(
            measured_at=utc_now(), cpu=self._cores.share(), memory_bytes=used_memory_bytes(), gpus=gpus
        )

    def with_usage(self, line: Mapping[str, Any], devices: Sequence[str]) -> dict[str, Any]:
        """The journal line; one of training or evaluating also has the usage of the machine when it was written.

        ``devices`` are the GPUs of the run.
        """
        line = dict(line)
        is_measured = line.get("loss") is not None or line.get("eval_loss") is not None
        if self.latest is None or line.get("type") != "progress" or not is_measured:
            return line
        try:
            written_at = datetime.fromisoformat(str(line.get("created_at")))
            if abs(written_at - self.latest.measured_at) > MAX_AGE:
                return line  # a line of an earlier time, for example before an outage
        except (TypeError, ValueError):
            return line
        machine = {"worker_cpu": round(self.latest.cpu, 3), "worker_memory_bytes": self.latest.memory_bytes}
        return {**line, **machine, **self.latest.gpu_figures(tuple(devices))}

    def _measured_gpus(self) -> list[GpuUsage]:
        """The result of the last measurement in the thread, unless it is too old; starts the next one."""
        self._check.finish(self._update_gpus)
        if self._gpus:
            self._check.start(gpu_usage, self._gpus)
        return self._gpu_usage if time.monotonic() - self._gpus_measured_at < MAX_AGE.total_seconds() else []

    def _update_gpus(self, measured: list[GpuUsage]) -> None:
        self._gpu_usage, self._gpus_measured_at = measured, time.monotonic()


class CoreTime:
    """The time that the cores of this process, or of its control group, have worked."""

    def __init__(self) -> None:
        self._measured_at, self._seconds = time.monotonic(), _core_seconds()

    def share(self) -> float:
        """The share of the cores that was in use since the previous call."""
        now, seconds = time.monotonic(), _core_seconds()
        elapsed, worked = now - self._measured_at, seconds - self._seconds
        self._measured_at, self._seconds = now, seconds
        return min(1.0, max(0.0, worked / (elapsed * count_cores()))) if elapsed > 0 else 0.0


def used_memory_bytes() -> int:
    """The memory in use, without the file cache: of the control group if it is limited, else of the machine."""
    if control_group_limits().memory_bytes is not None:
        current = words_of("/sys/fs/cgroup/memory.current")
        statistics = words_of("/sys/fs/cgroup/memory.stat")
        if current and "inactive_file" in statistics:
            cache = int(statistics[statistics.index("inactive_file") + 1])
            return max(0, int(current[0]) - cache)
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def gpu_usage(gpus: Sequence[Gpu]) -> list[GpuUsage]:
    """The usage of each GPU that the driver can reach."""
    with driver() as is_available:
        measured = [_one_gpu(gpu) for gpu in gpus] if is_available else []
    return [usage for usage in measured if usage is not None]


def _one_gpu(gpu: Gpu) -> GpuUsage | None:
    try:
        handle = handle_of(gpu.device)
        used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        return GpuUsage(device=gpu.device, utilization=_utilization(handle), memory_bytes=used)
    except pynvml.NVMLError:
        return None  # `GpuHealth` reports it


def _utilization(handle: Any) -> float | None:
    try:
        return min(1.0, int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100)
    except pynvml.NVMLError_NotSupported:  # pyright: ignore[reportAttributeAccessIssue] - created at import
        return None  # a MIG instance


def _core_seconds() -> float:
    if control_group_limits().cores is not None:
        statistics = words_of("/sys/fs/cgroup/cpu.stat")
        if "usage_usec" in statistics:
            return int(statistics[statistics.index("usage_usec") + 1]) / 1e6
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    times = psutil.cpu_times(percpu=True)
    return sum(_busy(core) for number, core in enumerate(times) if own is None or number in own)


def _busy(core: Any) -> float:
    """The seconds in which a core worked; the time of guests is part of ``user`` and ``nice``."""
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(float(getattr(core, name, 0.0)) for name in names)
