"""The rows that this rank holds of a tensor, which FSDP2 may have sharded by rows."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; any other tensor is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: torch.Tensor) -> int:
    """The first row of this rank's shard, 0 if the tensor is whole; FSDP2 splits dimension 0 like ``torch.chunk``."""
    if not isinstance(tensor, DTensor):
        return 0
    *copies, sharded = tensor.placements
    assert sharded == Shard(0)
    assert all(placement.is_replicate() for placement in copies)
    mesh, dimension = tensor.device_mesh, len(copies)
    chunk = -(-tensor.shape[0] // mesh.size(dimension))
    return min(mesh.get_local_rank(dimension) * chunk, tensor.shape[0])


def sharded_like(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``local`` as this rank's rows of a tensor that has the rows and the sharding of ``tensor``."""
    if not isinstance(tensor, DTensor):
        return local
    whole = torch.empty((tensor.shape[0], *local.shape[1:]), dtype=local.dtype, device="meta")
    spec = DTensorSpec(tensor.device_mesh, tensor.placements, TensorMeta(whole.shape, whole.stride(), whole.dtype))
    # `from_local` would move a shard that is offloaded to the host to the GPU.
    return DTensor(local.detach(), spec, requires_grad=False)
