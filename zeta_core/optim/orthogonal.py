"""Orthogonalizing matrices for Muon, divided among the processes of a run.

A matrix is orthogonalized by a single process, so the result has the same bits on any number of processes. Under DDP,
every process has the whole matrices, and the results are gathered. If FSDP2 sharded them, an all-to-all gives each of
several matrices to another process, and a second one returns the rows of the results. A stack of matrices (experts,
rows, columns) that is sharded needs no exchange, because each process has whole matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from zeta_core.optim.shards import local_part, sharded_like

# A quintic iteration that quickly brings singular values close to one: Jordan's coefficients, steps and epsilon.
COEFFICIENTS, STEPS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7


def num_sharing(tensor: torch.Tensor) -> int:
    """The number of processes that share the work on ``tensor``: those with a shard of it, or all."""
    if isinstance(tensor, DTensor):
        return tensor.device_mesh.size(tensor.device_mesh.ndim - 1)
    return dist.get_world_size() if dist.is_initialized() else 1


def orthogonalized_together(tensors: Sequence[torch.Tensor], first: int) -> list[torch.Tensor]:
    """Orthogonalize tensors of equal shapes: stacks, or at most `num_sharing` matrices.

    Every process calls this with the same tensors. The process with rank ``first`` (modulo their number) orthogonalizes
    the first matrix, the next one the second.
    """
    if tensors[0].dim() == 3:
        return [_orthogonalized_stack(tensor, first) for tensor in tensors]
    if num_sharing(tensors[0]) == 1:
        return [sharded_like(orthogonalized(local_part(tensor)), tensor) for tensor in tensors]
    if isinstance(tensors[0], DTensor):
        return _orthogonalized_shards([tensor for tensor in tensors if isinstance(tensor, DTensor)], first)
    return _orthogonalized_copies(tensors, first)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz; in bfloat16 on a GPU, where that is several times faster, and in float32 elsewhere.

    In a stack of matrices, each one is orthogonalized separately.
    """
    if matrix.dim() == 3:
        return torch.stack([orthogonalized(part) for part in matrix]) if len(matrix) else matrix
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.device.type == "cuda" else matrix.float()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)


def _orthogonalized_stack(stack: torch.Tensor, first: int) -> torch.Tensor:
    size = num_sharing(stack)
    if isinstance(stack, DTensor) or size == 1:
        return sharded_like(orthogonalized(local_part(stack)), stack)
    matrices = stack.unbind()
    results = list[torch.Tensor]()
    for start in range(0, len(matrices), size):
        results += _orthogonalized_copies(matrices[start : start + size], first + start)
    return torch.stack(results)


def _orthogonalized_copies(matrices: Sequence[torch.Tensor], first: int) -> list[torch.Tensor]:
    """Results for matrices that every process has."""
    size = dist.get_world_size()
    own = (dist.get_rank() - first) % size
    # Contiguous, as NCCL requires; a matrix has the layout of its parameter.
    result = (orthogonalized(matrices[own]) if own < len(matrices) else torch.zeros_like(matrices[0])).contiguous()
    results = [torch.empty_like(result) for _ in range(size)]
    dist.all_gather(results, result)
    return [results[(first + index) % size] for index in range(len(matrices))]


def _orthogonalized_shards(matrices: Sequence[DTensor], first: int) -> list[torch.Tensor]:
    """Results for matrices that are sharded by rows, in equal parts except for the last ones."""
    mesh, (num_rows, num_columns) = matrices[0].device_mesh, matrices[0].shape
    size, group = mesh.size(mesh.ndim - 1), mesh.get_group(mesh.ndim - 1)
    own = (mesh.get_local_rank(mesh.ndim - 1) - first) % size
    shards = [matrix.to_local() for matrix in matrices]
    parts = shards[0].new_zeros((size, -(-num_rows // size), num_columns))  # by process
    for index, shard in enumerate(shards):
        parts[(first + index) % size, : len(shard)] = shard
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    if own < len(matrices):
        whole = received.flatten(0, 1)[:num_rows]
        whole.copy_(orthogonalized(whole))
    dist.all_to_all_single(parts, received, group=group)
    return [
        sharded_like(parts[(first + index) % size, : len(shard)], matrix)
        for index, (shard, matrix) in enumerate(zip(shards, matrices, strict=True))
    ]
