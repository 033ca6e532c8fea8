"""What a training changes in the process that it runs in, put back when it is over."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch

from zeta_core.checkpoint import state as states
from zeta_core.contract.device_kind import cpu_kind, gpu_kind


@contextmanager
def as_it_was() -> Generator[None]:
    """What a training changes in its process, and a script or a notebook goes on with, is put back afterwards."""
    random_state, threads = states.random_state(), torch.get_num_threads()
    try:
        with torch.enable_grad():
            yield
    finally:
        states.restore_random(random_state)
        compute_with(threads)


def compute_with(threads: int) -> bool:
    """Let torch compute with so many threads; whether it had to be told.

    It is left alone where it does already, because to be told costs 3 to 5 % of a small Llama's time on a CPU: torch
    then forbids MKL to choose (`mkl_set_dynamic(0)`), and MKL plans for a team of threads also where one thread, inside
    attention, has a small product to compute. Gradients of attention get other last bits by that.
    """
    if torch.get_num_threads() == threads:
        return False
    torch.set_num_threads(threads)
    return True


def device_kind(variables: Mapping[str, str]) -> str | None:
    """The kind of device that this process trains on, under these `settings.kernel_variables`."""
    if torch.cuda.is_available():
        return gpu_kind(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), variables)
    return cpu_kind(variables, capability=torch.backends.cpu.get_cpu_capability())


@contextmanager
def deterministic_kernels() -> Generator[None]:
    """The same seed gives the same bits on a GPU, too; a kernel that cannot is warned of by torch, not refused."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
