"""Process-wide settings of torch that a run changes and restores: random state, threads, deterministic kernels."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state
from zeta_core.system.device_kind import cpu_kind, gpu_kind


@contextmanager
def restored_state() -> Generator[None]:
    """Restore the random state and the number of threads afterwards, for a script or notebook that continues."""
    random_state, threads = get_random_state(), torch.get_num_threads()
    try:
        with torch.enable_grad():
            yield
    finally:
        restore_random_state(random_state)
        set_num_threads(threads)


def set_num_threads(threads: int) -> bool:
    """Set torch's number of threads, unless it already has this value, and return whether it was set.

    Setting it makes a small Llama 3 to 5 % slower on a CPU: torch then disables MKL's dynamic choice
    (`mkl_set_dynamic(0)`), so MKL plans for all threads even for a small product that one thread computes within
    attention. This also changes the last bits of attention gradients.
    """
    if torch.get_num_threads() == threads:
        return False
    torch.set_num_threads(threads)
    return True


def device_kind(variables: Mapping[str, str]) -> str | None:
    """The kind of device that this process trains on, given these `environment.kernel_variables`."""
    if torch.cuda.is_available():
        return gpu_kind(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), variables)
    return cpu_kind(variables, capability=torch.backends.cpu.get_cpu_capability())


@contextmanager
def deterministic_kernels() -> Generator[None]:
    """Make the same seed give the same bits on a GPU. For a kernel that cannot, torch warns but does not fail."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
