"""Finds GPUs that must not be assigned: faulty ones, and those that other programs use.

The driver (NVML) reports uncorrectable memory errors, rows of memory that must be or can't be remapped, critical errors
(Xids) since this worker was started, and the processes on each GPU. Driver calls may hang with a broken GPU, so they
run in a thread. Slots whose GPU a job of this worker uses are not checked for other programs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import pynvml

from worker.machine.background_check import BackgroundCheck
from worker.machine.gpus import Gpu, driver, handle_of, processes_on, text
from worker.threads import Outage

CHECK_SECONDS = 5.0
NOT_CHECKED = "The driver has not reported its state yet."
BUSY_SHARE = 0.05  # of the memory; a desktop or a monitoring tool uses less
# Errors of a program, not of the GPU (https://docs.nvidia.com/deploy/xid-errors), as in NVIDIA's k8s-device-plugin,
# internal/rm/health.go.
XIDS_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 109})

logger = logging.getLogger(__name__)


class GpuHealth:
    """``problems`` maps a device to the reason why it must not be assigned, as a sentence."""

    def __init__(self, gpus: Sequence[Gpu], executor: Executor) -> None:
        self._gpus = list(dict.fromkeys(gpus))
        self._xids: dict[str, int] = {}  # by board
        self._events: Any = None  # the driver's set of events, once it was created
        self.outage = Outage("The health of the GPUs cannot be determined", name="gpus")
        self._check = BackgroundCheck[dict[str, str]](executor, self.outage)
        self._next_check = 0.0
        self.problems: Mapping[str, str] = {gpu.device: NOT_CHECKED for gpu in gpus}

    def step(self, used: Collection[str]) -> None:
        """Apply the result of the last check and start the next one; never waits for the driver.

        ``used`` are the devices of this worker's jobs.
        """
        now = time.monotonic()
        if not self._gpus:
            return
        self._check.finish(self._update)
        if now >= self._next_check and self._check.start(self._find_problems, frozenset(used)):
            self._next_check = now + CHECK_SECONDS

    def _update(self, problems: Mapping[str, str]) -> None:
        if NOT_CHECKED in self.problems.values():
            self.problems = {}
        for device in problems.keys() - self.problems.keys():
            logger.warning("GPU %s is not assigned: %s", device, problems[device], extra={"action": "gpu_problem"})
        for device in self.problems.keys() - problems.keys():
            logger.info("GPU %s is assigned again.", device, extra={"action": "gpu_ready"})
        self.problems = problems

    def _find_problems(self, used: Collection[str]) -> dict[str, str]:
        if self._events is None:
            self._events = _register_events({gpu.board for gpu in self._gpus})
        try:
            _add_new_xids(self._events, self._xids)
        except pynvml.NVMLError:
            self._events = None  # register again in the next check
            raise
        with driver():
            found = {gpu.device: self._problem(gpu, is_used=gpu.device in used) for gpu in self._gpus}
        return {device: problem for device, problem in found.items() if problem is not None}

    def _problem(self, gpu: Gpu, *, is_used: bool) -> str | None:
        xid = self._xids.get(gpu.board)
        if xid is not None:
            return f"The driver reported the critical error Xid {xid}; check the GPU, then restart the worker."
        try:
            problem = _memory_problem(handle_of(gpu.board))
            return problem if problem is not None or is_used else _other_programs(gpu)
        except pynvml.NVMLError as error:
            return f"The driver can't access it ({error}); check the GPU."


def _memory_problem(board: Any) -> str | None:
    """Errors of the GPU's memory. Raises `pynvml.NVMLError` if the driver lost the GPU."""
    try:
        _, _, is_pending, has_failed = pynvml.nvmlDeviceGetRemappedRows(board)
    except pynvml.NVMLError_NotSupported:  # pyright: ignore[reportAttributeAccessIssue] - created at import
        is_pending = has_failed = 0
    if has_failed:
        return "Its memory has rows that can't be remapped; replace the GPU."
    if is_pending:
        return "Its memory has rows that must be remapped; reset the GPU."
    try:
        count = int(
            pynvml.nvmlDeviceGetTotalEccErrors(
                board, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            )
        )
    except pynvml.NVMLError_NotSupported:  # pyright: ignore[reportAttributeAccessIssue]
        return None  # a GPU without ECC
    return f"Its memory had {count} uncorrectable error{'s' * (count > 1)} (ECC); reset the GPU." if count else None


def _other_programs(gpu: Gpu) -> str | None:
    """The programs on a GPU that no job of this worker uses."""
    processes = processes_on(gpu.device)
    used = [memory for _, memory in processes if memory is not None]
    is_unknown = len(used) < len(processes)
    if not is_unknown and sum(used) <= BUSY_SHARE * gpu.memory_bytes:
        return None
    ids = ", ".join(str(pid) for pid, _ in sorted(processes))
    size = "memory" if is_unknown else f"{sum(used) / 2**30:.3g} GiB of its memory"
    return f"Other programs use {size} (process {ids}); it is assigned again when they have ended."


def _register_events(boards: Collection[str]) -> Any:
    """A set of events that receives the critical errors of the GPUs. The driver stays initialized for it."""
    pynvml.nvmlInit()
    events = pynvml.nvmlEventSetCreate()
    for board in boards:
        try:
            pynvml.nvmlDeviceRegisterEvents(handle_of(board), pynvml.nvmlEventTypeXidCriticalError, events)
        except pynvml.NVMLError as error:  # an old GPU, or one that the driver lost
            logger.info("Critical errors of the GPU %s are not reported: %s.", board, error)
    return events


def _add_new_xids(events: Any, xids: dict[str, int]) -> None:
    """Add the critical errors of GPUs since the last call to ``xids``, by the UUID of the GPU.

    Raises `pynvml.NVMLError` if the driver can't report them.
    """
    while True:
        try:
            event = pynvml.nvmlEventSetWait(events, 0)
        except pynvml.NVMLError as error:
            code: int = error.value  # pyright: ignore[reportAttributeAccessIssue] - assigned in __new__
            # No more events, or a GPU is lost, which `_memory_problem` reports for the GPU that it concerns.
            if code in (pynvml.NVML_ERROR_TIMEOUT, pynvml.NVML_ERROR_GPU_IS_LOST):
                return
            raise
        if event.eventData not in XIDS_OF_PROGRAMS:
            xids[text(pynvml.nvmlDeviceGetUUID(event.device))] = int(event.eventData)
