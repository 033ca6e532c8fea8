"""Conversations that cannot be trained on are reported with their line and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.data.conversations import CALLING, GOOD_ROW, TWO_TURNS, WITH_SYSTEM, tokens_of
from zeta_core.failures import InvalidData


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            chat_templates.CHATML,
            {"messages": [{"role": "robot", "content": "x"}]},
            "message 1 has the role 'robot'; use system",
        ),
        (
            chat_templates.CHATML,
            {"messages": [{"who": "human", "value": "x"}]},
            r"message 1 has no 'role' \(it has: value, wh",
        ),
        (
            chat_templates.CHATML,
            {"messages": [{"role": "user", "content": 3}]},
            "message 1 has 'content' that is a number, not text",
        ),
        (chat_templates.CHATML, {"messages": "Hi"}, "'messages' is text; give a list of messages"),
        (chat_templates.CHATML, {"messages": []}, "'messages' is empty"),
        (chat_templates.CHATML, {"messages": TWO_TURNS[:1]}, "has no assistant turn to train on; remove the row"),
        (
            chat_templates.CHATML,
            {"messages": [TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}]},
            "no assistant turn to train on",
        ),
        (chat_templates.CHATML, {"messages": TWO_TURNS, "tools": "{"}, "'tools' is text that is not JSON"),
        (chat_templates.CHATML, {"text": "words"}, r"has no 'messages' \(it has: text\)"),
        (
            chat_templates.GEMMA,
            {"messages": WITH_SYSTEM},
            "chat template rejects the conversation: System role not supported",
        ),
        (
            chat_templates.GEMMA,
            {"messages": TWO_TURNS[1:]},
            "starts with an assistant turn, which the tokenizer's chat template",
        ),
        (
            chat_templates.SEPARATE,
            {"messages": TWO_TURNS},
            "does not render the answer directly after the generation prompt",
        ),
        (
            None,
            {"messages": TWO_TURNS, "tools": [{"name": "add"}]},
            "has the tool 'add', which the tokenizer's chat template omits",
        ),
        (
            chat_templates.CHATML,
            {"messages": CALLING},
            "calls the tool 'add', which the tokenizer's chat template omits",
        ),
        (
            chat_templates.CHATML,
            {"messages": [*TWO_TURNS[:3], {"role": "assistant", "content": " "}]},
            "empty assistant turn",
        ),
        (
            chat_templates.CHATML,
            {"messages": [{"role": "assistant", "content": None}]},
            "message 1 has neither 'content' nor 'tool_calls'",
        ),
        (
            chat_templates.CHATML,
            {"messages": [{"role": "assistant", "content": "x", "weight": 2}]},
            "message 1 has the weight 2",
        ),
        (
            chat_templates.CHATML,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
            "message 1 has a tool call without a name",
        ),
        (
            chat_templates.CHATML,
            {"prompt": "a", "completion": "b", "tools": [{"name": "add"}]},
            "has tools, which plain text",
        ),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_named_by_its_line(
    template: str | None, row: Any, message: str, tmp_path: Path
) -> None:
    rows = [row] if template in (chat_templates.SEPARATE, chat_templates.GEMMA) or "prompt" in row else [GOOD_ROW, row]
    with pytest.raises(InvalidData, match=rf"^chat\.jsonl, line {len(rows)}:? .*{message}"):
        tokens_of(tmp_path, rows, byte_tokenizer(template))


def test_an_answer_without_a_token_is_named_by_its_line(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    with pytest.raises(InvalidData, match=r"^chat\.jsonl, line 2: 'completion' is empty"):
        tokens_of(tmp_path, rows, byte_tokenizer(None))


def test_plain_text_has_no_turns_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"train_on is 'assistant', but chat\.jsonl is plain text without turns"):
        tokens_of(tmp_path, [{"text": "words"}], byte_tokenizer(None), train_on="assistant")
