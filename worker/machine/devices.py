"""The resources of this machine: slots (one per visible GPU, or the CPU), cores and memory, without using torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from pydantic import JsonValue

from worker.machine.gpus import Gpu, find_gpus
from worker.settings import WorkerSettings
from zeta_core.system.device_kind import cpu_kind, gpu_kind

FIRST_WITH_BF16 = 8  # major compute capability, Ampere, as in torch.cuda.is_bf16_supported


@dataclass(frozen=True)
class Slot:
    """The resources for one run, or for one process of a run with several; ``gpu`` is ``None`` on a CPU."""

    slot: int
    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    gpu: Gpu | None = None
    supports_bf16: bool = False
    device_kind: str | None = None

    @property
    def device(self) -> str | None:
        """Its entry in ``CUDA_VISIBLE_DEVICES``; ``None`` on a CPU."""
        return None if self.gpu is None else self.gpu.device


def find_slots(settings: WorkerSettings, environment: Mapping[str, str]) -> list[Slot]:
    """The slots, numbered from 0. More slots than GPUs share them in turn; fewer leave the last GPUs unused.

    ``environment`` is the worker's: its variables that select kernels reach every run.
    """
    gpus = find_gpus(settings.cuda_visible_devices)
    if not gpus:
        number, kind = settings.worker_slots or 1, cpu_kind(environment)
        memory = memory_bytes() // number
        return [Slot(slot, "cpu", f"{count_cores()} cores", memory, device_kind=kind) for slot in range(number)]
    number = settings.worker_slots or len(gpus)
    return [_slot_on(slot, gpus[slot % len(gpus)], environment) for slot in range(number)]


def background_slots(settings: WorkerSettings, slots: Sequence[Slot]) -> list[Slot]:
    """The slots for jobs that need no GPU, numbered after ``slots``. Each may use the memory and cores of one slot."""
    memory, kind = memory_bytes() // len(slots), slots[0].device_kind if slots[0].gpu is None else None
    numbers = range(len(slots), len(slots) + settings.background_slots)
    return [Slot(number, "cpu", "background", memory, device_kind=kind) for number in numbers]


def _slot_on(slot: int, gpu: Gpu, environment: Mapping[str, str]) -> Slot:
    return Slot(
        slot,
        "cuda",
        gpu.name,
        gpu.memory_bytes,
        gpu=gpu,
        supports_bf16=gpu.compute_capability[0] >= FIRST_WITH_BF16,
        device_kind=gpu_kind(gpu.name, gpu.compute_capability, environment),
    )


@dataclass(frozen=True)
class ControlGroupLimits:
    """The limits of this process's control group; ``None`` without a limit."""

    cores: int | None
    memory_bytes: int | None


def control_group_limits() -> ControlGroupLimits:
    quota, memory = words_of("/sys/fs/cgroup/cpu.max"), words_of("/sys/fs/cgroup/memory.max")
    has_quota = len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit()
    return ControlGroupLimits(
        cores=math.ceil(int(quota[0]) / int(quota[1])) if has_quota else None,
        memory_bytes=int(memory[0]) if memory and memory[0].isdigit() else None,
    )


def count_cores() -> int:
    """The cores that this process may use: its affinity, cut by the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = control_group_limits().cores
    return max(1, cores if quota is None else min(cores, quota))


def memory_bytes() -> int:
    """The machine's memory, cut by the control group's limit."""
    total = int(psutil.virtual_memory().total)
    limit = control_group_limits().memory_bytes
    return total if limit is None else min(total, limit)


def words_of(file: str) -> list[str]:
    """The words in a control-group file; empty if the file can't be read."""
    try:
        return Path(file).read_text().split()
    except OSError:
        return []  # not Linux, or another version of control groups: no limit is known


def uses_gpus(spec: Mapping[str, JsonValue]) -> bool:
    """Whether a job uses the GPUs of its slots. The spec may have fields of a newer server, so it isn't validated."""
    resources = spec.get("resources")
    return not (isinstance(resources, dict) and resources.get("gpus") == 0)


def visible_gpus(spec: Mapping[str, JsonValue], slots: Sequence[Slot]) -> tuple[str, ...]:
    """The GPUs of the slots as in ``CUDA_VISIBLE_DEVICES``; empty if the job requested no GPUs."""
    return tuple(slot.device for slot in slots if slot.device is not None) if uses_gpus(spec) else ()
