"""The text of tokens that arrive one by one: whole characters, stop strings, tool calls, and the bytes of tokens."""

import pytest

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from zeta_core.serve.sampling import Chosen
from zeta_core.serve.text import StopFilter, TextDecoder, TokenBytes
from zeta_core.serve.tool_calls import parse_calls, starts_call, tool_format


def test_only_whole_characters_are_passed_on() -> None:
    tokenizer = byte_tokenizer(CHATML)
    text = "Grüße an 🐢 und 猫"
    decoder = TextDecoder(tokenizer, keeps_special=False)
    pieces = [decoder.add(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert decoder.finish() == ""


def test_a_token_that_the_tokenizer_does_not_know_has_no_text() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert TextDecoder(tokenizer, keeps_special=False).add(100_000) == ""
    assert TokenBytes(tokenizer).logprob(Chosen(100_000, -1.0)).bytes == []


def test_an_incomplete_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = byte_tokenizer(CHATML)
    decoder = TextDecoder(tokenizer, keeps_special=False)
    for token in tokenizer("🐢", add_special_tokens=False)["input_ids"][:2]:
        assert decoder.add(token) == ""
    assert set(decoder.finish()) <= {"\ufffd"}


@pytest.mark.parametrize(
    ("parts", "stops", "text"),
    [
        (["a b", "c d"], ["bc"], "a "),
        (["ab", "ab", "c"], ["abc"], "ab"),
        (["one", "\n", "\ntwo"], ["\n\n", "two"], "one"),
        (["one", "\n"], ["\n\n"], "one\n"),
        (["xy"], [], "xy"),
    ],
)
def test_text_ends_before_the_first_stop_string(parts: list[str], stops: list[str], text: str) -> None:
    filter_ = StopFilter(stops)
    passed = [filter_.add(part) for part in parts]
    assert "".join(passed) + filter_.add("", is_last=True) == text


def test_the_bytes_of_a_part_of_a_character_are_reported() -> None:
    tokenizer = byte_tokenizer(CHATML)
    first = tokenizer("🐢", add_special_tokens=False)["input_ids"][0]
    entry = TokenBytes(tokenizer).logprob(Chosen(first, -1.0, ((first, -1.0),)))
    assert entry.top[0].bytes == entry.bytes


@pytest.mark.parametrize(
    ("form", "text", "before"),
    [
        ("hermes", 'See:\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>', "See:"),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ulm"}}]', ""),
        ("llama", '{"name": "weather", "parameters": {"city": "Ulm"}}', ""),
    ],
)  # fmt: skip
def test_tool_calls_of_known_families_are_parsed(form: str, text: str, before: str) -> None:
    rest, calls = parse_calls(text, form)  # pyright: ignore[reportArgumentType]
    assert rest == before
    assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Ulm"}')]
    position = starts_call(text, form)  # pyright: ignore[reportArgumentType]
    assert text[:position].rstrip() == before


def test_text_in_another_format_is_left_as_it_is() -> None:
    text = "<tool_call>weather(Ulm)</tool_call>"
    assert parse_calls(text, "hermes") == (text, [])
    assert starts_call("An ordinary answer <b>", "hermes") is None
    assert tool_format("{% for message in messages %}") is None
    assert tool_format("...<tool_call>...") == "hermes"
