"""The format of a row is detected from its columns and from the names that a user gives them."""

from __future__ import annotations

from zeta_core.data.rows.columns import detect_layout
from zeta_core.data.rows.formats import fault_in

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def format_of(row: dict[str, object], columns: dict[str, str], method: str = "sft") -> str | None:
    layout = detect_layout(row, columns, None, method)
    return None if layout is None else layout.row_format


def test_named_columns_decide_the_format_before_those_that_are_present() -> None:
    assert format_of({**PAIR}, {}) == "preference"
    assert format_of({**PAIR}, {"completion": "chosen"}) == "prompt_completion"
    assert format_of({**PAIR, "text": "a b"}, {"text": "text"}) == "text"


def test_the_method_decides_between_messages_and_preference_pairs() -> None:
    row: dict[str, object] = {"messages": [], **PAIR}
    assert format_of(row, {}) == "messages"
    assert format_of(row, {}, "dpo") == "preference"


def test_a_row_without_the_column_of_its_format_names_those_that_it_has() -> None:
    assert "has no 'text' (it has: messages); name" in (fault_in({"messages": []}, "text", {}) or "")
