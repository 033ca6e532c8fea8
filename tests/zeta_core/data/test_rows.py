"""The format of a row, as its columns and the names that somebody gave them tell it."""

from __future__ import annotations

from zeta_core.data.rows import fault_in, format_of

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_columns_that_are_named_tell_the_format_before_those_that_are_there() -> None:
    assert format_of(PAIR, {}) == "preference"
    assert format_of(PAIR, {"completion": "chosen"}) == "prompt_completion"
    assert format_of({**PAIR, "text": "a b"}, {"text": "text"}) == "text"
    assert format_of({"messages": [], **PAIR}, {}) == "messages"


def test_a_row_of_no_format_is_told_which_there_are_and_one_of_another_is_not() -> None:
    assert "has no 'text' (it has: body), nor 'messages', nor" in (fault_in({"body": "x"}, "text", {}) or "")
    assert "has no 'text' (it has: messages); name" in (fault_in({"messages": []}, "text", {}) or "")
