"""AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2) with moments in bfloat16 or in 8 bits.

Each update is computed in float32, from the exact new moments; only the moments that are kept for the next update are
rounded. In bfloat16, the relative precision is 0.4 %. With ``ADAM_BETAS`` of `zeta_core.optim.optimizer`, a second
moment that is more than 8 % away from the square of the gradient therefore still moves. `zeta_core.optim.eight_bits`
describes 8 bits. torch's fused kernel keeps moments in the type of the weights, which stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch

from zeta_core.optim import eight_bits
from zeta_core.optim.random_bits import salt_of, uniform_pair
from zeta_core.optim.shards import first_row, local_part, sharded_like

EPSILON = 1e-8
CHUNK_VALUES = 1 << 24  # values that are updated at the same time; their float32 copies take 64 MiB each
CHUNK_VALUES_IN_8_BITS = 1 << 22  # there are more copies


class CompactAdamW(torch.optim.Optimizer):
    """AdamW with smaller moments. Each rank updates its own shard of a DTensor, whose moments are sharded alike.

    ``seed`` determines how moments in 8 bits are rounded.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        states: Literal["bf16", "8bit"],
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        self._states, self._seed = states, seed
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Apply one update. Evaluates ``closure`` first, if given."""
        loss = None if closure is None else closure()
        ordinal = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                ordinal += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self._initial_state(parameter))
                state["step"] += 1
                if "exp_avg_magnitudes" in state:
                    salt = salt_of(self._seed, ordinal, state["step"])
                    _update_in_8_bits(parameter, state, group, salt)
                    continue
                for chunk in _chunks(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
                    _update(*chunk, step=state["step"], group=group)
        return loss

    def _initial_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        names = ("exp_avg", "exp_avg_sq")
        if self._states == "bf16":
            return {"step": 0, **{name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in names}}
        if not eight_bits.fits(parameter):
            return {"step": 0, **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in names}}
        state: dict[str, Any] = {"step": 0}
        local = local_part(parameter)
        for name in names:  # all codes are valid, because the magnitudes of all blocks are zero
            magnitudes = local.new_zeros((local.shape[0], eight_bits.num_blocks(parameter)), dtype=torch.float32)
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{name}_magnitudes"] = sharded_like(magnitudes, parameter)
        return state


def _update_in_8_bits(parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any], salt: int) -> None:
    """Update some rows at a time; ``salt`` selects the random bits."""
    row_values = parameter.numel() // parameter.shape[0]
    first, num_rows = first_row(parameter), local_part(parameter).shape[0]
    if not num_rows:
        return
    names = ("exp_avg", "exp_avg_magnitudes", "exp_avg_sq", "exp_avg_sq_magnitudes")
    tensors = [local_part(t) for t in (parameter, parameter.grad, *(state[name] for name in names)) if t is not None]
    chunk_rows = max(1, CHUNK_VALUES_IN_8_BITS // row_values)
    chunks = zip(*(tensor.reshape(num_rows, -1).split(chunk_rows) for tensor in tensors), strict=True)
    for weights, gradients, mean_codes, means, square_codes, squares in chunks:
        mean = eight_bits.decoded(mean_codes, means, signed=True)
        square = eight_bits.decoded(square_codes, squares, signed=False)
        _update(weights, gradients, mean, square, step=state["step"], group=group)
        random = uniform_pair(mean.numel(), salt=salt, first=first * row_values, device=mean.device)
        eight_bits.encode(mean, mean_codes, means, signed=True, random=random[0])
        eight_bits.encode(square, square_codes, squares, signed=False, random=random[1])
        first += len(weights)


def _update(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    means: torch.Tensor,
    squares: torch.Tensor,
    *,
    step: int,
    group: dict[str, Any],
) -> None:
    """Update weights and moments in place."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    gradients = gradients.float()
    mean = means.float().lerp_(gradients, 1 - beta1)
    square = squares.float().mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    means.copy_(mean)
    squares.copy_(square)
    scale = square.div(1 - beta2**step).sqrt_().add_(EPSILON)
    weights.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of equal parts of this rank's shards; a tensor that is not contiguous is one part."""
    local = [local_part(tensor) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in local):
        yield tuple(local)
        return
    yield from zip(*(tensor.view(-1).split(CHUNK_VALUES) for tensor in local), strict=True)
