"""The floating-point operations per token and the peak of a device, for the model FLOPs utilization (MFU)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from zeta_core.contract.spec.options import Precision
from zeta_core.model.inspection import head_size
from zeta_core.model.quantization import num_weights

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
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
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
    looked_up -= {  # tied: also the head
        id(weight) for part in model.modules() if isinstance(part, nn.Linear) for weight in part.parameters(False)
    }
    flops = sum(
        (6.0 if parameter.requires_grad else 4.0) * _whole_size(parameter)
        for parameter in model.parameters()
        if id(parameter) not in looked_up
    )
    config: Any = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    heads, size = getattr(config, "num_attention_heads", None), head_size(model)
    if isinstance(layers, int) and isinstance(heads, int) and size is not None:
        flops += 12.0 * layers * heads * size * seq_len
    return flops


def _whole_size(parameter: nn.Parameter) -> int:
    """The full number of weights, even if sharded (ZeRO-3 stores the number separately) or quantized to 4 bits."""
    return int(getattr(parameter, "ds_numel", num_weights(parameter)))
