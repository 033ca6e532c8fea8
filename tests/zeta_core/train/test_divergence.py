"""Losses that are reported as diverging, and losses that are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from zeta_core.contract.job.advice import Advice
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.optim.rates import UsualRates
from zeta_core.plan import PlanInputs, decide_plan, with_length
from zeta_core.train.divergence import DivergenceMonitor

STEPS = 1000
NOISE = random.Random(0)


def advice_for(loss_at: Callable[[int], float], *, steps: int = STEPS, vocab_size: int | None = 50_000) -> list[Advice]:
    """The advice for a run with this loss after each step."""
    options = TrainerOptions(batch_size=1, learning_rate=1e-3, max_steps=steps, warmup_steps=0.03)
    facts = PlanInputs(1, "cpu", False, 1, 64, 1, 1 << 30, True, "data")
    plan = with_length(decide_plan(options, facts, None), options, steps)
    advice: list[Advice] = []
    usual = UsualRates(1e-5, 1e-3, 1e-2)
    monitor = DivergenceMonitor(plan, advice.append, vocab_size=vocab_size, usual=usual, supports_bf16=False)
    for step in range(1, steps + 1):
        monitor.record_step(step, loss=loss_at(step), learning_rate=1e-3, grad_norm=1.0)
    return advice


def falling(step: int) -> float:
    return 3 + 8 * math.exp(-step / 100)


def noisy(step: int) -> float:
    """Like a batch of one short sequence, with a standard deviation of one nat."""
    return max(0.1, falling(step) + NOISE.gauss(0, 1))


def healing_spikes(step: int) -> float:
    """Spikes of two nats every hundred steps that recover within tens of steps (as in PaLM)."""
    return falling(step) + (2.5 * math.exp(-(step % 100) / 10) if step > 100 else 0)


def badly_initialized(step: int) -> float:
    return 3 + 60 * math.exp(-step / 150)


def overfitted_epochs(step: int) -> float:
    """Falls at the beginning of each epoch, then stays constant."""
    return 3.0 - 0.8 * (step // 250)


def never_learning(step: int) -> float:
    return 10.9 + 0.01 * math.sin(step)


def slowly_worse(step: int) -> float:
    """Data that becomes slightly harder."""
    return 3 + 0.4 * step / STEPS


@pytest.mark.parametrize(
    "loss_at", [falling, noisy, healing_spikes, badly_initialized, overfitted_epochs, slowly_worse, never_learning]
)
@pytest.mark.parametrize("steps", [20, 60, 100, 300, STEPS])
def test_a_loss_that_does_not_diverge_gets_no_advice(loss_at: Callable[[int], float], steps: int) -> None:
    assert advice_for(loss_at, steps=steps) == []


def test_the_noise_of_a_small_batch_gets_no_advice() -> None:
    for seed in range(50):
        NOISE.seed(seed)
        assert advice_for(noisy, steps=60) == [], seed


def rising_from_200(step: int) -> float:
    return falling(min(step, 200)) + max(0, step - 200) * 0.02


def broken_at_300(step: int) -> float:
    """A spike that never recovers, below the loss of guessing."""
    return falling(step) + (4 if step > 300 else 0)


def noisy_and_broken(step: int) -> float:
    return noisy(step) + (6 if step > 300 else 0)


@pytest.mark.parametrize(("loss_at", "latest"), [(rising_from_200, 500), (broken_at_300, 450), (noisy_and_broken, 450)])
def test_a_loss_that_stays_far_above_its_minimum_is_reported_once(loss_at: Callable[[int], float], latest: int) -> None:
    (advice,) = advice_for(loss_at)
    assert advice.code == "diverging_loss"
    assert int(advice.evidence["step"]) <= latest  # pyright: ignore[reportArgumentType]
    assert advice.patch == {"learning_rate": 2e-4, "warmup_steps": 0.1}


def test_a_loss_worse_than_guessing_is_reported_sooner() -> None:
    def lost(step: int) -> float:
        return falling(step) if step <= 300 else 15.0

    (known,), (unknown,) = advice_for(lost), advice_for(lost, vocab_size=None)
    assert int(known.evidence["step"]) < int(unknown.evidence["step"])  # pyright: ignore[reportArgumentType]
    assert int(known.evidence["step"]) <= 370  # pyright: ignore[reportArgumentType]


def test_a_short_run_that_diverges_is_reported_before_its_end() -> None:
    (advice,) = advice_for(lambda step: 6.0 if step < 4 else 60.0, steps=20, vocab_size=384)
    assert int(advice.evidence["step"]) <= 12  # pyright: ignore[reportArgumentType]
