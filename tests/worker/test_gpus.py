"""A worker with several GPUs, which are simulated: what it reports, what its runs see, and which GPUs it refuses."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.fleet import SmallFleet
from tests.harness.service import processes_of_job
from tests.harness.simulated_gpus import H100, UNREADABLE_XID, SimulatedGpu, SimulatedGpus, can_simulate
from tests.harness.waiting import wait_until
from zeta_core.contract.job.responses import DeviceReport

pytestmark = pytest.mark.skipif(not can_simulate(), reason="the simulated driver needs Linux and a C compiler")

SLOW_STEPS = {"steps": "1000", "seconds_per_step": "0.1"}


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    folder = tmp_path / "driver"
    folder.mkdir()
    return SimulatedGpus(folder)


def reported(fleet: SmallFleet) -> list[DeviceReport]:
    """The slots in the worker's latest heartbeat, once its GPUs were checked."""
    assert fleet.engine is not None
    return [
        slot for worker in fleet.engine.workers() for slot in worker.slots if "not reported" not in str(slot.problem)
    ]


def wait_for_slots(fleet: SmallFleet, is_expected: Callable[[list[DeviceReport]], bool]) -> list[DeviceReport]:
    found: list[DeviceReport] = []

    def matches() -> bool:
        found[:] = reported(fleet)
        return is_expected(found)

    wait_until(matches, 30, "the reported slots to change")
    return found


def start(fleet: SmallFleet, gpus: SimulatedGpus, **variables: str) -> None:
    environment: dict[str, Any] = {**gpus.environment, **variables}
    fleet.start_worker("w1", **environment)


