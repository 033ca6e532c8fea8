"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): orthogonalized momentum for the matrices of blocks.

Only a whole matrix can be orthogonalized. If FSDP2 sharded it, every rank gathers one matrix at a time, computes the
same update and keeps its own rows. `torch.optim.Muon` does not do this: it iterates on shards in bfloat16, so its sums
round differently for each number of processes. Momentum stays sharded. AdamW trains everything else (embeddings, heads,
norms, biases).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

MOMENTUM = 0.95
# A quintic iteration that quickly brings singular values close to one: Jordan's coefficients, steps and epsilon.
COEFFICIENTS, STEPS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7
# Liu et al. 2025, arXiv 2502.16982, section 2.2: the update has the root mean square of AdamW's, so learning rate and
# weight decay are the same for both.
MATCHING = 0.2


class Muon(torch.optim.Optimizer):
    """Trains ``matrices`` with Muon and all other parameters with ``others``, as a single optimizer."""

    def __init__(
        self, matrices: list[nn.Parameter], others: torch.optim.Optimizer | None, *, lr: float, weight_decay: float
    ) -> None:
        super().__init__([{"params": matrices}], {"lr": lr, "weight_decay": weight_decay})
        self._matrices = self.param_groups[0]
        self._others = others
        if others is not None:
            self.param_groups.extend(others.param_groups)  # the same objects, so a rate that is set here applies there
            others.state = self.state

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Apply one update. Evaluates ``closure`` first, if given."""
        loss = None if closure is None else closure()
        lr, decay = self._matrices["lr"], self._matrices["weight_decay"]
        for parameter in self._matrices["params"]:
            if parameter.grad is None:
                continue
            state: dict[str, Any] = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            direction = _orthogonal(parameter.grad.lerp(momentum, MOMENTUM))  # Nesterov's look ahead
            scale = MATCHING * max(parameter.shape[-2:]) ** 0.5
            parameter.mul_(1 - lr * decay).add_(direction, alpha=-lr * scale)
        if self._others is not None:
            self._others.step()
        return loss


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values close to one, sharded like ``matrix``."""
    if not isinstance(matrix, DTensor):
        return orthogonalized(matrix)
    whole = DTensor.from_local(
        orthogonalized(matrix.full_tensor()), matrix.device_mesh, [Replicate()] * matrix.device_mesh.ndim
    )
    return whole.redistribute(placements=matrix.placements)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz; in bfloat16 on a GPU, where that is several times faster, and in float32 elsewhere.

    In a stack of matrices (experts, rows, columns), each one is orthogonalized separately.
    """
    if matrix.dim() == 3:
        return torch.stack([orthogonalized(part) for part in matrix])
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.device.type == "cuda" else matrix.float()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)
