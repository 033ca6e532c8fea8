"""The shares of a model's weights that LoRA and 4-bit quantization reach.

Both replace linear layers. Since transformers 5, the experts of most mixture-of-experts models are single parameters
with three dimensions, which are usually most of the weights. LoRA adapts them with ``lora.target_parameters``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from zeta_core.contract.spec.options import Quantization
from zeta_core.model.existing_adapter import adapter_weight_names
from zeta_core.model.packed_layers import PackedLinear
from zeta_core.model.quantization import num_weights

_MIN_SHARE = 0.01  # routers, convolutions and other small matrices are not worth a warning


@dataclass(frozen=True)
class UnadaptedWeights:
    """Matrices outside linear layers and embeddings: their ``share`` of all weights, and the largest ones' names."""

    share: float
    names: tuple[str, ...]  # with * instead of the numbers of layers

    @property
    def is_significant(self) -> bool:
        return self.share >= _MIN_SHARE

    def message(self, *, quantize: Quantization | None) -> str:
        uncovered = "does not adapt, and lora.quantize does not quantize," if quantize == "nf4" else "does not adapt"
        return (
            f"LoRA {uncovered} {self.share:.0%} of the model's weights, because they are not in linear layers: "
            f"{', '.join(self.names)}."
        )


def unadapted_weights(model: nn.Module, adapted: Collection[str] = ()) -> UnadaptedWeights:
    """Find the matrices that belong to no linear layer or embedding, and are not ``adapted`` by themselves."""
    sizes: dict[str, int] = {}
    total = 0
    seen: set[int] = set()
    for module_name, part in model.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            full_name = f"{module_name}.{name}" if module_name else name
            is_reached = isinstance(part, nn.Linear | Conv1D | nn.Embedding) or full_name in adapted
            if parameter.dim() >= 2 and not is_reached:
                kind = re.sub(r"\.\d+(?=\.|$)", ".*", full_name)
                sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    largest = sorted(sizes, key=lambda kind: -sizes[kind])
    names = tuple(kind for kind in largest if sizes[kind] >= _MIN_SHARE * total)
    return UnadaptedWeights(sum(sizes.values()) / total if total else 0.0, names)


def num_base_weights(model: nn.Module) -> int:
    """The number of weights without those of an adapter in the model."""
    adapter = adapter_weight_names(model)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in adapter)


def describe_coverage(model: nn.Module, num_parameters: int) -> str:
    """One sentence about a model with an adapter: the shares of its base that are adapted, quantized and trained.

    ``num_parameters`` is the number of weights of the base.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    adapted = quantized = trained = 0
    for part in model.modules():
        if isinstance(part, LoraLayer):
            layer: Any = part
            base = layer.get_base_layer()
            if isinstance(part, ParamWrapper):
                adapted += num_weights(layer.get_param())
            else:
                adapted += num_weights(base.packed if isinstance(base, PackedLinear) else base.weight)
    for parameter in model.parameters():
        is_packed = num_weights(parameter) != parameter.numel()
        quantized += num_weights(parameter) if is_packed else 0
        trained += parameter.numel() if parameter.requires_grad else 0
    in_4_bits = f", {quantized / num_parameters:.1%} are held in 4 bits" if quantized else ""
    return (
        f"LoRA adapts {adapted / num_parameters:.1%} of the weights of the base{in_4_bits}, and trains "
        f"{trained:,} weights ({trained / num_parameters:.2%} of that number)."
    )