def test_a_job_runs_on_the_gpus_that_it_was_assigned(fleet: SmallFleet, gpus: SimulatedGpus) -> None:
    gpus.set([SimulatedGpu()] * 4)
    start(fleet, gpus, NCCL_SOCKET_IFNAME="eth7", TORCH_NCCL_ASYNC_ERROR_HANDLING="3")
    one = fleet.submit(spec={"model": "m", "resources": {"gpus": 1}, "metadata": SLOW_STEPS})
    fleet.wait_for_step(one, 1)
    three = fleet.submit(spec={"model": "m", "resources": {"gpus": 3}, "metadata": SLOW_STEPS})
    fleet.wait_for_step(three, 1)
    environment = psutil.Process(processes_of_job(three)[0]).environ()
    cores = len(os.sched_getaffinity(0))
    expected = {
        "CUDA_VISIBLE_DEVICES": "1,2,3",
        "NCCL_SOCKET_IFNAME": "eth7",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "OMP_NUM_THREADS": str(3 * max(1, cores // 4)),
    }
    assert expected.items() <= environment.items()
    assert environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"].endswith("/attempt-1/nccl-trace-rank-")
    assert fleet.job(three).slots == [1, 2, 3]
    waiting = fleet.submit(spec={"model": "m", "resources": {"gpus": 2}})
    wait_until(lambda: (fleet.job(waiting).waiting_reason or {}).get("code") == "workers_busy", 10, "the job to wait")


@pytest.mark.extended
def test_a_worker_reports_the_model_memory_and_mig_instances_of_its_gpus(
    fleet: SmallFleet, gpus: SimulatedGpus
) -> None:
    gpus.set([SimulatedGpu(), SimulatedGpu(instances=("MIG-a", "MIG-b")), SimulatedGpu(name="NVIDIA L4")])
    start(fleet, gpus)
    slots = wait_for_slots(fleet, bool)
    assert [(slot.device, slot.name, slot.is_mig) for slot in slots] == [
        ("0", H100, False),
        ("MIG-a", f"{H100} MIG 1g.10gb", True),
        ("MIG-b", f"{H100} MIG 1g.10gb", True),
        ("2", "NVIDIA L4", False),
    ]
    assert (slots[0].memory_bytes, slots[1].memory_bytes) == (80 * 10**9, 80 * 10**9 // 7)
    two = fleet.submit(spec={"model": "m", "resources": {"gpus": 2}})
    wait_until(lambda: (fleet.job(two).waiting_reason or {}).get("code") == "never_fits", 10, "the job to wait")
    assert (fleet.job(two).waiting_reason or {})["details"] == {"gpus": 2, "largest": 1}


@pytest.mark.extended
def test_the_use_of_gpus_is_measured_and_reported_in_the_progress_of_their_job(
    fleet: SmallFleet, gpus: SimulatedGpus
) -> None:
    used = SimulatedGpu(
        utilization_percent=80, used_bytes=2**30, process_id=1
    )  # too little to be another program's job
    gpus.set([SimulatedGpu(utilization_percent=40), used, SimulatedGpu(instances=("MIG-a",))])
    start(fleet, gpus)
    engine = fleet.engine
    assert engine is not None
    wait_until(lambda: any(beat.usage and beat.usage.gpus for beat in engine.workers()), 30, "the usage of the GPUs")
    usage = engine.workers()[0].usage
    assert usage is not None
    assert [(gpu.device, gpu.utilization, gpu.memory_bytes) for gpu in usage.gpus] == [
        ("0", 0.4, 0),
        ("1", 0.8, 2**30),
        ("MIG-a", None, 0),
    ]
    job_id = fleet.submit(spec={"model": "m", "resources": {"gpus": 2}, "metadata": SLOW_STEPS})
    fleet.wait_for_step(job_id, 3)
    measured = [event.fields for event in fleet.events(job_id) if event.type == "progress"]
    assert {"gpu_utilization": 0.6, "gpu_memory_bytes": 2**30}.items() <= measured[-1].items()
    assert 0 <= measured[-1]["worker_cpu"] <= 1
    assert measured[-1]["worker_memory_bytes"] > 2**20


@pytest.mark.slow
def test_a_faulty_or_busy_gpu_is_not_assigned_until_it_has_recovered(fleet: SmallFleet, gpus: SimulatedGpus) -> None:
    of_programs = SimulatedGpu(xid=31)  # a fault of the program that used the GPU
    gpus.set(
        [
            SimulatedGpu(used_bytes=8 * 2**30, process_id=4711),
            SimulatedGpu(ecc_errors=3),
            SimulatedGpu(rows_pending=1),
            SimulatedGpu(rows_failed=1),
            SimulatedGpu(xid=79),
            of_programs,
        ]
    )
    start(fleet, gpus)
    slots = wait_for_slots(fleet, bool)
    assert [slot.problem for slot in slots] == [
        "Other programs use 8 GiB of its memory (process 4711); it is assigned again when they have ended.",
        "Its memory had 3 uncorrectable errors (ECC); reset the GPU.",
        "Its memory has rows that must be remapped; reset the GPU.",
        "Its memory has rows that can't be remapped; replace the GPU.",
        "The driver reported the critical error Xid 79; check the GPU, then restart the worker.",
        None,
    ]
    job_id = fleet.submit(spec={"model": "m", "resources": {"gpus": 2}, "metadata": SLOW_STEPS})
    wait_until(lambda: (fleet.job(job_id).waiting_reason or {}).get("code") == "resources", 10, "the job to wait")
    message = (fleet.job(job_id).waiting_reason or {})["message"]
    assert "needs 2 free GPUs on one worker, and at most 1 is free now" in message
    assert "w1/0: Other programs use 8 GiB of its memory (process 4711)" in message
    gpus.set([SimulatedGpu(), *[SimulatedGpu(ecc_errors=1)] * 3, SimulatedGpu(), of_programs])
    fleet.wait_for_step(job_id, 1)
    assert fleet.job(job_id).slots == [0, 5], "a critical error counts until the worker is restarted"
    # The memory of the job itself is not that of another program.
    gpus.set([SimulatedGpu(used_bytes=70 * 2**30, process_id=1), *[SimulatedGpu(rows_pending=1)] * 4, of_programs])
    slots = wait_for_slots(fleet, lambda slots: "remapped" in str(slots[1].problem))
    assert slots[0].problem is None


@pytest.mark.slow
def test_a_gpu_that_the_driver_lost_is_not_assigned(fleet: SmallFleet, gpus: SimulatedGpus) -> None:
    gpus.set([SimulatedGpu(), SimulatedGpu()])
    start(fleet, gpus)
    wait_for_slots(fleet, bool)
    gpus.set([SimulatedGpu()])
    slots = wait_for_slots(fleet, lambda slots: slots[1].problem is not None)
    assert "GPU is lost" in str(slots[1].problem)
    assert slots[0].problem is None


@pytest.mark.slow
def test_critical_errors_that_the_driver_cannot_report_are_an_outage(fleet: SmallFleet, gpus: SimulatedGpus) -> None:
    gpus.set([SimulatedGpu()])
    start(fleet, gpus)
    wait_for_slots(fleet, bool)
    gpus.set([SimulatedGpu(xid=UNREADABLE_XID)])
    engine = fleet.engine
    assert engine is not None
    wait_until(lambda: "gpus" in engine.workers()[0].failing, 30, "the worker to report the failing check")
    gpus.set([SimulatedGpu(xid=79)])
    wait_for_slots(fleet, lambda slots: "Xid 79" in str(slots[0].problem))
    assert "gpus" not in engine.workers()[0].failing
