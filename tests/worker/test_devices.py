"""What the driver says of the processes on a GPU."""

import subprocess
import sys

import psutil
import pytest

from tests.harness.waiting import wait_until
from worker.machine.devices import memory_holders

HOLDER = "import torch; torch.zeros(1, device='cuda'); print('ready', flush=True); input()"


def test_without_a_driver_nobody_is_said_to_hold_memory() -> None:
    assert memory_holders(()) == set()


@pytest.mark.gpu
def test_a_process_holds_memory_on_its_gpu_until_it_is_gone() -> None:
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
    wait_until(lambda: holder.pid not in memory_holders(("0",)), 60, "the driver to give the memory back")
