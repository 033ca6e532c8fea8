"""Devices of a machine: the processes on a GPU, and device kinds."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.harness.service import clean_environment
from tests.harness.waiting import wait_until
from worker.machine.devices import find_slots
from worker.machine.gpus import memory_holders
from worker.run.launch import run_environment
from worker.settings import WorkerSettings
from zeta_core.contract.access import HubAccess

HOLDER = "import torch; torch.zeros(1, device='cuda'); print('ready', flush=True); input()"


def test_without_a_driver_no_process_holds_gpu_memory() -> None:
    assert memory_holders(()) == set()


@pytest.mark.gpu
def test_a_process_holds_memory_on_its_gpu_until_it_has_exited() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        holders = memory_holders(("0",))
        if not any(psutil.pid_exists(number) for number in holders):
            pytest.skip("the driver knows this container's processes by the host's numbers")
        assert holder.pid in holders
    finally:
        holder.kill()
        holder.wait()
    wait_until(lambda: holder.pid not in memory_holders(("0",)), 60, "the driver to release the memory")


TELLS_ITS_KIND = """
from zeta_core.parallel.process_settings import device_kind
from zeta_core.environment import kernel_variables
import torch
print(device_kind(kernel_variables()))
print(torch.__version__)
"""


@pytest.mark.parametrize(
    "variables",
    [{}, {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "unknown", "MKL_CBWR": "COMPATIBLE"}],
)
def test_a_worker_announces_the_device_kind_that_its_run_computes_on(tmp_path: Path, variables: dict[str, str]) -> None:
    own = {**clean_environment(), **variables}
    settings = WorkerSettings(home=tmp_path, worker_secret="s", worker_slots=1)
    (slot,) = find_slots(settings, own)
    environment = run_environment(
        own,
        job_id="job_1",
        attempt=1,
        threads=1,
        devices=[] if slot.device is None else [slot.device],
        hub=HubAccess.OFF,
        job_env=(),
    )
    training = subprocess.run(
        [sys.executable, "-c", TELLS_ITS_KIND], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    kind, torch_version = training.stdout.splitlines()
    assert slot.device_kind == kind
    assert f"torch-{torch_version}" in kind.split(":")
