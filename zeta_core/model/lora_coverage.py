"""The share of a model's weights that LoRA and 4-bit quantization cannot reach.

Both replace linear layers. Since transformers 5, the experts of most mixture-of-experts models are single parameters
with three dimensions, which are usually most of the weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

_MIN_SHARE = 0.01  # routers, convolutions and other small matrices are not worth a warning


@dataclass(frozen=True)
class UnadaptedWeights:
    """Matrices outside linear layers and embeddings: their ``share`` of all weights, and the largest ones' names."""

    share: float
    names: tuple[str, ...]  # with * instead of the numbers of layers

    @property
    def is_significant(self) -> bool:
        return self.share >= _MIN_SHARE

    def message(self, *, quantizes: bool) -> str:
        uncovered = "does not adapt, and lora.quantize does not quantize," if quantizes else "does not adapt"
        return (
            f"LoRA {uncovered} {self.share:.0%} of the model's weights, because they are not in linear layers: "
            f"{', '.join(self.names)}."
        )


def unadapted_weights(model: nn.Module) -> UnadaptedWeights:
    """Find the matrices that belong to no linear layer or embedding."""
    sizes: dict[str, int] = {}
    total = 0
    seen: set[int] = set()
    for module_name, part in model.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if parameter.dim() >= 2 and not isinstance(part, nn.Linear | Conv1D | nn.Embedding):
                kind = re.sub(r"\.\d+(?=\.|$)", ".*", f"{module_name}.{name}" if module_name else name)
                sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    largest = sorted(sizes, key=lambda kind: -sizes[kind])
    names = tuple(kind for kind in largest if sizes[kind] >= _MIN_SHARE * total)
    return UnadaptedWeights(sum(sizes.values()) / total if total else 0.0, names)
