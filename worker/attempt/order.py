"""The run file of an attempt, which tells its training what to do and where, and the GPUs that it gets."""

from __future__ import annotations

from collections.abc import Sequence

from worker.machine.devices import Slot
from worker.settings import WorkerSettings
from zeta_core.contract.wire.messages import HandOver
from zeta_core.contract.wire.run_directory import CACHE_DIRECTORY, RunFile, output_directory


def run_file(message: HandOver, settings: WorkerSettings) -> RunFile:
    """The run file of an attempt that the server hands over."""
    return RunFile(
        job_id=message.job_id,
        attempt=message.attempt,
        spec=message.spec,
        resolved_spec=message.resolved_spec,
        output_dir=str(settings.root / output_directory(message.job_id)),
        cache_dir=str(settings.root / CACHE_DIRECTORY),
        artifacts_root=str(settings.artifacts),
        data_root=str(settings.data_root) if settings.data_root else None,
        hub=settings.hub != "off",
        processes=message.processes,
        slots=message.slots,
        self_stop_seconds=settings.self_stop_seconds,
        end_seconds=settings.end_seconds,
        journal_max_lines=settings.journal_max_lines,
    )


def devices_of(order: RunFile, slots: Sequence[Slot]) -> tuple[str, ...]:
    """The GPUs of the slots as in ``CUDA_VISIBLE_DEVICES``; empty if the job requested no GPUs."""
    resources = order.spec.get("resources")
    if isinstance(resources, dict) and resources.get("gpus") == 0:
        return ()
    return tuple(slot.device for slot in slots if slot.device is not None)
