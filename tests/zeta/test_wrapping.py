"""Breaking text at the width of a terminal."""

import pytest

from zeta.cli.wrapping import cell_len, cut_end, wrapped

COMMAND = "zeta rerun job_01m8pxaq4r9vwx524yen526j --set learning_rate=0.002"


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_text_is_broken_between_words_and_commands_stay_complete(width: int) -> None:
    text = f"The loss is diverging: smoothed 400 at step 7. `zeta logs @last` shows more データ. Apply it: {COMMAND}"
    lines = wrapped(text, width, indent=2).split("\n")
    assert all(cell_len(line) <= width for line in lines if COMMAND not in line)
    assert sum(COMMAND in line for line in lines) == sum("`zeta logs @last`" in line for line in lines) == 1
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == text


def test_lines_of_the_text_keep_their_indentation() -> None:
    assert wrapped("one two\n    three four", 10, indent=2) == "one two\n    three\n    four"
    assert wrapped("three four", 16, indent=6, column=6) == "three four"
    assert wrapped("three four", 15, indent=6, column=6) == "three\n      four"
    assert wrapped("", 10) == ""


def test_the_end_of_a_text_is_replaced_by_an_ellipsis() -> None:
    assert cut_end("abcdef", 6) == "abcdef"
    assert cut_end("abcdef", 5) == "abcd…"
    assert [cut_end("abcdef", width) for width in (1, 0, -2)] == ["…"] * 3
    assert cell_len(cut_end("データセット", 5)) <= 5
