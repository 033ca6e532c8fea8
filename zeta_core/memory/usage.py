"""Measuring the utilization of a machine: the model FLOPs utilization (MFU), and the memory of each part."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zeta_core.contract.job.memory import MemoryParts
from zeta_core.contract.spec.options import Precision
from zeta_core.model.quantization import num_weights, scale_bytes

# Dense bf16 (and fp16) FLOPs per second from the manufacturers' data sheets, without sparsity, for full-power boards.
# The first entry whose words occur in the device's name is used. Other devices have no MFU, because nothing would
# distinguish a guess from a measurement.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
)


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The device's peak FLOPs per second in this precision; None if unknown, as for any CPU."""
    if device.type != "cuda" or precision == "no":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """The same, by the device name that the driver reports."""
    return next((flops for words, flops in PEAK_FLOPS if re.search(rf"\b{words}\b", name)), None)


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """FLOPs of the forward and backward passes per token: 6 N + 12 L H Q T (Chowdhery et al. 2022, PaLM, appendix B).

    The head is counted for every token, even if the logits of some tokens are not needed and not computed.

    N is the number of weights without embeddings that are only looked up. A frozen weight (LoRA's base) has no gradient
    of its own and counts 4. The model has L layers and H heads of size Q, and a sequence has T tokens; without such a
    config, only N counts. Recomputation by activation checkpointing is not counted.
    """
    looked_up = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    looked_up -= {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}  # tied: also the head
    flops = sum(
        (6.0 if parameter.requires_grad else 4.0) * _whole_size(parameter)
        for parameter in model.parameters()
        if id(parameter) not in looked_up
    )
    config: Any = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int):
        head_size = getattr(config, "head_dim", None) or width // heads
        flops += 12.0 * layers * heads * head_size * seq_len
    return flops


def _whole_size(parameter: nn.Parameter) -> int:
    """The full number of weights, even if sharded (ZeRO-3 stores the number separately) or quantized to 4 bits."""
    return int(getattr(parameter, "ds_numel", num_weights(parameter)))


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory() -> dict[str, int]:
    """The peak number of bytes used so far: by tensors on a GPU, or by the whole process on a CPU."""
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        return {f"cuda:{device}": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Usage:
    """The memory of each part in the first step. Create it before that step, when the weights are loaded."""

    def __init__(self) -> None:
        self._before = _begin_peak()
        self._computed: int | None = None

    def computed(self) -> None:
        """Call this between the backward pass and the update of the first step."""
        if self._before is not None and self._computed is None:
            self._computed = max(0, sum(peak_memory().values()) - self._before)

    def parts(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> MemoryParts:
        """The memory of weights, gradients, the optimizer's state, and ``activations``.

        The last is the peak of the forward and backward passes without weights and gradients, including temporary
        buffers. It is None if the system does not report it (neither Linux nor a GPU).
        """
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        state = [value for values in optimizer.state.values() for value in values.values()]
        gradients = num_bytes(trained)
        return MemoryParts(
            weights=num_bytes([*module.parameters(), *module.buffers()]),
            gradients=gradients,
            optimizer=num_bytes(value for value in state if isinstance(value, torch.Tensor)),
            activations=None if self._computed is None else max(0, self._computed - gradients),
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
    """The size of tensors in this process: only its share of sharded ones, and including scales of quantized ones."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() + scale_bytes(tensor) for tensor in local)
