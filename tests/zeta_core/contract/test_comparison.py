"""The comparison of two models on the same held-out documents, with its noise floor."""

import random

import pytest

from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job import comparison
from zeta_core.contract.job.comparison import DocumentLosses, compare


def losses(values: list[float], *, tokens: int = 10, first: int = 0) -> DocumentLosses:
    """Documents with these mean losses per token."""
    return DocumentLosses(
        step=1,
        num_held_out=len(values),
        documents=[f"{number:016x}" for number in range(first, first + len(values))],
        num_targets=[tokens] * len(values),
        losses=[value * tokens for value in values],
    )


def noisy(shift: float, noise: float, seed: int) -> list[float]:
    """Losses of 100 documents that differ a lot from each other, by the same amounts for each model."""
    documents, draw = random.Random(0), random.Random(seed)
    return [documents.uniform(1, 5) + shift + draw.gauss(0, noise) for _ in range(100)]


def test_a_small_but_consistent_difference_is_found() -> None:
    found = compare(losses(noisy(0.0, 0.01, 1)), losses(noisy(0.02, 0.01, 2)))
    assert found.better == "a"
    assert found.low < found.difference < found.high < 0
    assert found.difference == pytest.approx(-0.02, abs=0.005)
    assert compare(losses(noisy(0.02, 0.01, 2)), losses(noisy(0.0, 0.01, 1))).better == "b"


def test_a_difference_within_the_noise_is_not_distinguishable() -> None:
    found = compare(losses(noisy(0.0, 0.3, 1)), losses(noisy(0.01, 0.3, 2)))
    assert found.better is None
    assert found.low < 0 < found.high
    same = losses(noisy(0.0, 0.3, 1))
    found = compare(same, same)
    assert (found.difference, found.low, found.high, found.better) == (0, 0, 0, None)


def test_equal_models_are_called_different_in_about_one_of_twenty_comparisons() -> None:
    results = [compare(losses(noisy(0, 0.1, 2 * n)), losses(noisy(0, 0.1, 2 * n + 1))) for n in range(60)]
    assert sum(found.better is not None for found in results) <= 8


def test_a_comparison_is_repeatable_and_weights_documents_by_their_tokens() -> None:
    a, b = losses(noisy(0.0, 0.1, 1)), losses(noisy(0.1, 0.1, 2))
    assert compare(a, b) == compare(a, b)
    a = DocumentLosses(
        step=1, num_held_out=5, documents=list("vwxyz"), num_targets=[96, 1, 1, 1, 1], losses=[96.0] + [9.0] * 4
    )
    assert compare(a, a).loss_a == pytest.approx((96 + 36) / 100)


def test_many_documents_are_resampled_in_groups_with_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = losses(noisy(0.0, 0.1, 1)), losses(noisy(0.02, 0.1, 2))
    alone = compare(a, b)
    monkeypatch.setattr(comparison, "MAX_GROUPS", len(a.losses) // 3)
    grouped = compare(a, b)
    assert (grouped.difference, grouped.num_documents) == (alone.difference, len(a.losses))
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.3)


def test_models_with_other_or_too_few_documents_are_not_compared() -> None:
    ten = losses([1.0] * 10)
    with pytest.raises(InvalidRequest, match="different held-out documents \\(10 and 10, 5 of them the same\\)"):
        compare(ten, losses([1.0] * 10, first=5))
    with pytest.raises(InvalidRequest, match="seq_len"):
        compare(ten, losses([1.0] * 10, tokens=9))
    with pytest.raises(InvalidRequest, match="Only 4 documents"):
        compare(losses([1.0] * 4), losses([2.0] * 4))
