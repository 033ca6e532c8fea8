"""AdamW with weights in bfloat16: small updates are not lost, and the size of the chunks does not change the bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zeta_core.optim import adamw
from zeta_core.optim.adamw import CompactAdamW
from zeta_core.optim.optimizer import ADAM_BETAS
from zeta_core.optim.random_bits import rounded_to_bf16

STEPS, RATE = 200, 1e-4


def moved(dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """The changes of 3,000 weights near one, whose gradients have the same sign in each step."""
    weights = nn.Parameter(torch.linspace(0.9, 1.1, 3000).to(torch.bfloat16).to(dtype))
    before = weights.detach().float().clone()
    optimizer = CompactAdamW([weights], lr=RATE, betas=ADAM_BETAS, **options)
    for _ in range(STEPS):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    return weights.detach().float() - before


def keep_nearest(part: dict[str, torch.Tensor], weights: torch.Tensor, *_: int) -> None:
    part["weights"].copy_(weights)


def test_small_updates_of_bf16_weights_are_lost_without_random_rounding_or_kahan_summation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = moved(torch.float32)
    assert exact.mean().item() == pytest.approx(-STEPS * RATE, rel=1e-3)
    stochastic = moved(torch.bfloat16, bf16_weights="stochastic")
    assert stochastic.mean().item() == pytest.approx(exact.mean().item(), rel=0.02), "exact on average"
    kahan = moved(torch.bfloat16, bf16_weights="kahan")
    assert (kahan - exact).abs().max() <= 1.1 * 2**-8, "each weight is the nearest one in bfloat16"
    monkeypatch.setattr(adamw, "CHUNK_VALUES", 1000)
    assert torch.equal(moved(torch.bfloat16, bf16_weights="stochastic"), stochastic)
    monkeypatch.setattr(adamw, "_keep_weights", keep_nearest)
    assert not moved(torch.bfloat16, bf16_weights="stochastic").any(), "rounded to the nearest, no weight ever moves"


def test_random_rounding_keeps_values_that_are_not_finite() -> None:
    """Among them is a GPU's NaN, which has all bits set, so that the random bits overflow into its sign."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32)
    for salt in range(4):
        rounded = rounded_to_bf16(bits.view(torch.float32), salt=salt, first=0)
        torch.testing.assert_close(rounded, bits.view(torch.float32), equal_nan=True)
