"""The learning rate after k updates, and at the end."""

from __future__ import annotations

import math

import pytest

from zeta_core.contract.spec.options import Schedule
from zeta_core.optim.schedule import factor, rate, warmup_updates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_reaches_the_full_rate_with_its_last_update(schedule: Schedule) -> None:
    rates = [factor(schedule, k, warmup=4, total_steps=40) for k in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_schedule_reaches_zero_only_after_the_last_update(schedule: Schedule) -> None:
    assert factor(schedule, 40, warmup=4, total_steps=40) == pytest.approx(0, abs=1e-12)
    assert 0 < factor(schedule, 39, warmup=4, total_steps=40) < 0.2


def test_cosine_after_k_updates_is_the_textbook_value() -> None:
    for k in range(10, 101):
        expected = 0.5 * (1 + math.cos(math.pi * (k - 10) / 90))
        assert factor("cosine", k, warmup=10, total_steps=100) == pytest.approx(expected)


def test_wsd_keeps_the_full_rate_until_its_decay() -> None:
    assert [factor("wsd", k, warmup=10, total_steps=100) for k in (10, 50, 80, 90, 100)] == [1, 1, 1, 0.5, 0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_rate_ends_at_the_lowest_one(schedule: Schedule) -> None:
    rates = [rate(schedule, k, peak=1e-3, lowest=1e-4, warmup=4, total_steps=40) for k in range(41)]
    assert rates[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[40] == pytest.approx(1e-4)


def test_a_constant_rate_does_not_change() -> None:
    assert factor("constant", 100, warmup=0, total_steps=100) == 1


@pytest.mark.parametrize(
    ("warmup", "total", "expected"), [(0.03, 100, 3), (0.03, 1000, 30), (0, 10, 0), (50, 10, 10), (7.0, 10, 7)]
)
def test_warm_up_is_a_share_below_one_and_a_number_of_steps_above(warmup: float, total: int, expected: int) -> None:
    assert warmup_updates(warmup, total) == expected


def test_a_run_of_one_step_trains_at_the_full_rate() -> None:
    assert factor("cosine", 0, warmup=warmup_updates(0.03, 1), total_steps=1) == 1
