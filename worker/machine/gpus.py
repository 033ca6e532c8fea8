"""The NVIDIA GPUs of this machine according to the driver (NVML), without using torch.

NVML numbers the GPUs by their position on the bus and ignores ``CUDA_VISIBLE_DEVICES``; a run therefore gets
``CUDA_DEVICE_ORDER=PCI_BUS_ID`` beside its devices. A GPU in MIG mode is divided into instances; each is a device of
its own here, because CUDA can't use the whole GPU then.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

logger = logging.getLogger(__name__)
Handle = Any  # of NVML


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG instance of one.

    ``device`` is its entry in ``CUDA_VISIBLE_DEVICES``: a number or a UUID. ``board`` is the UUID of the whole GPU.
    """

    device: str
    board: str
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    is_mig: bool = False


@contextmanager
def driver() -> Generator[bool]:
    """Whether there is a driver, which can be queried within the context."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False  # a machine without NVIDIA GPUs
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def find_gpus(visible: str | None) -> list[Gpu]:
    """The GPUs that may be used; ``visible`` is the worker's ``CUDA_VISIBLE_DEVICES``."""
    with driver() as is_available:
        if not is_available:
            return []
        number = pynvml.nvmlDeviceGetCount()
        gpus_by_name: dict[str, list[Gpu]] = {}
        for index in range(number):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpus = list(_instances(handle)) or [_gpu(handle, str(index), text(pynvml.nvmlDeviceGetUUID(handle)))]
            gpus_by_name |= {gpu.device: [gpu] for gpu in gpus}
            gpus_by_name |= {str(index): gpus, text(pynvml.nvmlDeviceGetUUID(handle)): gpus}
        words = [str(index) for index in range(number)]
        if visible is not None:
            words = [word.strip() for word in visible.split(",") if word.strip()]
        for word in words:
            if word not in gpus_by_name and word != "-1":
                logger.warning("CUDA_VISIBLE_DEVICES names %r, which the driver does not report; it is ignored.", word)
        return [gpu for word in words for gpu in gpus_by_name.get(word, [])]


def memory_holders(devices: Sequence[str]) -> set[int]:
    """The process ids, according to the driver, that hold memory on these GPUs.

    In a container with its own PID namespace, these are the host's ids, which have no meaning here.
    """
    with driver() as is_available:
        try:
            return {pid for device in devices for pid, _ in processes_on(device)} if is_available else set()
        except pynvml.NVMLError as error:
            names = ", ".join(devices)
            logger.warning("The driver does not report the processes on the GPUs %s: %s.", names, error)
            return set()


def processes_on(device: str) -> list[tuple[int, int | None]]:
    """The processes that compute on a GPU and the memory in bytes that each uses there, if known.

    Raises `pynvml.NVMLError`. Use it within `driver`.
    """
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle_of(device))
    return [(int(process.pid), process.usedGpuMemory) for process in processes]


def handle_of(device: str) -> Handle:
    """The driver's handle of a number or UUID. Raises `pynvml.NVMLError`. Use it within `driver`."""
    if device.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device))
    return pynvml.nvmlDeviceGetHandleByUUID(device.encode())


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _gpu(handle: Handle, device: str, board: str) -> Gpu:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    name, memory = text(pynvml.nvmlDeviceGetName(handle)), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Gpu(device, board, name, memory, (int(major), int(minor)))


def _instances(board: Handle) -> Iterator[Gpu]:
    """The MIG instances of a GPU; none if it isn't in MIG mode."""
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(board)
        number = pynvml.nvmlDeviceGetMaxMigDeviceCount(board) if current else 0
    except pynvml.NVMLError:
        return  # not supported by this GPU
    whole = _gpu(board, "", text(pynvml.nvmlDeviceGetUUID(board)))
    for index in range(number):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(board, index)
        except pynvml.NVMLError:
            continue  # not every index is in use
        uuid, name = text(pynvml.nvmlDeviceGetUUID(instance)), text(pynvml.nvmlDeviceGetName(instance))
        memory = int(pynvml.nvmlDeviceGetMemoryInfo(instance).total)
        yield Gpu(uuid, whole.board, name, memory, whole.compute_capability, is_mig=True)
