"""Process-wide settings of torch that a run changes and restores: random state, threads, deterministic kernels."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from zeta_core.checkpoint.random_state import get_random_state, restore_random_state
from zeta_core.environment import variables
from zeta_core.failures import CannotTrain
from zeta_core.system.device_kind import cpu_kind, gpu_kind

_NOT_DETERMINISTIC = re.compile(r"(\w+) does not have a deterministic implementation")  # as torch writes it


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
    """Make the same seed give the same bits on a GPU. Raises `CannotTrain` for an operation that can't do this.

    With torch's ``warn_only``, the backward pass of flash attention would not be deterministic. New memory is not
    filled, which torch does by default in order to make reads of uninitialized memory repeatable.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        with variables(FLASH_ATTENTION_DETERMINISTIC="1"):  # read by transformers, for the package flash-attn
            yield
    except RuntimeError as error:
        operation = _NOT_DETERMINISTIC.match(str(error))
        if operation is None:
            raise
        raise CannotTrain(
            f"deterministic is true, but the operation {operation[1]} of this model has no deterministic kernel here.",
            hint="Omit deterministic; the run then depends on the order in which the device adds numbers.",
            patch={"deterministic": False},
            param="deterministic",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled
