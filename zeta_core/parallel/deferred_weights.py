"""Weights that are read after the model has been sharded, so each process reads only its own part.

`defer_weights` takes the tensors out of a model and leaves parameters without storage, which an engine shards. The
engine then copies the rows of this process. The tensors usually map safetensors files, so rows that no process reads
stay on the disk, and processes on one host share the rows that several of them read. Buffers stay in the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# Computes a whole weight on a device; the caller keeps only the rows that it needs.
WeightSource = Callable[[torch.device], torch.Tensor]
DeferredWeights = dict[str, WeightSource]

# A method of modules whose parameters contain values other than those in their files. It returns the sources of these
# parameters by their names in the module, once.
TAKE_SOURCES = "take_sources"


def defer_weights(model: nn.Module, dtype: torch.dtype | None) -> DeferredWeights:
    """Replace the parameters by ones without storage, and return their sources by name; tied parameters stay tied.

    Floating-point parameters get ``dtype``; None keeps the type of each.
    """
    weights: DeferredWeights = {name: _stored(parameter.detach()) for name, parameter in model.named_parameters()}
    for module_name, part in model.named_modules():
        sources: DeferredWeights = getattr(part, TAKE_SOURCES, dict)()
        weights |= {f"{module_name}.{name}" if module_name else name: source for name, source in sources.items()}
    replaced: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in replaced:
                replaced[id(parameter)] = _without_storage(parameter, dtype)
            setattr(part, name, replaced[id(parameter)])
    return weights


def _stored(tensor: torch.Tensor) -> WeightSource:
    return lambda device: tensor


def _without_storage(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    empty = torch.empty(parameter.shape, dtype=kind, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def allocate(model: nn.Module, device: torch.device, *, parameters_on_host: bool = False) -> None:
    """Give all parameters storage without values, on ``device`` or on the host, and move the buffers to ``device``."""
    home = torch.device("cpu") if parameters_on_host else device

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=home) if tensor.is_meta else tensor.to(device)

    model._apply(moved)  # pyright: ignore[reportPrivateUsage] - `to_empty` would lose the values of the buffers


def copy_rows(target: torch.Tensor, source: torch.Tensor, first: int) -> None:
    """Copy as many rows as ``target`` has from ``source``, from row ``first``, converting them to its type."""
    with torch.no_grad():
        target.copy_(source[first : first + target.shape[0]])
