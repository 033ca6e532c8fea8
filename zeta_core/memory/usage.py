"""Measuring the memory that a run uses, in total and by part."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zeta_core.contract.job.memory import MemoryParts


def peak_memory() -> dict[str, int]:
    """The peak number of bytes used so far: by tensors on a GPU, or by the whole process on a CPU."""
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        return {f"cuda:{device}": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class MemoryUsage:
    """The memory of each part in the first step. Create it before that step, when the weights are loaded."""

    def __init__(self) -> None:
        self._before = _begin_peak()
        self._peak: int | None = None

    def record_peak(self) -> None:
        """Call this between the backward pass and the update of the first step."""
        if self._before is not None and self._peak is None:
            self._peak = max(0, sum(peak_memory().values()) - self._before)

    def parts(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> MemoryParts:
        """The memory of weights, gradients, the optimizer's state, and ``activations``, on the device.

        The last is the peak of the forward and backward passes without weights and gradients, including temporary
        buffers. It is None if the system does not report it (neither Linux nor a GPU).
        """
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        state = [value for values in optimizer.state.values() for value in values.values()]
        gradients = device_bytes(trained)
        return MemoryParts(
            weights=device_bytes([*module.parameters(), *module.buffers()]),
            gradients=gradients,
            optimizer=device_bytes(value for value in state if isinstance(value, torch.Tensor)),
            activations=None if self._peak is None else max(0, self._peak - gradients),
        )


def _begin_peak() -> int | None:
    """Reset `peak_memory`, and return the bytes in use, or None if it can't be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of this process: proc(5)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The size of tensors in this process: only its share of sharded ones."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def device_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """`num_bytes` of those tensors that are on the GPU, if there is one, and not offloaded to the host."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return num_bytes(tensor for tensor in tensors if tensor.device.type == device)
