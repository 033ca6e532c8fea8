"""Durations as options of commands."""

import pytest

from zeta.cli.durations import seconds_of
from zeta_core.contract.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("12h", 43200), ("3h55m", 14100), ("90d", 7776000), ("2w", 1209600)]
)
def test_a_duration_is_a_sum_of_its_parts(text: str, seconds: int) -> None:
    assert seconds_of(text, "--for") == seconds


@pytest.mark.parametrize("text", ["", "3", "h", "3 h", "-3h", "1.5h", "3h5", "٣h", "3hours", "1234567h", "3s"])
def test_anything_else_is_rejected_with_the_option_and_examples(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^--for is .*; it must be a duration such as 30m, 12h, 3h55m"):
        seconds_of(text, "--for")
