"""AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2) with moments or weights of less than 32 bits.

Each update is computed in float32, from the exact new moments; only what is kept for the next update is rounded.
Moments in bfloat16 have a relative precision of 0.4 %. With ``ADAM_BETAS`` of `zeta_core.optim.optimizer`, a second
moment that is more than 8 % away from the square of the gradient therefore still moves. `zeta_core.optim.eight_bits`
describes moments in 8 bits.

Weights in bfloat16 have the same precision, so the nearest value to an updated weight is usually the old one. They are
rounded up or down at random instead, so that they are exact on average, or the difference is kept in bfloat16, too,
and added before the next update (Kahan summation; Zamirai et al. 2020, arXiv 2010.06192, compares both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from zeta_core.contract.spec.options import Bf16Weights, OptimizerStates
from zeta_core.optim import eight_bits
from zeta_core.optim.random_bits import rounded_to_bf16, salt_of, uniform_pair
from zeta_core.optim.shards import first_row, local_part, sharded_like

EPSILON = 1e-8
CHUNK_VALUES = 1 << 24  # values that are updated at the same time; their float32 copies take 64 MiB each
CHUNK_VALUES_IN_8_BITS = 1 << 22  # there are more copies
MOMENTS = ("exp_avg", "exp_avg_sq")
COMPENSATION = "compensation"  # what rounding removed from the weights
_MOMENT_TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

_Tensors = dict[str, torch.Tensor]


class CompactAdamW(torch.optim.Optimizer):
    """AdamW with compact states. Each rank updates its own shard of a DTensor, whose states are sharded alike.

    ``seed`` determines how moments in 8 bits and weights in bfloat16 are rounded.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        states: OptimizerStates = "float32",
        bf16_weights: Bf16Weights | None = None,
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        self._states, self._bf16_weights, self._seed = states, bf16_weights, seed
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
                salt = salt_of(self._seed, ordinal, state["step"])
                tensors = {"weights": parameter, "gradients": parameter.grad}
                tensors |= {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
                for first, part in _parts(parameter, tensors):
                    _update(part, group, step=state["step"], salt=salt, first=first)
        return loss

    def _initial_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        in_8_bits = self._states == "8bit" and eight_bits.fits(parameter)
        for name in MOMENTS:
            if not in_8_bits:
                state[name] = torch.zeros_like(parameter, dtype=_MOMENT_TYPES.get(self._states, torch.float32))
                continue
            local = local_part(parameter)
            magnitudes = local.new_zeros((local.shape[0], eight_bits.num_blocks(parameter)), dtype=torch.float32)
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)  # any code is zero times the magnitude
            state[_magnitudes(name)] = sharded_like(magnitudes, parameter)
        if self._bf16_weights == "kahan" and parameter.dtype == torch.bfloat16:
            state[COMPENSATION] = torch.zeros_like(parameter)
        return state


def _update(part: _Tensors, group: dict[str, Any], *, step: int, salt: int, first: int) -> None:
    """Update weights and states in place. ``salt`` and the index of the ``first`` value select the random bits."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    gradients = part["gradients"].float()
    mean, square = _moments(part)
    mean.lerp_(gradients, 1 - beta1)
    square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    _keep_moments(part, mean, square, salt, first)
    scale = square.div(1 - beta2**step).sqrt_().add_(EPSILON)
    weights = part["weights"].float()  # the weights themselves if they are in float32, otherwise a copy
    if COMPENSATION in part:
        weights.add_(part[COMPENSATION])
    weights.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
    if part["weights"].dtype == torch.bfloat16:
        _keep_weights(part, weights, salt_of(salt), first)


def _moments(part: _Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments in float32: the kept tensors themselves if they are in float32, otherwise copies."""
    mean, square = (part[name] for name in MOMENTS)
    if mean.dtype != torch.uint8:
        return mean.float(), square.float()
    scales = [part[_magnitudes(name)] for name in MOMENTS]
    return eight_bits.decoded(mean, scales[0], signed=True), eight_bits.decoded(square, scales[1], signed=False)


def _keep_moments(part: _Tensors, mean: torch.Tensor, square: torch.Tensor, salt: int, first: int) -> None:
    if part[MOMENTS[0]].dtype != torch.uint8:
        part[MOMENTS[0]].copy_(mean)
        part[MOMENTS[1]].copy_(square)
        return
    random = uniform_pair(mean.numel(), salt=salt, first=first, device=mean.device)
    for name, moment, signed, drawn in zip(MOMENTS, (mean, square), (True, False), random, strict=True):
        eight_bits.encode(moment, part[name], part[_magnitudes(name)], signed=signed, random=drawn)


def _keep_weights(part: _Tensors, weights: torch.Tensor, salt: int, first: int) -> None:
    """Round float32 ``weights`` to bfloat16, at random or keeping the difference."""
    if COMPENSATION in part:
        part["weights"].copy_(weights)
        part[COMPENSATION].copy_(weights.sub_(part["weights"]))
        return
    part["weights"].copy_(rounded_to_bf16(weights, salt=salt, first=first))


def _parts(parameter: torch.Tensor, tensors: _Tensors) -> Iterator[tuple[int, _Tensors]]:
    """Equal parts of this rank's shards of ``tensors``, and the index of their first value in the whole ``parameter``.

    Parts of states in 8 bits are rows. Tensors that are not contiguous are one part.
    """
    local = {name: local_part(tensor) for name, tensor in tensors.items()}
    num_rows = parameter.shape[0] if parameter.dim() else 1
    row_values = parameter.numel() // max(1, num_rows)
    first = first_row(parameter) * row_values
    if not local["weights"].numel():
        return
    if not local["weights"].is_contiguous():
        yield first, local
        return
    local["gradients"] = local["gradients"].contiguous()
    shape, size = [-1], CHUNK_VALUES
    if local[MOMENTS[0]].dtype == torch.uint8:
        shape, size = [local["weights"].shape[0], -1], max(1, CHUNK_VALUES_IN_8_BITS // row_values)
    for pieces in zip(*(tensor.view(shape).split(size) for tensor in local.values()), strict=True):
        part = dict(zip(local, pieces, strict=True))
        yield first, part
        first += part["weights"].numel()


def _magnitudes(moment: str) -> str:
    """The name of the magnitudes of the blocks of a moment in 8 bits."""
    return f"{moment}_magnitudes"
