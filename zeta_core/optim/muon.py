"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): orthogonalized momentum for the matrices of blocks.

Only whole matrices can be orthogonalized; the processes of a run divide them among themselves
(`zeta_core.optim.orthogonal`). `torch.optim.Muon` does not do this: it iterates on shards in bfloat16, so its sums
round differently for each number of processes. Momentum stays sharded. AdamW trains everything else (embeddings, heads,
norms, biases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import nn

from zeta_core.optim.orthogonal import num_sharing, orthogonalized_together

MOMENTUM = 0.95
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
        for first, parameters in self._rounds():
            directions = orthogonalized_together([self._look_ahead(parameter) for parameter in parameters], first)
            scale = MATCHING * max(parameters[0].shape[-2:]) ** 0.5
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.mul_(1 - lr * decay).add_(direction, alpha=-lr * scale)
        if self._others is not None:
            self._others.step()
        return loss

    def _rounds(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """The matrices that processes orthogonalize at the same time, and the rank that gets the first one.

        Matrices of equal shape are in the same rounds, the largest ones first, and each process gets every n-th matrix.
        """
        by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for parameter in self._matrices["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        first = 0
        for _, parameters in sorted(by_shape.items(), key=lambda item: (-prod(item[0]), item[0])):
            size = num_sharing(parameters[0]) if parameters[0].dim() == 2 else 1
            for start in range(0, len(parameters), size):
                together = parameters[start : start + size]
                yield first, together
                first += len(together) if together[0].dim() == 2 else len(together[0])

    def _look_ahead(self, parameter: torch.Tensor) -> torch.Tensor:
        """Update the momentum and return Nesterov's look ahead."""
        assert parameter.grad is not None
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(momentum, MOMENTUM)
