"""The chunks and whole objects that are built from the pieces of an answer."""

from typing import Any

import pytest

from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.openai.answer_objects import AnswerObject
from zeta_core.contract.openai.answer_parameters import chat_query, text_query
from zeta_core.contract.wire.answers import Piece, TokenLogprob


def test_a_token_without_text_of_its_own_keeps_its_log_probability_in_a_stream() -> None:
    query = chat_query(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "logprobs": True}
    )
    built = AnswerObject(query, "fingerprint")
    half = TokenLogprob(token="bytes:\\xc3", bytes=[0xC3], logprob=-0.5)
    pieces = [Piece(choice=0, text="", logprobs=[half], num_tokens=1), Piece(choice=0, text="é", num_tokens=2)]
    choices = []
    for piece in pieces:
        built.add(piece)
        choices += [chunk["choices"][0] for chunk in built.chunks(piece)]
    logprobs = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["bytes"] for entry in logprobs] == [[0xC3]]
    assert choices[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def test_only_a_message_with_tool_calls_may_have_no_content() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    chat_query({"model": "m", "messages": [{"role": "user", "content": "Hi"}, answer]})
    with pytest.raises(InvalidRequest, match=r"messages\.1\.content is null") as caught:
        chat_query({"model": "m", "messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": None}]})
    assert caught.value.param == "messages.1.content"


def test_parameters_without_effect_are_accepted_with_their_default() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    neutral = {
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "store": False,
        "logit_bias": {},
        "service_tier": "auto",
        "modalities": ["text"],
    }
    assert chat_query({"model": "m", "messages": messages, **neutral}) == chat_query(
        {"model": "m", "messages": messages}
    )
    plain = text_query({"model": "m", "prompt": "Hi"})
    assert text_query({"model": "m", "prompt": ["Hi"], "echo": False, "best_of": 1}) == plain


def test_several_prompts_have_their_choices_in_order_and_are_echoed() -> None:
    query = text_query({"model": "m", "prompt": ["a", "b"], "n": 2, "echo": True, "stream": True})
    built = AnswerObject(query, "fingerprint")
    pieces = [Piece(choice=number, text=str(number), num_tokens=1) for number in (3, 0, 1, 2, 3)]
    streamed = [""] * 4
    for piece in pieces:
        built.add(piece)
        for chunk in built.chunks(piece):
            streamed[piece.choice] += chunk["choices"][0]["text"]
    assert streamed == [choice["text"] for choice in built.whole()["choices"]] == ["a0", "a1", "b2", "b33"]
    assert text_query({"model": "m", "prompt": [[1, 2], [3]]}).prompt.texts == [[1, 2], [3]]
    assert text_query({"model": "m", "prompt": [1, 2]}).prompt.texts == [[1, 2]]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "65 texts with 2 answers each"),
        ({"prompt": [1, 2], "echo": True}, "echo", "a prompt of token ids"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", "can't be combined with logprobs"),
        ({"prompt": "a", "best_of": 2}, "best_of", "best_of"),
    ],
)
def test_completions_that_are_not_supported_are_refused(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        text_query({"model": "m", **fields})
    assert caught.value.param == param


def test_tools_that_must_not_be_called_are_not_shown_to_the_model() -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": False}}]
    fields = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    shown = chat_query({**fields, "tool_choice": "auto"}).prompt.tools
    assert shown == [{"type": "function", "function": {"name": "f"}}]
    assert chat_query({**fields, "tool_choice": "none"}).prompt.tools is None
    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", named):
        with pytest.raises(InvalidRequest, match="tool_choice"):
            chat_query({**fields, "tool_choice": choice})
