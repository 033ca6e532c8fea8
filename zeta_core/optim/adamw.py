"""AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2) with moments in bfloat16, which halves their memory.

Each update is computed in float32, from the exact new moments; only the moments that are kept for the next update are
rounded, to a relative precision of 0.4 %. With ``ADAM_BETAS`` of `zeta_core.optim.optimizer`, a second moment that is
more than 8 % away from the square of the gradient therefore still moves. torch's fused kernel keeps moments in the type
of the weights, which stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

EPSILON = 1e-8
CHUNK_VALUES = 1 << 24  # values that are updated at the same time; their float32 copies take 64 MiB each


class AdamWithBf16Moments(torch.optim.Optimizer):
    """AdamW with moments in bfloat16. Each rank updates its own shard of a DTensor, whose moments are sharded alike."""

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Apply one update. Evaluates ``closure`` first, if given."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                for chunk in _chunks(*tensors):
                    _update(*chunk, step=state["step"], group=group)
        return loss


def _update(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    means: torch.Tensor,
    squares: torch.Tensor,
    *,
    step: int,
    group: dict[str, Any],
) -> None:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    gradients = gradients.float()
    mean = means.float().lerp_(gradients, 1 - beta1)
    square = squares.float().mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    means.copy_(mean)
    squares.copy_(square)
    scale = square.div_(1 - beta2**step).sqrt_().add_(EPSILON)
    weights.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of equal parts of this rank's shards; a tensor that is not contiguous is one part."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in local):
        yield tuple(local)
        return
    yield from zip(*(tensor.view(-1).split(CHUNK_VALUES) for tensor in local), strict=True)
