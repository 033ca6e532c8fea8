"""Storing the moments of an optimizer in 8 bits (Dettmers et al. 2022, arXiv 2110.02861).

Each row of a parameter is divided into blocks of 256 values. A block stores its largest magnitude in float32, and each
value as the index of a level of the paper's dynamic map (section 1.3): levels are dense near the largest magnitude, and
reach seven orders of magnitude below it. As no block contains values of two rows, states can be sharded by rows over
any number of processes.

Unlike in the paper, values are rounded up or down at random, so that they are exact on average: a moment that changes
by less than half of the distance between two levels in each step would otherwise never change. The random bits are a
function of the step and of the position in the parameter (`zeta_core.optim.random_bits`), so any number of processes
gets the same bits.
"""

from __future__ import annotations

from functools import cache

import torch

BLOCK_VALUES = 256
MIN_VALUES = 4096  # of a parameter; smaller ones keep float32 states, as in the paper (section 2)
MIN_ROW_VALUES = 8  # of a row; the magnitudes of shorter ones would take as much memory as the levels
_DECADES = 7


def fits(parameter: torch.Tensor) -> bool:
    """Whether the states of a parameter are stored in 8 bits; vectors and small or transposed ones are not."""
    if parameter.dim() < 2 or parameter.numel() < MIN_VALUES or not parameter.is_contiguous():
        return False
    return parameter.numel() // parameter.shape[0] >= MIN_ROW_VALUES


def num_blocks(parameter: torch.Tensor) -> int:
    """The blocks of each row."""
    return -(-(parameter.numel() // parameter.shape[0]) // BLOCK_VALUES)


def state_bytes(parameter: torch.Tensor) -> int:
    """The size of one moment of a parameter."""
    if not fits(parameter):
        return 4 * parameter.numel()
    return parameter.numel() + 4 * parameter.shape[0] * num_blocks(parameter)


def decoded(codes_RC: torch.Tensor, magnitudes_RB: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The float32 values (R rows of C columns) of codes in uint8 and of the magnitudes of the B blocks of each row."""
    levels = torch.tensor(_levels(signed), device=codes_RC.device)[codes_RC.int()]
    return levels.mul_(_spread(magnitudes_RB, codes_RC.shape[1]))


def encode(
    values_RC: torch.Tensor, codes_RC: torch.Tensor, magnitudes_RB: torch.Tensor, *, signed: bool, random: torch.Tensor
) -> None:
    """Store ``values_RC`` in ``codes_RC`` and ``magnitudes_RB``; ``random`` has a number in [0, 1) for each value."""
    num_columns = values_RC.shape[1]
    padded = torch.nn.functional.pad(values_RC.abs(), (0, -num_columns % BLOCK_VALUES))
    magnitudes_RB.copy_(padded.unflatten(1, (-1, BLOCK_VALUES)).amax(2))
    tiny = torch.finfo(torch.float32).tiny
    relative = values_RC / _spread(magnitudes_RB.clamp(min=tiny), num_columns)
    levels = torch.tensor(_levels(signed), device=values_RC.device)
    below = torch.bucketize(relative, levels[1:-1], right=True, out_int32=True)  # the level at or below each value
    lower, upper = levels[below], levels[below + 1]
    share = relative.sub_(lower).div_(upper.sub_(lower))
    codes = below.add_(random.view_as(share) < share)
    if not signed:  # a square that is zero beside a mean that is not would make the next update very large
        codes.clamp_(min=(values_RC > 0).int())
    codes_RC.copy_(codes)


def _spread(magnitudes_RB: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The magnitude of the block of each value, of shape (R, C)."""
    return magnitudes_RB.repeat_interleave(BLOCK_VALUES, dim=1)[:, :num_columns]


@cache
def _levels(signed: bool) -> tuple[float, ...]:
    """The levels between -1 and 1 (255 of them), or between 0 and 1 (256), in ascending order.

    Each power of ten has twice as many levels as the next smaller one.
    """
    positive = list[float]()
    for decade in range(_DECADES):
        number = 2 ** (decade if signed else decade + 1)
        unit = 10.0 ** (decade + 1 - _DECADES)
        positive += [unit * (0.1 + 0.9 * (i + 0.5) / number) for i in range(number)]
    if not signed:
        return (0.0, *positive, 1.0)
    positive[-1] = 1.0
    return (*(-level for level in reversed(positive)), 0.0, *positive)
