"""Random numbers that are a function of a salt and a position, so they need no state and no order of computation.

Each position is mixed with the salt by the finalizer of MurmurHash3 (Appleby, github.com/aappleby/smhasher).
"""

from __future__ import annotations

import torch

_GOLDEN, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


def salt_of(*numbers: int) -> int:
    """A salt of 32 bits that depends on all of the numbers and on their order."""
    salt = 0
    for number in numbers:
        x = (salt * _GOLDEN + number + 1) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * _FIRST) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * _SECOND) & 0xFFFFFFFF
        salt = x ^ (x >> 16)
    return salt


def random_bits(count: int, *, salt: int, first: int, device: torch.device) -> torch.Tensor:
    """32 random bits for each of ``count`` positions from ``first``, as int32 of shape (count,).

    torch has no unsigned arithmetic, but its signed products and sums have the same bits.
    """
    x = torch.arange(count, dtype=torch.int32, device=device)
    x.mul_(_signed(_GOLDEN)).add_(_signed(first * _GOLDEN + salt))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(_FIRST))
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(_SECOND))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def uniform_pair(count: int, *, salt: int, first: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent float32 numbers in [0, 1), of 16 bits each, for each of ``count`` positions from ``first``."""
    drawn = random_bits(count, salt=salt, first=first, device=device)
    high, low = (drawn >> 16).bitwise_and_(0xFFFF), drawn.bitwise_and_(0xFFFF)
    return high.float().mul_(2.0**-16), low.float().mul_(2.0**-16)


def rounded_to_bf16(values: torch.Tensor, *, salt: int, first: int) -> torch.Tensor:
    """Float32 ``values`` rounded up or down at random to bfloat16 numbers; NaN remains NaN."""
    # A bfloat16 number has the upper half of the bits of a float32 one. A random lower half is added, then cut off.
    added = random_bits(values.numel(), salt=salt, first=first, device=values.device).bitwise_and_(0xFFFF)
    rounded = (values.view(torch.int32) + added.view_as(values)).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)  # a GPU's NaN has all bits set, and would become zero


def _signed(number: int) -> int:
    """The signed 32-bit number with the same bits as ``number``."""
    return (number + 0x80000000) % 0x100000000 - 0x80000000
