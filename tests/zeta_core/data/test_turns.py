"""Every accepted form of a conversation becomes the same messages, and no part of a turn is lost silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.data.conversations import documents, tokens_of
from tests.zeta_core.runs import RecordedLines
from zeta_core.contract.job.events import WarningLine
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter

QUESTION = {"role": "user", "content": "Who wrote Emma?"}
ANSWER = {"role": "assistant", "content": "Jane Austen."}
PLAIN = {"messages": [QUESTION, ANSWER]}
WITH_SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]}
LOOKUP = {"name": "look_up", "arguments": {"title": "Emma"}}
LOOKING_UP = {
    "messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [{"function": LOOKUP}]}],
    "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {}}}],
}
# ChatML with tools, calls, reasoning and the names of speakers.
RICH = (
    "{% if tools %}<|im_start|>system{{ '\n' }}{% for t in tools %}{{ t.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(tmp_path: Path, row: Any, template: str | None = RICH, **source: Any) -> list[tuple[str, list[str]]]:
    tokenizer = byte_tokenizer(template)
    return documents(tokens_of(tmp_path, [row], tokenizer, **source), tokenizer)


@pytest.mark.parametrize(
    ("row", "same_as"),
    [
        ({"conversations": [{"from": "human", "value": QUESTION["content"]}, ANSWER]}, PLAIN),
        (
            {
                "conversations": [
                    {"from": "human", "value": QUESTION["content"]},
                    {"from": "gpt", "value": ANSWER["content"]},
                ],
                "system": "Be brief.",
            },
            WITH_SYSTEM,
        ),
        ({"messages": [{"role": "developer", "content": "Be brief."}, QUESTION, ANSWER]}, WITH_SYSTEM),
        (
            {"messages": [{**QUESTION, "content": [{"type": "text", "text": QUESTION["content"]}]}, ANSWER]},
            PLAIN,
        ),
        ({"messages": [QUESTION, {"role": "assistant", "content": None, "refusal": ANSWER["content"]}]}, PLAIN),
        (
            {
                "messages": [
                    QUESTION,
                    {"role": "assistant", "content": [{"type": "refusal", "refusal": ANSWER["content"]}]},
                ]
            },
            PLAIN,
        ),
        ({"messages": [QUESTION, {**ANSWER, "weight": 1, "tool_calls": []}], "parallel_tool_calls": True}, PLAIN),
        (
            {
                "messages": [
                    QUESTION,
                    {
                        "role": "assistant",
                        "content": None,
                        "function_call": {**LOOKUP, "arguments": json.dumps(LOOKUP["arguments"])},
                    },
                ],
                "functions": [{"name": "look_up", "parameters": {}}],
            },
            LOOKING_UP,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": QUESTION["content"]},
                    {"from": "function_call", "value": json.dumps(LOOKUP)},
                ],
                "tools": json.dumps([{"name": "look_up", "parameters": {}}]),
            },
            LOOKING_UP,
        ),
    ],
    ids=[
        "sharegpt mixed with openai",
        "sharegpt with system",
        "developer",
        "text parts",
        "refusal",
        "refusal part",
        "openai with weight",
        "openai function_call",
        "sharegpt function_call",
    ],
)
def test_equal_conversations_in_different_formats_give_the_same_tokens(row: Any, same_as: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert read(tmp_path / "a", row) == read(tmp_path / "b", same_as)


def test_function_and_observation_turns_become_tool_turns(tmp_path: Path) -> None:
    turns = [QUESTION, {"role": "assistant", "tool_calls": [{"function": LOOKUP}]}, None, ANSWER]
    results = [
        {"role": "tool", "content": "1815", "tool_call_id": "call_1"},
        {"role": "function", "name": "look_up", "content": "1815"},
        {"from": "observation", "value": "1815"},
    ]
    for number, result in enumerate(results):
        turns[2] = result
        folder = tmp_path / str(number)
        folder.mkdir()
        [(text, _)] = read(folder, {"messages": turns}, RICH.replace("{% if m.name %} {{ m.name }}{% endif %}", ""))
        assert "<|im_start|>tool\n1815<|im_end|>" in text


def test_a_template_with_developer_turns_renders_them(tmp_path: Path) -> None:
    template = chat_templates.CHATML + "{# developer #}"
    [(text, _)] = read(
        tmp_path, {"messages": [{"role": "developer", "content": "Be brief."}, QUESTION, ANSWER]}, template
    )
    assert text.startswith("<|im_start|>developer\nBe brief.")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_content", "She is English."),
        ("thinking", "She is English."),
        ("reasoning", "She is English."),
        ("refusal", "I would rather not say."),
        ("name", "critic"),
        ("score", 3),
        ("tags", ["novel"]),
    ],
)
def test_a_field_that_the_template_does_not_render_is_named(field: str, value: Any, tmp_path: Path) -> None:
    row = {"messages": [QUESTION, {**ANSWER, field: value}]}
    with pytest.raises(InvalidData, match=rf"chat\.jsonl, line 1: message 2 has '{field}', which .* does not render"):
        read(tmp_path, row, chat_templates.CHATML)
    with pytest.raises(InvalidData, match=rf'"drop_fields": \["{field}"\]'):
        read(tmp_path, row, chat_templates.CHATML)
    documents_without = read(tmp_path, row, chat_templates.CHATML, drop_fields=[field])
    assert documents_without[0][1] == ["Jane Austen.<|im_end|>\n"]


def test_rendered_fields_of_an_answer_are_trained_on(tmp_path: Path) -> None:
    turn = {**ANSWER, "reasoning": "She is English.", "name": "critic"}
    template = RICH.replace("assistant\n{% endif %}", "assistant{% endif %}")
    [(_, learned)] = read(tmp_path, {"messages": [QUESTION, turn]}, template)
    assert learned == [" critic\n<think>She is English.</think>Jane Austen.<|im_end|>\n"]


def test_an_unrendered_field_is_found_after_rows_without_it(tmp_path: Path) -> None:
    rows = [PLAIN, PLAIN, {"messages": [QUESTION, {**ANSWER, "thinking": "Austen"}]}]
    with pytest.raises(InvalidData, match=r"line 3: message 2 has 'thinking'"):
        tokens_of(tmp_path, rows, byte_tokenizer(chat_templates.CHATML))


def test_an_answer_with_only_unrendered_reasoning_is_rejected(tmp_path: Path) -> None:
    row = {"messages": [QUESTION, {"role": "assistant", "content": "", "reasoning_content": "Austen."}]}
    with pytest.raises(InvalidData, match="message 2 has 'reasoning_content'"):
        tokens_of(tmp_path, [row], ByT5Tokenizer())
    with pytest.raises(InvalidData, match="has an empty assistant turn"):
        tokens_of(tmp_path, [row], ByT5Tokenizer(), drop_fields=["reasoning_content"])
    assert read(tmp_path, row)[0][1] == ["<think>Austen.</think><|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            chat_templates.LLAMA3,  # renders only the calls
            [QUESTION, {**ANSWER, "tool_calls": [{"function": LOOKUP}]}],
            "message 2: the tokenizer's chat template does not render all of its content",
        ),
        (
            chat_templates.LLAMA3,  # renders only the first call
            [QUESTION, {"role": "assistant", "tool_calls": [{"function": LOOKUP}, {"function": {"name": "open"}}]}],
            "calls the tool 'open'",
        ),
        (
            chat_templates.CHATML.replace(
                "{% for", "{% set messages = messages | rejectattr('role', 'eq', 'system') %}{% for"
            ),
            WITH_SYSTEM["messages"],
            "message 1: the tokenizer's chat template does not render all of its content",
        ),
        (
            chat_templates.CHATML.replace("message['content']", "message['content'].split('</note>')[-1]"),
            [{"role": "user", "content": "Hi <note>quiet</note> there"}, ANSWER],
            "message 1: the tokenizer's chat template does not render all of its content",
        ),
        (
            RICH.replace("{{ call.function.arguments | tojson }}", ""),
            LOOKING_UP["messages"],
            "calls the tool 'look_up'",
        ),
    ],
    ids=["content beside calls", "second call", "system turn", "part of a turn", "arguments"],
)
def test_content_and_tool_calls_that_the_template_omits_are_errors(
    template: str, messages: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidData, match=message):
        read(tmp_path, {"messages": messages}, template)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            r"message 1 has a part of 'content' that is not text \(type 'image_url'\).*remove the part",
        ),
        ({"messages": [QUESTION, {**ANSWER, "audio": {"id": "a"}}]}, "message 2 has 'audio'; only text"),
        ({"messages": [{**QUESTION, "weight": 1}, ANSWER]}, "message 1 has the weight 1, but only assistant turns"),
        ({**WITH_SYSTEM, "system": "Be long."}, "has both a 'system' column and a system turn"),
        (
            {"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": LOOKUP}], "function_call": LOOKUP}]},
            "message 2 has both 'tool_calls' and 'function_call'",
        ),
        (
            {
                "messages": [QUESTION, {"role": "assistant", "tool_calls": [{"function": LOOKUP}] * 2}],
                "parallel_tool_calls": False,
            },
            "message 2 has several tool calls, but 'parallel_tool_calls' is false",
        ),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'conversations': message 1 has the role 'robot'"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "has 'function_call' that is not valid JSON"),
    ],
)
def test_an_unusable_turn_is_rejected_with_its_number_and_a_fix(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=rf"^chat\.jsonl, line 1:? .*{message}"):
        read(tmp_path, row)


def test_a_turn_of_weight_zero_and_train_on_all_are_rejected(tmp_path: Path) -> None:
    row = {"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION, ANSWER]}
    with pytest.raises(InvalidData, match="has a turn of weight 0, but train_on 'all'"):
        read(tmp_path, row, train_on="all")


def test_a_template_may_omit_earlier_reasoning_unless_all_is_trained_on(tmp_path: Path) -> None:
    """Qwen 3 omits it, so each turn is trained on as rendered when it is the last one."""
    template = RICH.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    thinking = {**ANSWER, "reasoning_content": "She is English."}
    row = {"messages": [QUESTION, thinking, QUESTION, thinking]}
    found = read(tmp_path, row, template)
    assert [learned for _, learned in found] == [["<think>She is English.</think>Jane Austen.<|im_end|>\n"]] * 2
    with pytest.raises(InvalidData, match="message 2 has 'reasoning_content'"):
        read(tmp_path, row, template, train_on="all")


def test_conversations_with_turns_after_the_last_answer_are_counted(tmp_path: Path) -> None:
    recorded = RecordedLines()
    row = {"messages": [QUESTION, ANSWER, {"role": "user", "content": "Thanks"}]}
    tokens = tokens_of(tmp_path, [row, PLAIN], byte_tokenizer(chat_templates.CHATML), report=Reporter(recorded))
    assert tokens.num_with_unused_turns == 1
    assert not [line for line in recorded.all if isinstance(line, WarningLine)], "they are reported with the data"


@pytest.mark.parametrize(
    ("turn", "learned"),
    [
        ({"content": "<think>\nEnglish.\n</think>\n\nJane Austen."}, "English.\n</think>\n\nJane Austen.<|end|>"),
        ({"content": "Jane Austen.", "reasoning_content": "English."}, "English.\n</think>\n\nJane Austen.<|end|>"),
        ({"content": "Jane Austen."}, "Jane Austen.<|end|>"),
    ],
    ids=["reasoning in content", "reasoning in a field", "no reasoning"],
)
def test_deepseek_answers_are_trained_on_with_their_reasoning(turn: Any, learned: str, tmp_path: Path) -> None:
    """The template omits the reasoning of finished turns, and its prompt begins the next one."""
    [(text, trained_texts)] = read(tmp_path, {"messages": [QUESTION, {"role": "assistant", **turn}]}, chat_templates.R1)
    assert trained_texts == [learned]
    opening = "" if turn == {"content": "Jane Austen."} else "<think>\n"
    assert text == f"<|User|>Who wrote Emma?<|Assistant|>{opening}{learned}"


def test_deepseek_turns_are_trained_on_with_the_history_of_inference(tmp_path: Path) -> None:
    thinking = {"role": "assistant", "content": "<think>\nEnglish.\n</think>\n\nJane Austen."}
    found = read(tmp_path, {"messages": [QUESTION, thinking, QUESTION, thinking]}, chat_templates.R1)
    history = "<|User|>Who wrote Emma?<|Assistant|>\n\nJane Austen.<|end|>"
    learned = "English.\n</think>\n\nJane Austen.<|end|>"
    prompt = "<|User|>Who wrote Emma?<|Assistant|><think>\n"
    assert found == [(prompt + learned, [learned]), (history + prompt + learned, [learned])]
