"""Moments in 8 bits: their precision, their bits in any number of chunks and shards, and their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zeta_core.optim import adamw, eight_bits
from zeta_core.optim.adamw import CompactAdamW
from zeta_core.optim.optimizer import ADAM_BETAS
from zeta_core.optim.random_bits import random_bits, salt_of, uniform_pair

CPU = torch.device("cpu")


def encoded(values: torch.Tensor, salt: int, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    magnitudes = torch.zeros(values.shape[0], eight_bits.num_blocks(values))
    random, _ = uniform_pair(values.numel(), salt=salt, first=0, device=CPU)
    eight_bits.encode(values, codes, magnitudes, signed=signed, random=random)
    return codes, magnitudes


@pytest.mark.parametrize("signed", [True, False])
def test_stored_values_are_exact_in_the_mean_and_a_square_never_becomes_zero(signed: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(16, 300) * torch.logspace(-4, 4, 16).unsqueeze(1)
    values[0], values[1, :2] = 0, torch.tensor([1e-12, 0])
    values = values if signed else values.square()
    times = 400
    mean, stored = torch.zeros_like(values), values
    for salt in range(times):
        stored = eight_bits.decoded(*encoded(values, salt_of(salt), signed=signed), signed=signed)
        mean += stored / times
    largest = values.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert ((stored - values).abs() / largest).max() < 0.015, "the distance of the largest two levels"
    assert ((mean - values).abs() / largest).max() < 0.015 / 2 * 5 / times**0.5, "five standard errors"
    assert not stored[0].any()
    assert stored[1, 1] == 0
    assert signed or stored[1, 0] > 0


def test_random_bits_depend_on_the_position_only_and_are_uniform() -> None:
    drawn = random_bits(100_000, salt=salt_of(1, 2), first=(1 << 33) + 5, device=CPU)
    again = random_bits(10, salt=salt_of(1, 2), first=(1 << 33) + 50_005, device=CPU)
    assert torch.equal(drawn[50_000:50_010], again)
    assert not torch.equal(drawn, random_bits(100_000, salt=salt_of(2, 1), first=(1 << 33) + 5, device=CPU))
    ones = torch.stack([(drawn >> bit) & 1 for bit in range(32)]).float()
    assert (ones.mean(1) - 0.5).abs().max() < 0.01
    assert (torch.corrcoef(ones) - torch.eye(32)).abs().max() < 0.02


def updated(*, steps: int, states: Any, shape: tuple[int, ...] = (40, 300)) -> tuple[torch.Tensor, CompactAdamW]:
    weights = nn.Parameter(torch.linspace(-1, 1, 12_000).view(shape))
    optimizer = CompactAdamW([weights], lr=1e-2, betas=ADAM_BETAS, states=states, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weights.grad = torch.randn(12_000, generator=generator).view(shape)
        optimizer.step()
    return weights.detach(), optimizer


def test_moments_in_8_bits_update_alike_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, optimizer = updated(steps=20, states="8bit")
    exact, _ = updated(steps=20, states="bf16")
    assert (whole - exact).abs().mean() < 0.01 * 1e-2 * 20, "one percent of the distance that a weight can move"
    monkeypatch.setattr(adamw, "CHUNK_VALUES_IN_8_BITS", 7 * 300)
    assert torch.equal(updated(steps=20, states="8bit")[0], whole)
    (state,) = optimizer.state.values()
    held = sum(tensor.nbytes for tensor in state.values() if isinstance(tensor, torch.Tensor))
    assert held == 2 * eight_bits.state_bytes(whole) == 2 * (12_000 + 40 * 2 * 4)


def test_vectors_and_narrow_matrices_keep_float32_moments() -> None:
    for shape in ((12_000,), (3000, 4)):
        _, optimizer = updated(steps=1, states="8bit", shape=shape)
        (state,) = optimizer.state.values()
        assert state["exp_avg"].dtype == torch.float32
