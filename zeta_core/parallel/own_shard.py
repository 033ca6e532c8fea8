"""Stand-ins for the collectives of FSDP2 that use the same memory without exchanging anything.

Their results have the right shapes, but consist of values of this rank only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin


class OwnShardOnly(DefaultAllocMixin, AllGather):
    """Repeats the shard of this rank instead of gathering those of all ranks."""

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *group: Any, **options: Any) -> None:
        own = input_tensor.clone()  # it is a part of the output
        output_tensor.view(-1, own.numel()).copy_(own.flatten())


class OwnGradientOnly(DefaultAllocMixin, ReduceScatter):
    """Returns the first part of this rank's gradient instead of the sum over all ranks."""

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *group: Any, **options: Any) -> None:
        output_tensor.copy_(input_tensor.flatten()[: output_tensor.numel()])
