"""Control characters: the patterns in JSON schemas describe what is rejected."""

import re

import pytest

from zeta_core.contract.spec.evaluation_spec import NewEvaluation
from zeta_core.contract.text import LINE_PATTERN, TEXT_PATTERN, control_character

SURROGATES = range(0xD800, 0xE000)  # not valid Unicode, so the patterns don't name them


@pytest.mark.parametrize(("pattern", "in_line"), [(TEXT_PATTERN, False), (LINE_PATTERN, True)])
def test_the_patterns_match_exactly_the_accepted_characters(pattern: str, in_line: bool) -> None:
    for code in (code for code in range(0x11000) if code not in SURROGATES):
        text = f"a{chr(code)}b"
        accepted = control_character(text, in_line=in_line) is None
        assert (re.search(pattern, text) is not None) == accepted, f"U+{code:04X}"


def test_a_line_end_of_windows_is_text() -> None:
    assert re.search(TEXT_PATTERN, "a\r\nb")
    assert control_character("a\r\nb") is None


def test_the_schema_of_metadata_has_the_patterns() -> None:
    metadata = NewEvaluation.model_json_schema()["properties"]["metadata"]
    assert metadata["propertyNames"] == {"maxLength": 64, "pattern": LINE_PATTERN}
    assert metadata["additionalProperties"]["pattern"] == TEXT_PATTERN
